// Split: a plane of any size, over as many blocks as it has tiles. Three steps, each with a contract of its own:
//
//     partial   moments_* / gradient_*     one owner a tile      -> count, mean, squares / three sums of the tile
//     merge     merge_moments / _gradient  one block a plane     -> mean, rstd, delta / sum_dy, sum_dy_xhat, delta
//     apply     apply_* / apply_gradient_*  one owner a tile      -> y / dx, tiles in reverse: the last read are in L2
//
// The three are launched for some stripes at a time, [first, first + stripes): as many as L2 holds.
// Partials lie as [quantity][plane][tile]; the merge goes through them in an order fixed by their number alone.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "tiles.cuh"

// Moments of `count` values: squares is the sum of their squared distances from their mean.
struct Merged {
    long long count;
    Accum mean, squares;
};

// Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1, about the pooled mean.
__device__ inline Merged chan(const Merged& a, const Merged& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const Accum distance = b.mean - a.mean, share = (Accum)b.count / (Accum)(a.count + b.count);
    return {a.count + b.count, a.mean + distance * share,
            a.squares + b.squares + distance * distance * ((Accum)a.count * share)};
}

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void moments(const Tensor& x, long long* counts, Accum* means, Accum* squares, const Tiles& tiles) {
    unsigned char* shared = shared_memory();
    each_tile<OWNER, THREADS, CHUNKS>(tiles, x, false, [&](const Share<OWNER, THREADS>& share) {
        Rest<REGISTERS, THREADS, CHUNKS> rest;
        Math* scratch = (Math*)shared;
        Math* other = scratch + scratch_size<THREADS>(share.lanes, 2 * P);
        const Moments m = moments_of_tile<OWNER>(share, x, rest, CHUNKS, scratch, other);
        share.each_plane(tiles.channels, [&](int p, long long i) {
            const long long at = i * tiles.tiles + share.tile;
            store(counts + at, (long long)share.count());
            store(means + at, (Accum)m.mean[p] + (Accum)m.delta[p]);
            store(squares + at, wide_squares(m.squares[p]));
        });
    });
}

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void apply(const Tensor& x, const Tensor& y, const Math* mean, const Math* rstd, const Math* delta,
                             const Affine& parameters, const Epilogue& epilogue, const Tiles& tiles) {
    each_tile<OWNER, THREADS, CHUNKS>(tiles, y, true, [&](const Share<OWNER, THREADS>& share) {
        const AffineOfThread affine(share, parameters, tiles.channels);
        Normalization to;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long i = share.n * tiles.channels + share.c + p;
            const bool exists = share.c + p < tiles.channels;
            to.set(p, exists ? load(mean + i) : 0, exists ? load(delta + i) : 0, exists ? load(rstd + i) : 0, affine);
        }
        Rest<REGISTERS, THREADS, CHUNKS> rest;
        rest.read(share, x, 0);
        write_tile(share, y, rest, CHUNKS, epilogue.residual, [&](int p, Math value, Math residual) {
            return activated(to.z(p, value), residual, epilogue.slope);
        });
    });
}

// dresidual, if there is one, is written here, and takes the place of dy from then on.
template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void gradient(const Tensor& x, const Tensor& dy, const Math* mean, const Math* rstd, const Math* delta,
                                const Affine& affine, const Epilogue& epilogue, const Tensor& dresidual, Math* partial,
                                long long planes, const Tiles& tiles) {
    unsigned char* shared = shared_memory();
    each_tile<OWNER, THREADS, CHUNKS>(tiles, x, false, [&](const Share<OWNER, THREADS>& share) {
        Rest<REGISTERS, THREADS, CHUNKS> rest_x, rest_dy;
        const Statistics stat(share, true, mean, delta, rstd, affine, tiles.channels);
        Math sums[3 * P];
        gradient_sums<OWNER>(share, x, dy, epilogue, dresidual, rest_x, rest_dy, CHUNKS, stat, sums, (Math*)shared);
        share.each_plane(tiles.channels, [&](int p, long long i) {
            #pragma unroll
            for (int q = 0; q < 3; q++) store(partial + (q * planes + i) * tiles.tiles + share.tile, sums[q * P + p]);
        });
    });
}

// more: what the merge found that the mean still lacks.
template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void apply_gradient(const Tensor& x, const Tensor& dy, const Tensor& dx, const Math* mean,
                                      const Math* rstd, const Math* delta, const Affine& affine,
                                      const Epilogue& epilogue, const Math* more, const Math* sum_dy,
                                      const Math* sum_dy_xhat, const Tiles& tiles) {
    each_tile<OWNER, THREADS, CHUNKS>(tiles, dx, true, [&](const Share<OWNER, THREADS>& share) {
        const Statistics stat(share, true, mean, delta, rstd, affine, tiles.channels);
        Gradient g;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const bool exists = share.c + p < tiles.channels;
            const long long i = share.n * tiles.channels + share.c + p;
            g.set(p, exists ? load(sum_dy + i) : 0, exists ? load(sum_dy_xhat + i) : 0, exists ? load(more + i) : 0,
                  (Math)tiles.spatial, stat);
        }
        Rest<REGISTERS, THREADS, CHUNKS> rest_x, rest_dy;
        rest_x.read(share, x, 0);
        rest_dy.read(share, dy, 0);
        if (EPILOGUE) {
            apply_epilogue(share, epilogue, Tensor{}, rest_x, rest_dy, 0, stat, [](int, Math, Math) {});
        }
        write_tile(share, dx, rest_x, rest_dy, CHUNKS, [&](int p, Math x_, Math dy_) { return g.dx(p, x_, dy_, stat); });
    });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS, CLUSTER_SIZE)                                                \
    MOMENTS(NAME, OWNER, THREADS, CHUNKS, BLOCKS)                                                                     \
    KERNEL(THREADS, BLOCKS) apply_##NAME(                                                                             \
        TENSOR(x), TENSOR(y), const Math* mean, const Math* rstd, const Math* delta_, const void* weight,             \
        const void* bias_, int flags, EPILOGUE_PARAMETERS TILES_PARAMETERS) {                                         \
        apply<OWNER, THREADS, CHUNKS>(OF(x), OF(y), mean, rstd, delta_, Affine{weight, bias_, flags}, EPILOGUE_OF,    \
                                      TILES_OF);                                                                      \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) gradient_##NAME(                                                                          \
        TENSOR(x), TENSOR(dy), const Math* mean, const Math* rstd, const void* weight, int flags, GRADIENT_PARAMETERS \
        Math* partial, long long planes, TILES_PARAMETERS) {                                                          \
        gradient<OWNER, THREADS, CHUNKS>(OF(x), OF(dy), mean, rstd, DELTA, Affine{weight, BIAS, flags}, EPILOGUE_OF,  \
                                         DRESIDUAL, partial, planes, TILES_OF);                                       \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) apply_gradient_##NAME(                                                                    \
        TENSOR(x), TENSOR(dy), TENSOR(dx), const Math* mean, const Math* rstd, const void* weight, int flags,         \
        GRADIENT_PARAMETERS const Math* more, const Math* sum_dy, const Math* sum_dy_xhat, TILES_PARAMETERS) {        \
        apply_gradient<OWNER, THREADS, CHUNKS>(OF(x), OF(dy), OF(dx), mean, rstd, DELTA, Affine{weight, BIAS, flags}, \
                                               EPILOGUE_OF, more, sum_dy, sum_dy_xhat, TILES_OF);                     \
    }
#if EPILOGUE
#define MOMENTS(NAME, OWNER, THREADS, CHUNKS, BLOCKS)       // the plain module has it
#else
#define MOMENTS(NAME, OWNER, THREADS, CHUNKS, BLOCKS)                                                                 \
    KERNEL(THREADS, BLOCKS) moments_##NAME(TENSOR(x), long long* counts, Accum* means, Accum* squares,                \
                                           TILES_PARAMETERS) {                                                        \
        moments<OWNER, THREADS, CHUNKS>(OF(x), counts, means, squares, TILES_OF);                                     \
    }
#endif
LADDER

#if !EPILOGUE
constexpr int MERGE_THREADS = 256;

// The block's tree over one T a thread, all of them in shared memory; thread 0 leaves with the whole.
template <class T, class F> __device__ inline T merge_over_block(const T& mine, T* slots, F merge) {
    slots[threadIdx.x] = mine;
    __syncthreads();
    for (int width = MERGE_THREADS / 2; width > 0; width /= 2) {
        if (threadIdx.x < width) slots[threadIdx.x] = merge(slots[threadIdx.x], slots[threadIdx.x + width]);
        __syncthreads();
    }
    return slots[0];
}

// mean, rstd, delta: what apply needs, mean + delta being exact to twice the digits of Math. variance may be null.
KERNEL(MERGE_THREADS, 1) merge_moments(const long long* counts, const Accum* means, const Accum* squares,
                                       long long tiles, long long first, long long planes, double eps, Math* mean,
                                       Math* rstd, Math* delta, Math* variance) {
    unsigned char* shared = shared_memory();
    const long long plane = first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= first + planes) return;
    Merged mine = {0, 0, 0};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) {
        const long long at = plane * tiles + tile;
        mine = chan(mine, Merged{load(counts + at), load(means + at), load(squares + at)});
    }
    const Merged all = merge_over_block(mine, (Merged*)shared, [](const Merged& a, const Merged& b) {
        return chan(a, b);
    });
    if (threadIdx.x != 0) return;
    const Math rounded = (Math)all.mean;
    store(mean + plane, rounded);
    store(delta + plane, (Math)(all.mean - rounded));
    store(rstd + plane, rstd_of(all.squares / all.count + eps));
    if (variance) store(variance + plane, (Math)(all.squares / (all.count - 1)));
}

struct ThreeSums { Accum dy, dyc, c; };

// Training: sum_dy, sum_dy_xhat and delta from the partials of gradient_*. Tracked eval (delta null): the partials of
// eval_gradient_* are sum(dy) and sum(dy * xhat) already, and only need adding up. The sums may also be wanted where
// they are gradients (dbias, dweight); each pointer may be null.
KERNEL(MERGE_THREADS, 1) merge_gradient(const Math* partial, long long all_planes, long long tiles, long long first,
                                        long long planes, long long spatial, Math* sum_dy, Math* sum_dy_xhat,
                                        Math* delta, void* dbias, void* dweight, int flags) {
    unsigned char* shared = shared_memory();
    const long long plane = first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= first + planes) return;
    ThreeSums mine = {0, 0, 0};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) {
        const Math* at = partial + plane * tiles + tile;
        mine.dy += load(at);
        mine.dyc += load(at + all_planes * tiles);
        if (delta) mine.c += load(at + 2 * all_planes * tiles);
    }
    const ThreeSums all = merge_over_block(mine, (ThreeSums*)shared, [](const ThreeSums& a, const ThreeSums& b) {
        return ThreeSums{a.dy + b.dy, a.dyc + b.dyc, a.c + b.c};
    });
    if (threadIdx.x != 0) return;
    Math dot = (Math)all.dyc;
    if (delta) {
        const Accum mean_c = all.c / spatial;
        store(delta + plane, (Math)mean_c);
        dot = (Math)(all.dyc - mean_c * all.dy);
    }
    Sums{sum_dy, sum_dy_xhat, 0}.set(plane, (Math)all.dy, dot);
    Sums{dbias, dweight, flags}.set(plane, (Math)all.dy, dot);
}
#endif
