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

struct NormalizeArguments {
    Tensor x, y;
    const void *running_mean, *running_var;
    Affine affine;
    Epilogue epilogue;
    Math *mean, *rstd;              // may be null
    double eps;
    long long channels, spatial, scopes, tiles;
    int subdivision;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void normalize(NormalizeArguments call) {
    if (!EPILOGUE) call.epilogue = {};      // constant, as in forward.cu
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid();
    if (scope_index >= call.scopes) return;
    const Partition<SCOPE, THREADS> partition(scope_index, call.tiles, VECS_PER_THREAD, call.subdivision, call.y,
                                              call.channels, call.spatial);
    const AffineOfThread affine(partition, call.affine, call.channels);
    const bool exists = partition.exists(call.channels);
    Math center[P], var[P], inverse[P], scale[P];
    load_parameters(center, exists ? call.running_mean : 0, call.affine.flags & WIDE_RUNNING_MEAN, partition.c, 0);
    load_parameters(var, exists ? call.running_var : 0, call.affine.flags & WIDE_RUNNING_VAR, partition.c, 1);
    #pragma unroll
    for (int p = 0; p < P; p++) {
        inverse[p] = reciprocal_sqrt(var[p] + (Math)call.eps);
        scale[p] = inverse[p] * affine.weight[p];
    }
    if (call.mean && partition.tile == 0) partition.each_plane(call.channels, [&](int p, long long i) {
        store(call.mean + i, center[p]);
        store(call.rstd + i, inverse[p]);
    });
    Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
    tile.read(partition, call.x, 0);
    const Math slope = (Math)call.epilogue.slope;
    write_tile(partition, call.y, tile, VECS_PER_THREAD, call.epilogue.residual, [&](int p, Math value, Math residual) {
        return activated((value - center[p]) * scale[p] + affine.bias[p], residual, slope);
    });
}

struct FrozenBackwardArguments {
    Tensor x, dy, dx;
    const Math *mean, *rstd;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;
    Sums sums;
    long long channels, spatial, scopes, tiles;
    int subdivision;
};

// x is read only for the sums or an epilogue.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void frozen_backward(FrozenBackwardArguments call) {
    if (!EPILOGUE) {
        call.epilogue = {};
        call.dresidual = {};
        call.affine.bias = 0;
    }
    unsigned char* shared = shared_memory();
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid();
    if (scope_index >= call.scopes) return;
    const Partition<SCOPE, THREADS> partition(scope_index, call.tiles, VECS_PER_THREAD, call.subdivision, call.dx,
                                              call.channels, call.spatial);
    const AffineStats stat(partition, false, call.mean, 0, call.rstd, call.affine, call.channels);
    const bool summed = call.sums.dy || call.sums.dy_xhat;
    Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
    if (EPILOGUE || summed) tile_x.read(partition, call.x, 0);
    tile_dy.read(partition, call.dy, 0);
    Math sum_dy[LINES] = {}, sum_dy_xhat[LINES] = {};
    const auto add_one = [&](int v, Math x_, Math g) {
        const int p = plane_of(v);
        sum_dy[line_of(v)] += g;
        sum_dy_xhat[line_of(v)] += g * ((x_ - stat.mean[p]) * stat.rstd[p]);
    };
    if (EPILOGUE) apply_epilogue(partition, call.epilogue, call.dresidual, tile_x, tile_dy, 0, stat, add_one);
    write_tile(partition, call.dx, tile_dy, VECS_PER_THREAD, Tensor{}, [&](int p, Math g, Math) {
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
    partition.each_plane(call.channels, [&](int p, long long i) {
        call.sums.set(i * call.tiles + partition.tile, sums[p], sums[P + p]);
    });
}
