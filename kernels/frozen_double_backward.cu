// Double backward of tracked eval, whose statistics are constants: each element is read once and written once.
//
//     frozen_double_backward_*   with v = rstd * ddx: ddy = weight * v + ddweight * xhat + ddbias,
//                                dx = ddweight * rstd * dy, and the sum of v * dy over each tile ([plane][tile]), for
//                                the gradient of weight; merges.cu merges them

#include "double.cuh"
#include "round.cuh"

struct FrozenDoubleBackwardArguments {
    Inputs inputs;
    Tensor dx, ddy;
    const Math *mean, *rstd;
    Parameters parameters;
    Sums sums;
    Round round;
};

// Read only arrays that have an effect: x if there is ddweight; dy if there is ddweight, or ddx and sums.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void frozen_double_backward(const FrozenDoubleBackwardArguments& call) {
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.dx, false, [&](const Partition<SCOPE, THREADS>& partition) {
        const Stats stat(partition, false, call.mean, call.rstd, round.channels);
        const ParametersOfThread of(partition, call.parameters, round.channels);
        const bool more = call.inputs.ddx.data, moves = call.parameters.ddweight;
        const bool summed = more && call.sums.dy_xhat;
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
        Math s[LINES] = {}, total[FROZEN_DOUBLE_BACKWARD_SUMS * P];
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
        sum_over_scope<SCOPE, THREADS>(total, partition.size, partition.channel_vecs, (Math*)shared_memory());
        partition.each_plane(round.channels, [&](int p, long long i) {
            call.sums.set_dy_xhat(i * round.tiles + partition.tile, total[p]);
        });
    });
}
