// Split: a plane of any size, over as many blocks as it has tiles. Three steps, each with a contract of its own:
//
//     partial   moments_* / gradient_*     one owner a tile      -> count, mean, squares / three sums of the tile
//     merge     merge_moments / _gradient  one block a plane     -> mean, rstd, delta / sum_dy, sum_dy_xhat, delta
//     apply     apply_* / apply_gradient_*  one owner a tile      -> y / dx, tiles in reverse: the last read are in L2
//
// Partials lie as [quantity][plane][tile]; the merge goes through them in an order fixed by their number alone.

#include "types.cuh"
#include "plane.cuh"
#include "sums.cuh"
#include "moments.cuh"
#include "gradient.cuh"

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
__device__ inline void moments(const Tensor& x, long long* counts, Accum* means, Accum* squares, long long channels,
                               long long spatial, long long owners, long long tiles, int lanes) {
    unsigned char* shared = shared_memory();
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owner, tiles, CHUNKS, lanes, x, channels, spatial);
    Rest<REGISTERS, THREADS, CHUNKS> rest;
    const Moments m = moments_of_tile<OWNER>(share, x, rest, CHUNKS, (Math*)shared);
    share.each_plane(channels, [&](int p, long long i) {
        const long long at = i * tiles + share.tile;
        store(counts + at, (long long)share.count());
        store(means + at, (Accum)m.mean[p] + (Accum)m.delta[p]);
        store(squares + at, (Accum)m.squares[p]);
    });
}

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void apply(const Tensor& x, const Tensor& y, const Math* mean, const Math* rstd, const Math* delta,
                             const void* weight, const void* bias, int wide, long long channels, long long spatial,
                             long long owners, long long tiles, int lanes) {
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owners - 1 - owner, tiles, CHUNKS, lanes, x, channels, spatial);
    const Statistics stat(share, mean, rstd, weight, wide, channels);
    Math correction[P], scale[P], shift[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const long long c = share.c + p;
        const bool exists = c < channels;
        correction[p] = exists ? load(delta + share.n * channels + c) : 0;
        scale[p] = stat.rstd[p] * stat.weight[p];
        shift[p] = bias && exists ? load_parameter(bias, wide & WIDE_BIAS, c) : 0;
    }
    Rest<REGISTERS, THREADS, CHUNKS> rest;
    rest.read(share, x, 0);
    write_tile(share, y, rest, CHUNKS, [&](int p, Math value) {
        return ((value - stat.mean[p]) - correction[p]) * scale[p] + shift[p];
    });
}

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void gradient(const Tensor& x, const Tensor& dy, const Math* mean, const Math* rstd, Math* partial,
                                long long planes, long long channels, long long spatial, long long owners,
                                long long tiles, int lanes) {
    unsigned char* shared = shared_memory();
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owner, tiles, CHUNKS, lanes, x, channels, spatial);
    Rest<REGISTERS, THREADS, CHUNKS> rest_x, rest_dy;
    const Statistics stat(share, mean, rstd, 0, 0, channels);
    Math sums[3 * P];
    gradient_sums<OWNER>(share, x, dy, rest_x, rest_dy, CHUNKS, stat, sums, (Math*)shared);
    share.each_plane(channels, [&](int p, long long i) {
        #pragma unroll
        for (int q = 0; q < 3; q++) store(partial + (q * planes + i) * tiles + share.tile, sums[q * P + p]);
    });
}

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void apply_gradient(const Tensor& x, const Tensor& dy, const Tensor& dx, const Math* mean,
                                      const Math* rstd, const Math* delta, const void* weight, int wide,
                                      const Math* sum_dy, const Math* sum_dy_xhat, long long channels,
                                      long long spatial, long long owners, long long tiles, int lanes) {
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owners - 1 - owner, tiles, CHUNKS, lanes, x, channels, spatial);
    const Statistics stat(share, mean, rstd, weight, wide, channels);
    Gradient g;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const bool exists = share.c + p < channels;
        const long long i = share.n * channels + share.c + p;
        g.set(p, exists ? load(sum_dy + i) : 0, exists ? load(sum_dy_xhat + i) : 0, exists ? load(delta + i) : 0,
              (Math)spatial);
    }
    Rest<REGISTERS, THREADS, CHUNKS> rest_x, rest_dy;
    rest_x.read(share, x, 0);
    rest_dy.read(share, dy, 0);
    write_tile(share, dx, rest_x, rest_dy, CHUNKS, [&](int p, Math x_, Math dy_) { return g.dx(p, x_, dy_, stat); });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS)                                                              \
    KERNEL(THREADS, BLOCKS) moments_##NAME(                                                                           \
        Storage* x, long long xn, long long xc, long long xs, long long* counts, Accum* means, Accum* squares,        \
        long long channels, long long spatial, long long owners, long long tiles, int lanes) {                        \
        moments<OWNER, THREADS, CHUNKS>(Tensor{x, xn, xc, xs}, counts, means, squares, channels, spatial, owners,     \
                                        tiles, lanes);                                                                \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) apply_##NAME(                                                                             \
        Storage* x, long long xn, long long xc, long long xs, Storage* y, long long yn, long long yc, long long ys,   \
        const Math* mean, const Math* rstd, const Math* delta, const void* weight, const void* bias, int wide,        \
        long long channels, long long spatial, long long owners, long long tiles, int lanes) {                        \
        apply<OWNER, THREADS, CHUNKS>(Tensor{x, xn, xc, xs}, Tensor{y, yn, yc, ys}, mean, rstd, delta, weight, bias,  \
                                      wide, channels, spatial, owners, tiles, lanes);                                 \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) gradient_##NAME(                                                                          \
        Storage* x, long long xn, long long xc, long long xs, Storage* dy, long long dyn, long long dyc,              \
        long long dys, const Math* mean, const Math* rstd, Math* partial, long long planes, long long channels,       \
        long long spatial, long long owners, long long tiles, int lanes) {                                            \
        gradient<OWNER, THREADS, CHUNKS>(Tensor{x, xn, xc, xs}, Tensor{dy, dyn, dyc, dys}, mean, rstd, partial,       \
                                         planes, channels, spatial, owners, tiles, lanes);                            \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) apply_gradient_##NAME(                                                                    \
        Storage* x, long long xn, long long xc, long long xs, Storage* dy, long long dyn, long long dyc,              \
        long long dys, Storage* dx, long long dxn, long long dxc, long long dxs, const Math* mean, const Math* rstd,  \
        const Math* delta, const void* weight, int wide, const Math* sum_dy, const Math* sum_dy_xhat,                 \
        long long channels, long long spatial, long long owners, long long tiles, int lanes) {                        \
        apply_gradient<OWNER, THREADS, CHUNKS>(                                                                       \
            Tensor{x, xn, xc, xs}, Tensor{dy, dyn, dyc, dys}, Tensor{dx, dxn, dxc, dxs}, mean, rstd, delta, weight,   \
            wide, sum_dy, sum_dy_xhat, channels, spatial, owners, tiles, lanes);                                      \
    }
LADDER

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
                                       long long tiles, long long planes, double eps, Math* mean, Math* rstd,
                                       Math* delta, Math* variance) {
    unsigned char* shared = shared_memory();
    const long long plane = blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= planes) return;
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
    store(rstd + plane, (Math)(1 / sqrt(all.squares / all.count + eps)));
    if (variance) store(variance + plane, (Math)(all.squares / (all.count - 1)));
}

struct ThreeSums { Accum dy, dyc, c; };

// Training: sum_dy, sum_dy_xhat and delta from the partials of gradient_*. Tracked eval (delta null): the partials of
// eval_gradient_* are sum(dy) and sum(dy * xhat) already, and only need adding up.
KERNEL(MERGE_THREADS, 1) merge_gradient(const Math* partial, long long tiles, long long planes, long long spatial,
                                        const Math* rstd, Math* sum_dy, Math* sum_dy_xhat, Math* delta) {
    unsigned char* shared = shared_memory();
    const long long plane = blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= planes) return;
    ThreeSums mine = {0, 0, 0};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) {
        const Math* at = partial + plane * tiles + tile;
        mine.dy += load(at);
        mine.dyc += load(at + planes * tiles);
        if (delta) mine.c += load(at + 2 * planes * tiles);
    }
    const ThreeSums all = merge_over_block(mine, (ThreeSums*)shared, [](const ThreeSums& a, const ThreeSums& b) {
        return ThreeSums{a.dy + b.dy, a.dyc + b.dyc, a.c + b.c};
    });
    if (threadIdx.x != 0) return;
    store(sum_dy + plane, (Math)all.dy);
    if (delta) {
        const Accum mean_c = all.c / spatial;
        store(delta + plane, (Math)mean_c);
        store(sum_dy_xhat + plane, (Math)((all.dyc - mean_c * all.dy) * load(rstd + plane)));
    } else store(sum_dy_xhat + plane, (Math)all.dyc);
}
