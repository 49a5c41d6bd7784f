// Double backward of tracked eval, whose statistics are constants: each element is read once and written once.
//
//     eval_double_*    with v = rstd * ddx: ddy = weight * v + ddweight * xhat + ddbias, dx = ddweight * rstd * dy, and
//                      the sum of v * dy, which is the weight's gradient, for each tile ([plane][tile])
//     merge_dots       those of a plane's tiles, one block a plane
//
// Macros as in evaluate.cu, without an epilogue.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "double.cuh"

// What has no part in a result is not read: x and dy without ddweight; but dy is for sums, if there is ddx.
template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void eval_double(const Given& given, const Tensor& dx, const Tensor& ddy, const Math* mean,
                                   const Math* rstd, const Parameters& parameters, const Sums& sums, long long channels,
                                   long long spatial, long long owners, long long tiles, int lanes) {
    unsigned char* shared = shared_memory();
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= owners) return;
    const Owner share(owner, tiles, CHUNKS, lanes, dx, channels, spatial);
    const Standard stat(share, false, mean, rstd, channels);
    const ParametersOfThread of(share, parameters, channels);
    const bool more = given.ddx.data, moves = parameters.gradient.bias, summed = more && sums.dy_xhat;
    Rest<REGISTERS, THREADS, CHUNKS> x, dy, ddx;
    if (moves) x.read(share, given.x, 0);
    if (moves || summed) dy.read(share, given.dy, 0);
    if (more) ddx.read(share, given.ddx, 0);
    write_tile(share, ddy, x, ddx, CHUNKS, [&](int p, Math x_, Math u) {
        const Math moved = moves ? stat.xhat(p, x_) * of.ddweight[p] : 0;
        return (more ? u * stat.rstd[p] * of.weight[p] : 0) + (moved + of.ddbias[p]);
    });
    write_tile(share, dx, dy, CHUNKS, Tensor{}, [&](int p, Math g, Math) {
        return moves ? g * stat.rstd[p] * of.ddweight[p] : 0;
    });
    if (!summed) return;
    Math s[LINES] = {}, total[P];
    const auto add = [&](int v, Storage u, Storage g) { s[line_of(v)] += widen(u) * stat.rstd[plane_of(v)] * widen(g); };
    dy.each(CHUNKS, [&](int k) {
        if (!share.holds(k)) return;
        const Pack a = ddx.get(k), b = dy.get(k);
        #pragma unroll
        for (int v = 0; v < V; v++) add(v, a.v[v], b.v[v]);
    });
    if (Share<OWNER, THREADS>::edges && share.edge >= 0) add(0, ddx.edge, dy.edge);
    fold(s, total);
    sum_over_owner<OWNER, THREADS>(total, share.size, share.lanes, (Math*)shared);
    share.each_plane(channels, [&](int p, long long i) { sums.set_dy_xhat(i * tiles + share.tile, total[p]); });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS, CLUSTER_SIZE)                                                \
    KERNEL(THREADS, BLOCKS) eval_double_##NAME(                                                                       \
        GIVEN_PARAMETERS, TENSOR(dx), TENSOR(ddy), KNOWN_PARAMETERS, void* sums, long long channels,                  \
        long long spatial, long long owners, long long tiles, int lanes) {                                            \
        eval_double<OWNER, THREADS, CHUNKS>(GIVEN, OF(dx), OF(ddy), mean, rstd, PARAMETERS, Sums{0, sums, flags},     \
                                            channels, spatial, owners, tiles, lanes);                                 \
    }
LADDER

constexpr int MERGE_THREADS = 256;

KERNEL(MERGE_THREADS, 1) merge_dots(const Math* partial, long long tiles, long long planes, void* sums, int flags) {
    unsigned char* shared = shared_memory();
    const long long plane = blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= planes) return;
    Accum s[1] = {};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) s[0] += load(partial + plane * tiles + tile);
    sum_over_owner<BLOCK, MERGE_THREADS>(s, MERGE_THREADS, 1, (Accum*)shared);
    if (threadIdx.x == 0) Sums{0, sums, flags}.set_dy_xhat(plane, (Math)s[0]);
}
