// Frozen statistics (tracked eval): the running statistics are given, so each element is read once and written once,
// for planes of any size.
//
//     normalize_*         y = activation((x - running_mean) * (rstd * weight) + bias + residual); saves mean and rstd
//     frozen_backward_*   dx = g * weight * rstd, since the statistics are constants, and in the same pass the two sums
//                         for the affine gradients, of each tile ([plane][tile]) if there are several
//
// Macros as in forward.cu; a scope serves one tile of VECS_PER_THREAD vecs per thread.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"

template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void normalize(const Tensor& x, const Tensor& y, const void* running_mean, const void* running_var,
                                 const Affine& parameters, const Epilogue& epilogue, Math* mean, Math* rstd, double eps,
                                 long long channels, long long spatial, long long scopes, long long tiles,
                                 int subdivision) {
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid();
    if (scope_index >= scopes) return;
    const Partition<SCOPE, THREADS> partition(scope_index, tiles, VECS_PER_THREAD, subdivision, y, channels, spatial);
    const AffineOfThread affine(partition, parameters, channels);
    Math center[P], inverse[P], scale[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const long long c = partition.exists(channels) ? partition.c + p : 0;
        center[p] = load_parameter(running_mean, parameters.flags & WIDE_RUNNING_MEAN, c);
        inverse[p] = reciprocal_sqrt(load_parameter(running_var, parameters.flags & WIDE_RUNNING_VAR, c) + (Math)eps);
        scale[p] = inverse[p] * affine.weight[p];
    }
    if (mean && partition.tile == 0) partition.each_plane(channels, [&](int p, long long i) {
        store(mean + i, center[p]);
        store(rstd + i, inverse[p]);
    });
    Tile<REGISTERS, THREADS, VECS_PER_THREAD> tile;
    tile.read(partition, x, 0);
    write_tile(partition, y, tile, VECS_PER_THREAD, epilogue.residual, [&](int p, Math value, Math residual) {
        return activated((value - center[p]) * scale[p] + affine.bias[p], residual, epilogue.slope);
    });
}

// x is read only for the sums or an epilogue.
template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void frozen_backward(const Tensor& x, const Tensor& dy, const Tensor& dx, const Math* mean,
                                       const Math* rstd, const Affine& affine, const Epilogue& epilogue,
                                       const Tensor& dresidual, const Sums& results, long long channels,
                                       long long spatial, long long scopes, long long tiles, int subdivision) {
    unsigned char* shared = shared_memory();
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid();
    if (scope_index >= scopes) return;
    const Partition<SCOPE, THREADS> partition(scope_index, tiles, VECS_PER_THREAD, subdivision, dx, channels, spatial);
    const AffineStats stat(partition, false, mean, 0, rstd, affine, channels);
    const bool summed = results.dy || results.dy_xhat;
    Tile<REGISTERS, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
    if (EPILOGUE || summed) tile_x.read(partition, x, 0);
    tile_dy.read(partition, dy, 0);
    Math sum_dy[LINES] = {}, sum_dy_xhat[LINES] = {};
    const auto add_one = [&](int v, Math x_, Math g) {
        const int p = plane_of(v);
        sum_dy[line_of(v)] += g;
        sum_dy_xhat[line_of(v)] += g * ((x_ - stat.mean[p]) * stat.rstd[p]);
    };
    if (EPILOGUE) apply_epilogue(partition, epilogue, dresidual, tile_x, tile_dy, 0, stat, add_one);
    write_tile(partition, dx, tile_dy, VECS_PER_THREAD, Tensor{}, [&](int p, Math g, Math) {
        return g * (stat.rstd[p] * stat.affine.weight[p]);
    });
    if (!summed) return;

    if (!EPILOGUE) {
        tile_dy.each(VECS_PER_THREAD, [&](int k) {
            if (!partition.holds(k)) return;
            const Vec a = tile_x.get(k), b = tile_dy.get(k);
            #pragma unroll
            for (int v = 0; v < VEC_SIZE; v++) add_one(v, widen(a.v[v]), widen(b.v[v]));
        });
        if (Partition<SCOPE, THREADS>::has_tails && partition.tail >= 0) {
            add_one(0, widen(tile_x.tail), widen(tile_dy.tail));
        }
    }
    Math sums[2 * P];
    fold(sum_dy, sums);
    fold(sum_dy_xhat, sums + P);
    sum_over_scope<SCOPE, THREADS>(sums, partition.size, partition.channel_vecs, (Math*)shared);
    partition.each_plane(channels, [&](int p, long long i) {
        results.set(i * tiles + partition.tile, sums[p], sums[P + p]);
    });
}

#define VARIANT(NAME, SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD, BLOCKS, CLUSTER_SIZE)                               \
    KERNEL(THREADS, BLOCKS) normalize_##NAME(                                                                         \
        TENSOR(x), TENSOR(y), const void* running_mean, const void* running_var, const void* weight,                  \
        const void* bias, int flags, EPILOGUE_PARAMETERS Math* mean, Math* rstd, double eps, long long channels,      \
        long long spatial, long long scopes, long long tiles, int subdivision) {                                      \
        normalize<SCOPE, THREADS, VECS_PER_THREAD>(                                                                   \
            OF(x), OF(y), running_mean, running_var, Affine{weight, bias, flags}, EPILOGUE_OF, mean, rstd, eps,       \
            channels, spatial, scopes, tiles, subdivision);                                                           \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) frozen_backward_##NAME(                                                                   \
        TENSOR(x), TENSOR(dy), TENSOR(dx), const Math* mean, const Math* rstd, const void* weight, int flags,         \
        GRADIENT_PARAMETERS void* sum_dy, void* sum_dy_xhat, long long channels, long long spatial, long long scopes, \
        long long tiles, int subdivision) {                                                                           \
        frozen_backward<SCOPE, THREADS, VECS_PER_THREAD>(                                                             \
            OF(x), OF(dy), OF(dx), mean, rstd, Affine{weight, BIAS, flags}, EPILOGUE_OF, DRESIDUAL,                   \
            Sums{sum_dy, sum_dy_xhat, flags}, channels, spatial, scopes, tiles, subdivision);                         \
    }
VARIANTS
