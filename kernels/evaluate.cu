// Tracked eval: the running statistics are given, so each element is read once and written once, for planes of any size.
//
//     evaluate_*        y = (x - running_mean) * (rstd * weight) + bias; saves mean and rstd for the backward
//     eval_gradient_*   dx = dy * weight * rstd, since the statistics are constants, and in the same pass the two sums
//                       of the affine gradients, a partial for each tile
//
// Macros as in forward.cu; an owner serves one tile of CHUNKS packs a thread.

#include "types.cuh"
#include "plane.cuh"
#include "sums.cuh"
#include "gradient.cuh"

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void evaluate(const Tensor& x, const Tensor& y, const void* running_mean, const void* running_var,
                                const void* weight, const void* bias, int wide, Math* mean, Math* rstd, double eps,
                                long long channels, long long spatial, long long owners, long long tiles, int lanes) {
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owner, tiles, CHUNKS, lanes, x, channels, spatial);
    Math center[P], inverse[P], scale[P], shift[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const long long c = share.c + p < channels ? share.c + p : 0;
        center[p] = load_parameter(running_mean, wide & WIDE_RUNNING_MEAN, c);
        inverse[p] = reciprocal_sqrt(load_parameter(running_var, wide & WIDE_RUNNING_VAR, c) + (Math)eps);
        scale[p] = weight ? inverse[p] * load_parameter(weight, wide & WIDE_WEIGHT, c) : inverse[p];
        shift[p] = bias ? load_parameter(bias, wide & WIDE_BIAS, c) : 0;
    }
    if (mean && share.tile == 0) share.each_plane(channels, [&](int p, long long i) {
        store(mean + i, center[p]);
        store(rstd + i, inverse[p]);
    });
    Rest<REGISTERS, THREADS, CHUNKS> rest;
    rest.read(share, x, 0);
    write_tile(share, y, rest, CHUNKS, [&](int p, Math value) { return (value - center[p]) * scale[p] + shift[p]; });
}

// partial, [2][plane][tile], may be null: then x is not read at all.
template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void eval_gradient(const Tensor& x, const Tensor& dy, const Tensor& dx, const Math* mean,
                                     const Math* rstd, const void* weight, int wide, Math* partial, long long planes,
                                     long long channels, long long spatial, long long owners, long long tiles,
                                     int lanes) {
    unsigned char* shared = shared_memory();
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owner, tiles, CHUNKS, lanes, dy, channels, spatial);
    const Statistics stat(share, mean, rstd, weight, wide, channels);
    Rest<REGISTERS, THREADS, CHUNKS> rest_x, rest_dy;
    if (partial) rest_x.read(share, x, 0);
    rest_dy.read(share, dy, 0);
    write_tile(share, dx, rest_dy, CHUNKS, [&](int p, Math dy_) { return dy_ * (stat.rstd[p] * stat.weight[p]); });
    if (!partial) return;

    Math s_dy[V] = {}, s_dyx[V] = {};
    const auto add_one = [&](int v, Storage x_, Storage dy_) {
        const int p = plane_of(v);
        s_dy[v] += widen(dy_);
        s_dyx[v] += widen(dy_) * ((widen(x_) - stat.mean[p]) * stat.rstd[p]);
    };
    rest_dy.each(CHUNKS, [&](int k) {
        if (!share.holds(k)) return;
        const Pack a = rest_x.get(k), b = rest_dy.get(k);
        #pragma unroll
        for (int v = 0; v < V; v++) add_one(v, a.v[v], b.v[v]);
    });
    if (Owner::edges && share.edge >= 0) add_one(0, rest_x.edge, rest_dy.edge);
    Math sums[2 * P];
    fold(s_dy, sums);
    fold(s_dyx, sums + P);
    sum_over_owner<OWNER, THREADS>(sums, share.lanes, (Math*)shared);
    share.each_plane(channels, [&](int p, long long i) {
        store(partial + i * tiles + share.tile, sums[p]);
        store(partial + (planes + i) * tiles + share.tile, sums[P + p]);
    });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS)                                                              \
    KERNEL(THREADS, BLOCKS) evaluate_##NAME(                                                                          \
        Storage* x, long long xn, long long xc, long long xs, Storage* y, long long yn, long long yc, long long ys,   \
        const void* running_mean, const void* running_var, const void* weight, const void* bias, int wide,            \
        Math* mean, Math* rstd, double eps, long long channels, long long spatial, long long owners,                  \
        long long tiles, int lanes) {                                                                                 \
        evaluate<OWNER, THREADS, CHUNKS>(Tensor{x, xn, xc, xs}, Tensor{y, yn, yc, ys}, running_mean, running_var,     \
                                         weight, bias, wide, mean, rstd, eps, channels, spatial, owners, tiles,       \
                                         lanes);                                                                      \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) eval_gradient_##NAME(                                                                     \
        Storage* x, long long xn, long long xc, long long xs, Storage* dy, long long dyn, long long dyc,              \
        long long dys, Storage* dx, long long dxn, long long dxc, long long dxs, const Math* mean, const Math* rstd,  \
        const void* weight, int wide, Math* partial, long long planes, long long channels, long long spatial,         \
        long long owners, long long tiles, int lanes) {                                                               \
        eval_gradient<OWNER, THREADS, CHUNKS>(                                                                        \
            Tensor{x, xn, xc, xs}, Tensor{dy, dyn, dyc, dys}, Tensor{dx, dxn, dxc, dxs}, mean, rstd, weight, wide,    \
            partial, planes, channels, spatial, owners, tiles, lanes);                                                \
    }
LADDER
