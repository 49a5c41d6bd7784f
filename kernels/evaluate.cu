// Tracked eval: the running statistics are given, so each element is read once and written once, for planes of any size.
//
//     evaluate_*        y = activation((x - running_mean) * (rstd * weight) + bias + residual); saves mean and rstd
//     eval_gradient_*   dx = g * weight * rstd, since the statistics are constants, and in the same pass the two sums
//                       of the affine gradients, for each tile ([plane][tile]) where there are several
//
// Macros as in forward.cu; an owner serves one tile of CHUNKS packs a thread.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void evaluate(const Tensor& x, const Tensor& y, const void* running_mean, const void* running_var,
                                const Affine& parameters, const Epilogue& epilogue, Math* mean, Math* rstd, double eps,
                                long long channels, long long spatial, long long owners, long long tiles, int lanes) {
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owner, tiles, CHUNKS, lanes, y, channels, spatial);
    const AffineOfThread affine(share, parameters, channels);
    Math center[P], inverse[P], scale[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const long long c = share.exists(channels) ? share.c + p : 0;
        center[p] = load_parameter(running_mean, parameters.flags & WIDE_RUNNING_MEAN, c);
        inverse[p] = reciprocal_sqrt(load_parameter(running_var, parameters.flags & WIDE_RUNNING_VAR, c) + (Math)eps);
        scale[p] = inverse[p] * affine.weight[p];
    }
    if (mean && share.tile == 0) share.each_plane(channels, [&](int p, long long i) {
        store(mean + i, center[p]);
        store(rstd + i, inverse[p]);
    });
    Rest<REGISTERS, THREADS, CHUNKS> rest;
    rest.read(share, x, 0);
    write_tile(share, y, rest, CHUNKS, epilogue.residual, [&](int p, Math value, Math residual) {
        return activated((value - center[p]) * scale[p] + affine.bias[p], residual, epilogue.slope);
    });
}

// Without sums x is read only if there is an epilogue.
template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void eval_gradient(const Tensor& x, const Tensor& dy, const Tensor& dx, const Math* mean,
                                     const Math* rstd, const Affine& affine, const Epilogue& epilogue,
                                     const Tensor& dresidual, const Sums& results, long long channels,
                                     long long spatial, long long owners, long long tiles, int lanes) {
    unsigned char* shared = shared_memory();
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owner, tiles, CHUNKS, lanes, dx, channels, spatial);
    const Statistics stat(share, false, mean, 0, rstd, affine, channels);
    const bool summed = results.dy || results.dy_xhat;
    Rest<REGISTERS, THREADS, CHUNKS> rest_x, rest_dy;
    if (EPILOGUE || summed) rest_x.read(share, x, 0);
    rest_dy.read(share, dy, 0);
    Math s_dy[LINES] = {}, s_dyx[LINES] = {};
    const auto add_one = [&](int v, Math x_, Math g) {
        const int p = plane_of(v);
        s_dy[line_of(v)] += g;
        s_dyx[line_of(v)] += g * ((x_ - stat.mean[p]) * stat.rstd[p]);
    };
    if (EPILOGUE) apply_epilogue(share, epilogue, dresidual, rest_x, rest_dy, 0, stat, add_one);
    write_tile(share, dx, rest_dy, CHUNKS, Tensor{}, [&](int p, Math g, Math) {
        return g * (stat.rstd[p] * stat.affine.weight[p]);
    });
    if (!summed) return;

    if (!EPILOGUE) {
        rest_dy.each(CHUNKS, [&](int k) {
            if (!share.holds(k)) return;
            const Pack a = rest_x.get(k), b = rest_dy.get(k);
            #pragma unroll
            for (int v = 0; v < V; v++) add_one(v, widen(a.v[v]), widen(b.v[v]));
        });
        if (Owner::edges && share.edge >= 0) add_one(0, widen(rest_x.edge), widen(rest_dy.edge));
    }
    Math sums[2 * P];
    fold(s_dy, sums);
    fold(s_dyx, sums + P);
    sum_over_owner<OWNER, THREADS>(sums, share.size, share.lanes, (Math*)shared);
    share.each_plane(channels, [&](int p, long long i) { results.set(i * tiles + share.tile, sums[p], sums[P + p]); });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS, CLUSTER_SIZE)                                                \
    KERNEL(THREADS, BLOCKS) evaluate_##NAME(                                                                          \
        TENSOR(x), TENSOR(y), const void* running_mean, const void* running_var, const void* weight,                  \
        const void* bias, int flags, EPILOGUE_PARAMETERS Math* mean, Math* rstd, double eps, long long channels,      \
        long long spatial, long long owners, long long tiles, int lanes) {                                            \
        evaluate<OWNER, THREADS, CHUNKS>(OF(x), OF(y), running_mean, running_var, Affine{weight, bias, flags},        \
                                         EPILOGUE_OF, mean, rstd, eps, channels, spatial, owners, tiles, lanes);      \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) eval_gradient_##NAME(                                                                     \
        TENSOR(x), TENSOR(dy), TENSOR(dx), const Math* mean, const Math* rstd, const void* weight, int flags,         \
        GRADIENT_PARAMETERS void* sum_dy, void* sum_dy_xhat, long long channels, long long spatial, long long owners, \
        long long tiles, int lanes) {                                                                                 \
        eval_gradient<OWNER, THREADS, CHUNKS>(OF(x), OF(dy), OF(dx), mean, rstd, Affine{weight, BIAS, flags},         \
                                              EPILOGUE_OF, DRESIDUAL, Sums{sum_dy, sum_dy_xhat, flags}, channels,     \
                                              spatial, owners, tiles, lanes);                                         \
    }
LADDER
