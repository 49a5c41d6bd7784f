// Double backward of tracked eval, whose statistics are constants: each element is read once and written once.
//
//     frozen_double_backward_*   with v = rstd * ddx: ddy = weight * v + ddweight * xhat + ddbias,
//                                dx = ddweight * rstd * dy, and the sum of v * dy over each tile ([plane][tile]), for
//                                the gradient of weight
//     merge_dots                 these sums over all tiles of a plane, one block per plane
//
// Macros as in normalize.cu, without an epilogue.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "double.cuh"

struct FrozenDoubleBackwardArguments {
    Inputs inputs;
    Tensor dx, ddy;
    const Math *mean, *rstd;
    Parameters parameters;
    Sums sums;
    long long channels, spatial, scopes, tiles;
    int subdivision;
};

// Read only arrays that have an effect: x if there is ddweight; dy if there is ddweight, or ddx and sums.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void frozen_double_backward(const FrozenDoubleBackwardArguments& call) {
    unsigned char* shared = shared_memory();
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid();
    if (scope_index >= call.scopes) return;
    const Partition<SCOPE, THREADS> partition(scope_index, call.tiles, VECS_PER_THREAD, call.subdivision, call.dx,
                                              call.channels, call.spatial);
    const Stats stat(partition, false, call.mean, call.rstd, call.channels);
    const ParametersOfThread of(partition, call.parameters, call.channels);
    const bool more = call.inputs.ddx.data, moves = call.parameters.gradient.bias, summed = more && call.sums.dy_xhat;
    Tile<RESIDENCY, THREADS, VECS_PER_THREAD> x, dy, ddx;
    if (moves) x.read(partition, call.inputs.x, 0);
    if (moves || summed) dy.read(partition, call.inputs.dy, 0);
    if (more) ddx.read(partition, call.inputs.ddx, 0);
    write_tile(partition, call.ddy, x, ddx, VECS_PER_THREAD, [&](int p, Math x_, Math u) {
        const Math moved = moves ? stat.xhat(p, x_) * of.ddweight[p] : 0;
        return (more ? u * stat.rstd[p] * of.weight[p] : 0) + (moved + of.ddbias[p]);
    });
    write_tile(partition, call.dx, dy, VECS_PER_THREAD, Tensor{}, [&](int p, Math g, Math) {
        return moves ? g * stat.rstd[p] * of.ddweight[p] : 0;
    });
    if (!summed) return;
    Math s[LINES] = {}, total[P];
    const auto add = [&](int v, Storage u, Storage g) {
        s[line_of(v)] += widen(u) * stat.rstd[plane_of(v)] * widen(g);
    };
    dy.each(VECS_PER_THREAD, [&](int k) {
        if (!partition.holds(k)) return;
        const Vec a = ddx.get(k), b = dy.get(k);
        #pragma unroll
        for (int v = 0; v < VEC_SIZE; v++) add(v, a.v[v], b.v[v]);
    });
    if (Partition<SCOPE, THREADS>::has_tails && partition.tail >= 0) add(0, ddx.tail, dy.tail);
    fold(s, total);
    sum_over_scope<SCOPE, THREADS>(total, partition.size, partition.channel_vecs, (Math*)shared);
    partition.each_plane(call.channels, [&](int p, long long i) {
        call.sums.set_dy_xhat(i * call.tiles + partition.tile, total[p]);
    });
}

constexpr int MERGE_THREADS = 256;

struct MergeDotsArguments {
    const Math* partials;
    long long tiles, all_planes;
    Sums sums;
};

KERNEL(MERGE_THREADS, 1) merge_dots(MergeDotsArguments call) {
    unsigned char* shared = shared_memory();
    const long long plane = blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= call.all_planes) return;
    Accum s[1] = {};
    for (long long tile = threadIdx.x; tile < call.tiles; tile += MERGE_THREADS) {
        s[0] += load(call.partials + plane * call.tiles + tile);
    }
    sum_over_scope<BLOCK, MERGE_THREADS>(s, MERGE_THREADS, 1, (Accum*)shared);
    if (threadIdx.x == 0) call.sums.set_dy_xhat(plane, (Math)s[0]);
}
