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

// Read only arrays that have an effect: x if there is ddweight; dy if there is ddweight, or ddx and sums.
template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void frozen_double_backward(const Inputs& inputs, const Tensor& dx, const Tensor& ddy,
                                              const Math* mean, const Math* rstd, const Parameters& parameters,
                                              const Sums& sums, long long channels, long long spatial,
                                              long long scopes, long long tiles, int subdivision) {
    unsigned char* shared = shared_memory();
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid();
    if (scope_index >= scopes) return;
    const Partition<SCOPE, THREADS> partition(scope_index, tiles, VECS_PER_THREAD, subdivision, dx, channels, spatial);
    const Stats stat(partition, false, mean, rstd, channels);
    const ParametersOfThread of(partition, parameters, channels);
    const bool more = inputs.ddx.data, moves = parameters.gradient.bias, summed = more && sums.dy_xhat;
    Tile<REGISTERS, THREADS, VECS_PER_THREAD> x, dy, ddx;
    if (moves) x.read(partition, inputs.x, 0);
    if (moves || summed) dy.read(partition, inputs.dy, 0);
    if (more) ddx.read(partition, inputs.ddx, 0);
    write_tile(partition, ddy, x, ddx, VECS_PER_THREAD, [&](int p, Math x_, Math u) {
        const Math moved = moves ? stat.xhat(p, x_) * of.ddweight[p] : 0;
        return (more ? u * stat.rstd[p] * of.weight[p] : 0) + (moved + of.ddbias[p]);
    });
    write_tile(partition, dx, dy, VECS_PER_THREAD, Tensor{}, [&](int p, Math g, Math) {
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
    partition.each_plane(channels, [&](int p, long long i) { sums.set_dy_xhat(i * tiles + partition.tile, total[p]); });
}

#define VARIANT(NAME, SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD, BLOCKS, CLUSTER_SIZE)                               \
    KERNEL(THREADS, BLOCKS) frozen_double_backward_##NAME(                                                            \
        INPUT_PARAMETERS, TENSOR(dx), TENSOR(ddy), KNOWN_PARAMETERS, void* sums, long long channels,                  \
        long long spatial, long long scopes, long long tiles, int subdivision) {                                      \
        frozen_double_backward<SCOPE, THREADS, VECS_PER_THREAD>(                                                      \
            INPUTS, OF(dx), OF(ddy), mean, rstd, PARAMETERS, Sums{0, sums, flags}, channels, spatial, scopes, tiles,  \
            subdivision);                                                                                             \
    }
VARIANTS

constexpr int MERGE_THREADS = 256;

KERNEL(MERGE_THREADS, 1) merge_dots(const Math* partial, long long tiles, long long planes, void* sums, int flags) {
    unsigned char* shared = shared_memory();
    const long long plane = blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= planes) return;
    Accum s[1] = {};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) {
        s[0] += load(partial + plane * tiles + tile);
    }
    sum_over_scope<BLOCK, MERGE_THREADS>(s, MERGE_THREADS, 1, (Accum*)shared);
    if (threadIdx.x == 0) Sums{0, sums, flags}.set_dy_xhat(plane, (Math)s[0]);
}
