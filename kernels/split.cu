// Split: planes of any size, each over as many blocks as it has tiles, in three steps:
//
//     partial   moments_* / gradient_*      one scope per tile    -> count, mean, m2 / three sums of the tile
//     merge     merge_moments / _gradient   one block per plane   -> mean, rstd, mean_lo / sum_dy, sum_dy_xhat, mean_lo
//     apply     apply_* / apply_gradient_*  one scope per tile    -> y / dx; in reverse: the tiles read last are in L2
//
// Each round of the three serves the channel tiles [first, first + channel_tiles): as many as half of L2 holds.
// Partials lie as [quantity][plane][tile]; the order in which they are merged depends only on their number.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "tiles.cuh"

// Moments of `count` values: m2 is the sum of their squared distances from their mean.
struct Moments {
    long long count;
    Accum mean, m2;
};

// Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1, about the pooled mean.
__device__ inline Moments merge(const Moments& a, const Moments& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const Accum distance = b.mean - a.mean, fraction = (Accum)b.count / (Accum)(a.count + b.count);
    return {a.count + b.count, a.mean + distance * fraction,
            a.m2 + b.m2 + distance * distance * ((Accum)a.count * fraction)};
}

template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void moments(const Tensor& x, long long* counts, Accum* means, Accum* m2, const Tiles& tiles) {
    unsigned char* shared = shared_memory();
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<REGISTERS, THREADS, VECS_PER_THREAD> tile;
        Math* scratch = (Math*)shared;
        Math* other = scratch + scratch_size<THREADS>(partition.channel_vecs, 2 * P);
        const MomentsOfThread m = moments_of_tile<SCOPE>(partition, x, tile, VECS_PER_THREAD, scratch, other);
        partition.each_plane(tiles.channels, [&](int p, long long i) {
            const long long at = i * tiles.tiles + partition.tile;
            store(counts + at, (long long)partition.count());
            store(means + at, (Accum)m.mean[p] + (Accum)m.mean_lo[p]);
            store(m2 + at, wide_m2(m.scaled_m2[p]));
        });
    });
}

template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void apply(const Tensor& x, const Tensor& y, const Math* mean, const Math* rstd, const Math* mean_lo,
                             const Affine& parameters, const Epilogue& epilogue, const Tiles& tiles) {
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, y, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineOfThread affine(partition, parameters, tiles.channels);
        Normalization to;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long i = partition.n * tiles.channels + partition.c + p;
            const bool exists = partition.c + p < tiles.channels;
            to.set(p, exists ? load(mean + i) : 0, exists ? load(mean_lo + i) : 0, exists ? load(rstd + i) : 0, affine);
        }
        Tile<REGISTERS, THREADS, VECS_PER_THREAD> tile;
        tile.read(partition, x, 0);
        write_tile(partition, y, tile, VECS_PER_THREAD, epilogue.residual, [&](int p, Math value, Math residual) {
            return activated(to.z(p, value), residual, epilogue.slope);
        });
    });
}

// If there is a dresidual, it is written here, and replaces dy from then on.
template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void gradient(const Tensor& x, const Tensor& dy, const Math* mean, const Math* rstd,
                                const Math* mean_lo, const Affine& affine, const Epilogue& epilogue,
                                const Tensor& dresidual, Math* partial, long long planes, const Tiles& tiles) {
    unsigned char* shared = shared_memory();
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<REGISTERS, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        const AffineStats stat(partition, true, mean, mean_lo, rstd, affine, tiles.channels);
        Math sums[3 * P];
        gradient_sums<SCOPE>(partition, x, dy, epilogue, dresidual, tile_x, tile_dy, VECS_PER_THREAD, stat, sums,
                             (Math*)shared);
        partition.each_plane(tiles.channels, [&](int p, long long i) {
            #pragma unroll
            for (int q = 0; q < 3; q++) {
                store(partial + (q * planes + i) * tiles.tiles + partition.tile, sums[q * P + p]);
            }
        });
    });
}

// merged_mean_lo: mean_lo times rstd, as merged from all tiles.
template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void apply_gradient(const Tensor& x, const Tensor& dy, const Tensor& dx, const Math* mean,
                                      const Math* rstd, const Math* mean_lo, const Affine& affine,
                                      const Epilogue& epilogue, const Math* merged_mean_lo, const Math* sum_dy,
                                      const Math* sum_dy_xhat, const Tiles& tiles) {
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, dx, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineStats stat(partition, true, mean, mean_lo, rstd, affine, tiles.channels);
        Gradient g;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const bool exists = partition.c + p < tiles.channels;
            const long long i = partition.n * tiles.channels + partition.c + p;
            g.set(p, exists ? load(sum_dy + i) : 0, exists ? load(sum_dy_xhat + i) : 0,
                  exists ? load(merged_mean_lo + i) : 0, (Math)tiles.spatial, stat);
        }
        Tile<REGISTERS, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        tile_x.read(partition, x, 0);
        tile_dy.read(partition, dy, 0);
        if (EPILOGUE) {
            apply_epilogue(partition, epilogue, Tensor{}, tile_x, tile_dy, 0, stat, [](int, Math, Math) {});
        }
        write_tile(partition, dx, tile_x, tile_dy, VECS_PER_THREAD,
                   [&](int p, Math x_, Math dy_) { return g.dx(p, x_, dy_, stat); });
    });
}

#define VARIANT(NAME, SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD, BLOCKS, CLUSTER_SIZE)                               \
    MOMENTS(NAME, SCOPE, THREADS, VECS_PER_THREAD, BLOCKS)                                                            \
    KERNEL(THREADS, BLOCKS) apply_##NAME(                                                                             \
        TENSOR(x), TENSOR(y), const Math* mean, const Math* rstd, const Math* mean_lo_, const void* weight,           \
        const void* bias_, int flags, EPILOGUE_PARAMETERS TILES_PARAMETERS) {                                         \
        apply<SCOPE, THREADS, VECS_PER_THREAD>(OF(x), OF(y), mean, rstd, mean_lo_, Affine{weight, bias_, flags},      \
                                               EPILOGUE_OF, TILES_OF);                                                \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) gradient_##NAME(                                                                          \
        TENSOR(x), TENSOR(dy), const Math* mean, const Math* rstd, const void* weight, int flags, GRADIENT_PARAMETERS \
        Math* partial, long long planes, TILES_PARAMETERS) {                                                          \
        gradient<SCOPE, THREADS, VECS_PER_THREAD>(OF(x), OF(dy), mean, rstd, MEAN_LO, Affine{weight, BIAS, flags},    \
                                                  EPILOGUE_OF, DRESIDUAL, partial, planes, TILES_OF);                 \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) apply_gradient_##NAME(                                                                    \
        TENSOR(x), TENSOR(dy), TENSOR(dx), const Math* mean, const Math* rstd, const void* weight, int flags,         \
        GRADIENT_PARAMETERS const Math* merged_mean_lo, const Math* sum_dy, const Math* sum_dy_xhat,                  \
        TILES_PARAMETERS) {                                                                                           \
        apply_gradient<SCOPE, THREADS, VECS_PER_THREAD>(                                                              \
            OF(x), OF(dy), OF(dx), mean, rstd, MEAN_LO, Affine{weight, BIAS, flags}, EPILOGUE_OF, merged_mean_lo,     \
            sum_dy, sum_dy_xhat, TILES_OF);                                                                           \
    }
#if EPILOGUE
#define MOMENTS(NAME, SCOPE, THREADS, VECS_PER_THREAD, BLOCKS)       // the plain module has it
#else
#define MOMENTS(NAME, SCOPE, THREADS, VECS_PER_THREAD, BLOCKS)                                                        \
    KERNEL(THREADS, BLOCKS) moments_##NAME(TENSOR(x), long long* counts, Accum* means, Accum* m2,                     \
                                           TILES_PARAMETERS) {                                                        \
        moments<SCOPE, THREADS, VECS_PER_THREAD>(OF(x), counts, means, m2, TILES_OF);                                 \
    }
#endif
VARIANTS

#if !EPILOGUE
constexpr int MERGE_THREADS = 256;

// Merge one T of each thread of the block, as a tree in shared memory, and return the result.
template <class T, class F> __device__ inline T merge_over_block(const T& mine, T* slots, F merge) {
    slots[threadIdx.x] = mine;
    __syncthreads();
    for (int width = MERGE_THREADS / 2; width > 0; width /= 2) {
        if (threadIdx.x < width) slots[threadIdx.x] = merge(slots[threadIdx.x], slots[threadIdx.x + width]);
        __syncthreads();
    }
    return slots[0];
}

// Compute mean, rstd and mean_lo for apply; mean + mean_lo is exact to twice Math's digits. variance may be null.
KERNEL(MERGE_THREADS, 1) merge_moments(const long long* counts, const Accum* means, const Accum* m2,
                                       long long tiles, long long first, long long planes, double eps, Math* mean,
                                       Math* rstd, Math* mean_lo, Math* variance) {
    unsigned char* shared = shared_memory();
    const long long plane = first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= first + planes) return;
    Moments mine = {0, 0, 0};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) {
        const long long at = plane * tiles + tile;
        mine = merge(mine, Moments{load(counts + at), load(means + at), load(m2 + at)});
    }
    const Moments all = merge_over_block(mine, (Moments*)shared, [](const Moments& a, const Moments& b) {
        return merge(a, b);
    });
    if (threadIdx.x != 0) return;
    const Math rounded = (Math)all.mean;
    store(mean + plane, rounded);
    store(mean_lo + plane, (Math)(all.mean - rounded));
    store(rstd + plane, rstd_of(all.m2 / all.count + eps));
    if (variance) store(variance + plane, (Math)(all.m2 / (all.count - 1)));
}

struct ThreeSums { Accum dy, dy_xmu, xmu; };

// Training: sum_dy, sum_dy_xhat and mean_lo from the partials of gradient_*. Tracked eval (mean_lo null): the partials
// of frozen_backward_* are sum(dy) and sum(dy * xhat) already, and are only added up. If the sums are gradients
// themselves, they are also written to dbias and dweight. Each pointer may be null.
KERNEL(MERGE_THREADS, 1) merge_gradient(const Math* partial, long long all_planes, long long tiles, long long first,
                                        long long planes, long long spatial, Math* sum_dy, Math* sum_dy_xhat,
                                        Math* mean_lo, void* dbias, void* dweight, int flags) {
    unsigned char* shared = shared_memory();
    const long long plane = first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= first + planes) return;
    ThreeSums mine = {0, 0, 0};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) {
        const Math* at = partial + plane * tiles + tile;
        mine.dy += load(at);
        mine.dy_xmu += load(at + all_planes * tiles);
        if (mean_lo) mine.xmu += load(at + 2 * all_planes * tiles);
    }
    const ThreeSums all = merge_over_block(mine, (ThreeSums*)shared, [](const ThreeSums& a, const ThreeSums& b) {
        return ThreeSums{a.dy + b.dy, a.dy_xmu + b.dy_xmu, a.xmu + b.xmu};
    });
    if (threadIdx.x != 0) return;
    Math dot = (Math)all.dy_xmu;
    if (mean_lo) {
        const Accum mean_xmu = all.xmu / spatial;
        store(mean_lo + plane, (Math)mean_xmu);
        dot = (Math)(all.dy_xmu - mean_xmu * all.dy);
    }
    Sums{sum_dy, sum_dy_xhat, 0}.set(plane, (Math)all.dy, dot);
    Sums{dbias, dweight, flags}.set(plane, (Math)all.dy, dot);
}
#endif
