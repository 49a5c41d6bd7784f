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

struct MomentsArguments {
    Tensor x;
    long long* counts;
    Accum *means, *m2;
    Tiles tiles;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void moments(const MomentsArguments& call) {
    unsigned char* shared = shared_memory();
    const Tiles& tiles = call.tiles;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, call.x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
        Math* scratch = (Math*)shared;
        Math* other = scratch + scratch_size<THREADS>(partition.channel_vecs, 2 * P);
        const MomentsOfThread m = moments_of_tile<SCOPE>(partition, call.x, tile, VECS_PER_THREAD, scratch, other);
        partition.each_plane(tiles.channels, [&](int p, long long i) {
            const long long at = i * tiles.tiles + partition.tile;
            store(call.counts + at, (long long)partition.count());
            store(call.means + at, (Accum)m.mean[p] + (Accum)m.mean_lo[p]);
            store(call.m2 + at, wide_m2(m.scaled_m2[p]));
        });
    });
}

struct ApplyArguments {
    Tensor x, y;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    Tiles tiles;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void apply(ApplyArguments call) {
    if (!EPILOGUE) call.epilogue = {};      // constant, as in forward.cu
    const Tiles& tiles = call.tiles;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, call.y, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineOfThread affine(partition, call.affine, tiles.channels);
        Normalization to;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long i = partition.n * tiles.channels + partition.c + p;
            const bool exists = partition.c + p < tiles.channels;
            to.set(p, exists ? load(call.mean + i) : 0, exists ? load(call.mean_lo + i) : 0,
                   exists ? load(call.rstd + i) : 0, affine);
        }
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
        tile.read(partition, call.x, 0);
        const Math slope = (Math)call.epilogue.slope;
        write_tile(partition, call.y, tile, VECS_PER_THREAD, call.epilogue.residual,
                   [&](int p, Math value, Math residual) {
            return activated(to.z(p, value), residual, slope);
        });
    });
}

struct GradientArguments {
    Tensor x, dy;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;
    Math* partials;
    long long all_planes;
    Tiles tiles;
};

// If there is a dresidual, it is written here, and replaces dy from then on.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void gradient(GradientArguments call) {
    if (!EPILOGUE) {
        call.epilogue = {};
        call.dresidual = {};
        call.mean_lo = 0;
        call.affine.bias = 0;
    }
    unsigned char* shared = shared_memory();
    const Tiles& tiles = call.tiles;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, call.x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        const AffineStats stat(partition, true, call.mean, call.mean_lo, call.rstd, call.affine, tiles.channels);
        Math sums[3 * P];
        gradient_sums<SCOPE>(partition, call.x, call.dy, call.epilogue, call.dresidual, tile_x, tile_dy,
                             VECS_PER_THREAD, stat, sums, (Math*)shared);
        partition.each_plane(tiles.channels, [&](int p, long long i) {
            #pragma unroll
            for (int q = 0; q < 3; q++) {
                store(call.partials + (q * call.all_planes + i) * tiles.tiles + partition.tile, sums[q * P + p]);
            }
        });
    });
}

// merged_mean_lo: mean_lo times rstd, as merged from all tiles.
struct ApplyGradientArguments {
    Tensor x, dy, dx;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    const Math *merged_mean_lo, *sum_dy, *sum_dy_xhat;
    Tiles tiles;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void apply_gradient(ApplyGradientArguments call) {
    if (!EPILOGUE) {
        call.epilogue = {};
        call.mean_lo = 0;
        call.affine.bias = 0;
    }
    const Tiles& tiles = call.tiles;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, call.dx, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineStats stat(partition, true, call.mean, call.mean_lo, call.rstd, call.affine, tiles.channels);
        Gradient g;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const bool exists = partition.c + p < tiles.channels;
            const long long i = partition.n * tiles.channels + partition.c + p;
            g.set(p, exists ? load(call.sum_dy + i) : 0, exists ? load(call.sum_dy_xhat + i) : 0,
                  exists ? load(call.merged_mean_lo + i) : 0, (Math)tiles.spatial, stat);
        }
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        tile_x.read(partition, call.x, 0);
        tile_dy.read(partition, call.dy, 0);
        if (EPILOGUE) {
            apply_epilogue(partition, Epilogue{{}, call.epilogue.slope}, Tensor{}, tile_x, tile_dy, 0, stat, [](int, Math, Math) {});
        }
        write_tile(partition, call.dx, tile_x, tile_dy, VECS_PER_THREAD,
                   [&](int p, Math x_, Math dy_) { return g.dx(p, x_, dy_, stat); });
    });
}

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
struct MergeMomentsArguments {
    const long long* counts;
    const Accum *means, *m2;
    long long tiles, first, planes;
    double eps;
    Math *mean, *rstd, *mean_lo, *variance;
};

KERNEL(MERGE_THREADS, 1) merge_moments(MergeMomentsArguments call) {
    unsigned char* shared = shared_memory();
    const long long plane = call.first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= call.first + call.planes) return;
    Moments mine = {0, 0, 0};
    for (long long tile = threadIdx.x; tile < call.tiles; tile += MERGE_THREADS) {
        const long long at = plane * call.tiles + tile;
        mine = merge(mine, Moments{load(call.counts + at), load(call.means + at), load(call.m2 + at)});
    }
    const Moments all = merge_over_block(mine, (Moments*)shared, [](const Moments& a, const Moments& b) {
        return merge(a, b);
    });
    if (threadIdx.x != 0) return;
    const Math rounded = (Math)all.mean;
    store(call.mean + plane, rounded);
    store(call.mean_lo + plane, (Math)(all.mean - rounded));
    store(call.rstd + plane, rstd_of(all.m2 / all.count + call.eps));
    if (call.variance) store(call.variance + plane, (Math)(all.m2 / (all.count - 1)));
}

struct ThreeSums { Accum dy, dy_xmu, xmu; };

struct MergeGradientArguments {
    const Math* partials;
    long long all_planes, tiles, first, planes, spatial;
    Math *sum_dy, *sum_dy_xhat, *merged_mean_lo;
    Sums sums;                      // dbias and dweight, if they have one number per plane
};

// Training: sum_dy, sum_dy_xhat and merged_mean_lo from the partials of gradient_*. Tracked eval (that null): the partials
// of frozen_backward_* are sum(dy) and sum(dy * xhat) already, and are only added up. If the sums are gradients
// themselves, they are also written to dbias and dweight. Each pointer may be null.
KERNEL(MERGE_THREADS, 1) merge_gradient(MergeGradientArguments call) {
    unsigned char* shared = shared_memory();
    const long long plane = call.first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= call.first + call.planes) return;
    ThreeSums mine = {0, 0, 0};
    for (long long tile = threadIdx.x; tile < call.tiles; tile += MERGE_THREADS) {
        const Math* at = call.partials + plane * call.tiles + tile;
        mine.dy += load(at);
        mine.dy_xmu += load(at + call.all_planes * call.tiles);
        if (call.merged_mean_lo) mine.xmu += load(at + 2 * call.all_planes * call.tiles);
    }
    const ThreeSums all = merge_over_block(mine, (ThreeSums*)shared, [](const ThreeSums& a, const ThreeSums& b) {
        return ThreeSums{a.dy + b.dy, a.dy_xmu + b.dy_xmu, a.xmu + b.xmu};
    });
    if (threadIdx.x != 0) return;
    Math dot = (Math)all.dy_xmu;
    if (call.merged_mean_lo) {
        const Accum mean_xmu = all.xmu / call.spatial;
        store(call.merged_mean_lo + plane, (Math)mean_xmu);
        dot = (Math)(all.dy_xmu - mean_xmu * all.dy);
    }
    Sums{call.sum_dy, call.sum_dy_xhat, 0}.set(plane, (Math)all.dy, dot);
    call.sums.set(plane, (Math)all.dy, dot);
}
#endif
