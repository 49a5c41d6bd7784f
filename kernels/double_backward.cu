// Double backward of a training forward, one launch: a scope reads its planes of x, dy and ddx once, keeps them on chip
// and writes ddy and dx (formulas in double.cuh).
//
// There is no epilogue. sums, for the gradient of weight, has N * C elements; it may be null.

#include "double.cuh"
#include "group.cuh"
#include "staging.cuh"

struct DoubleBackwardArguments {
    Inputs inputs;
    Tensor dx, ddy;
    const Math *mean, *rstd;
    Parameters parameters;
    Sums sums;
    long long channels, spatial, channel_tiles;
    int subdivision, vecs_per_thread;
    Group group;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void double_backward_scope(const DoubleBackwardArguments& call, long long scope_index,
                                             long long spatial) {
    const int vecs_per_thread = RESIDENCY == REGISTERS ? VECS_PER_THREAD : call.vecs_per_thread;
    const Partition<SCOPE, THREADS> partition(scope_index, call.group.tiles, vecs_per_thread, call.subdivision, call.dx,
                                              call.channels, spatial);
    unsigned char* shared = shared_memory();
    const int vecs = call.vecs_per_thread * THREADS * (RESIDENCY == SHARED);
    // After the tiles: scratch for two sums in Math, for a third in Accum, and the partials that the block puts.
    Math* scratch = (Math*)(shared + 3 * vecs * sizeof(Vec));
    Math* other = scratch + scratch_size<THREADS>(partition.channel_vecs, 2 * P);
    InputTiles<RESIDENCY, THREADS, VECS_PER_THREAD> tile((Vec*)shared, vecs);
    const Stats stat(partition, true, call.mean, call.rstd, call.channels);
    const Products m = products_of_tile<SCOPE>(partition, call.inputs, tile, call.vecs_per_thread,
                                               stat, scratch, other);
    const ParametersOfThread parameters(partition, call.parameters, call.channels);
    DoubleGradient d;
    const auto found = [&](int p, const Coefficients& coefficients) {
        d.set(p, coefficients, parameters);
        // One thread per plane.
        if (partition.tile == 0 && partition.rank < partition.channel_vecs && partition.c + p < call.channels) {
            call.sums.set_dy_xhat(partition.n * call.channels + partition.c + p, coefficients.s * (Math)spatial);
        }
    };
    Accum* third = (Accum*)(scratch + scratch_size<THREADS>(partition.channel_vecs, DOUBLE_BACKWARD_SUMS * P));
    Exchange<SCOPE> exchange(call.group, scope_index, partition.channel_vecs * P * DOUBLE_BACKWARD_PARTIALS,
                             (Math*)(third + scratch_size<THREADS>(partition.channel_vecs, QUANTITIES * P)));
    if constexpr (grouped<SCOPE>) {
        merge_products_of_tiles<THREADS>(partition, m, call.group.tiles, spatial, stat, exchange, third, found);
    } else {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            Math sums[QUANTITIES];
            #pragma unroll
            for (int q = 0; q < QUANTITIES; q++) sums[q] = m.sums[q * P + p];
            found(p, coefficients_of<Math>(partition.count(), m.shift_g[p], m.shift_u[p], stat.rstd[p], sums));
        }
    }
    write_both(partition, call.ddy, call.dx, tile, call.vecs_per_thread, call.inputs.ddx.data, stat, d);
    exchange.end();
}

// SUBWARP: as in forward.cu. dx uses x's buffer, and ddy uses dy's.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void double_backward_subwarp(DoubleBackwardArguments call) {
    const Staging<VECS_PER_THREAD> staging(THREADS / 32, call.subdivision, call.spatial, call.channel_tiles);
    const Tensor dx = call.dx, ddy = call.ddy;
    Storage* buffer = staging.buffers(shared_memory(), 3);
    const auto fetch = [&](Tensor& t, Storage* to) {
        staging.fetch(t, to);
        t = staging.staged(t, to);
    };
    fetch(call.inputs.x, buffer);
    fetch(call.inputs.dy, buffer + staging.buffer_size);
    if (call.inputs.ddx.data) fetch(call.inputs.ddx, buffer + 2 * staging.buffer_size);
    call.dx = staging.staged(dx, buffer);
    call.ddy = staging.staged(ddy, buffer + staging.buffer_size);
    __syncwarp();
    const long long spatial = staging.plane < call.channel_tiles ? call.spatial : 0;
    double_backward_scope<SUBWARP, RESIDENCY, THREADS, VECS_PER_THREAD>(call, staging.plane, spatial);
    __syncwarp();
    staging.put(dx, buffer);
    staging.put(ddy, buffer + staging.buffer_size);
}

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void double_backward(DoubleBackwardArguments call) {
    if (!grouped<SCOPE>) call.group = {1, 0, 0};
    if constexpr (SCOPE == SUBWARP) double_backward_subwarp<RESIDENCY, THREADS, VECS_PER_THREAD>(call);
    else each_scope<SCOPE, Partition<SCOPE, THREADS>>(call.group, call.channel_tiles, [&](long long scope_index) {
        double_backward_scope<SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD>(call, scope_index, call.spatial);
    });
}
