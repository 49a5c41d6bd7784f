// Frozen statistics (tracked eval): the running statistics are given, so each element is read once and written once,
// for planes of any size.
//
//     normalize_*         y from the running statistics, which are saved for each plane (normalize.cuh)
//     frozen_backward_*   dx = g * weight * rstd, since the statistics are constants, and in the same pass the two sums
//                         for the affine gradients, of each tile ([plane][tile]) if there are several
//
// A scope serves one tile of VECS_PER_THREAD vecs per thread.

#include "gradient.cuh"
#include "normalize.cuh"

struct FrozenBackwardArguments {
    Tensor x, dy, dx;
    const Math *mean, *rstd;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;
    Mask mask;
    Sums sums;
    Round round;
};

// x is read only for the sums or an epilogue.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void frozen_backward(FrozenBackwardArguments call) {
    without_epilogue(call.epilogue, call.dresidual, call.affine.bias);
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.dx, false, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineStats stat(partition, call.mean, 0, call.rstd, call.affine, round.channels);
        const bool summed = call.sums.dy || call.sums.dy_xhat;
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        if (EPILOGUE || summed) tile_x.read(partition, call.x, 0);
        tile_dy.read(partition, call.dy, 0);
        const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD> mask(partition, call.mask);
        Math sum_dy[LINES] = {}, sum_dy_xhat[LINES] = {};
        const auto add_one = [&](int v, Math x_, Math g) {
            const int p = plane_of(v);
            sum_dy[line_of(v)] += g;
            sum_dy_xhat[line_of(v)] += g * ((x_ - stat.mean[p]) * stat.rstd[p]);
        };
        if (EPILOGUE) {
            apply_epilogue(partition, call.epilogue, call.dresidual, tile_x, tile_dy, 0, stat, add_one, mask);
        }
        write_tile(partition, call.dx, tile_dy, VECS_PER_THREAD, Tensor{}, [&](int p, Math g, Math) {
            return g * (stat.rstd[p] * stat.affine.weight[p]);
        }, mask);
        if (!summed) return;

        if (!EPILOGUE) {
            tile_dy.each(VECS_PER_THREAD, [&](int k) {
                if (!partition.holds(k)) return;
                const Vec a = tile_x.get(k), b = tile_dy.get(k);
                #pragma unroll
                for (int v = 0; v < VEC_SIZE; v++) {
                    if constexpr (MASKED) if (!mask.has(k, v)) continue;
                    add_one(v, widen(a.v[v]), widen(b.v[v]));
                }
            });
            if (Partition<SCOPE, THREADS>::has_tails && partition.tail >= 0 && mask.has_tail()) {
                add_one(0, widen(tile_x.tail), widen(tile_dy.tail));
            }
        }
        Math sums[FROZEN_BACKWARD_SUMS * P];
        fold(sum_dy, sums);
        fold(sum_dy_xhat, sums + P);
        sum_over_scope<SCOPE, THREADS>(sums, partition.size, partition.channel_vecs, (Math*)shared_memory());
        partition.each_plane(round.channels, [&](int p, long long i) {
            call.sums.set(i * round.tiles + partition.tile, sums[p], sums[P + p]);
        });
    });
}
