// Double backward of a training forward, one launch: a scope reads its planes of x, dy and ddx once, keeps them on chip
// and writes ddy and dx (formulas in double.cuh).
//
// Macros as in forward.cu, without an epilogue. sums, for the gradient of weight, has N * C elements and may be null.

#define READ_AHEAD (GROUPED && CHANNELS_LAST ? 1 : 2)   // vecs of each of three arrays

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "staging.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "double.cuh"
#include "group.cuh"

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

#if GROUPED
// Numbers that a block puts for each plane of its tile: the element count, the shifts and the sums.
constexpr int PARTIAL_NUMBERS = 3 + QUANTITIES;

// Call f(p, coefficients) for each plane p of a thread, with the coefficients from the sums of all tiles.
template <int THREADS, class Partition, class Exchange, class F>
__device__ inline void merge_products_of_tiles(const Partition& partition, const Products& mine, int tiles, Accum count,
                                               const Stats& stat, Exchange& exchange, Accum* scratch, F f) {
    if (partition.rank < partition.channel_vecs) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const int at = (partition.rank * P + p) * PARTIAL_NUMBERS;
            exchange.put(at, (Math)partition.count());
            exchange.put(at + 1, mine.shift_g[p]);
            exchange.put(at + 2, mine.shift_u[p]);
            #pragma unroll
            for (int i = 0; i < QUANTITIES; i++) exchange.put(at + 3 + i, mine.sums[i * P + p]);
        }
    }
    exchange.barrier();
    const int channel_vec = partition.rank % partition.channel_vecs;
    #pragma unroll
    for (int p = 0; p < P; p++) {   // one plane at a time: all together need too many registers
        const int at = (channel_vec * P + p) * PARTIAL_NUMBERS;
        // bases: the shifts of tile 0, which has the most elements
        const Math base_g = exchange.read(0, at + 1), base_u = exchange.read(0, at + 2);
        Accum s[QUANTITIES] = {};
        s[OF_G] = nothing_of(base_g);
        s[OF_U] = nothing_of(base_u);
        #pragma unroll 1
        for (int tile = partition.rank / partition.channel_vecs; tile < tiles;
             tile += THREADS / partition.channel_vecs) {
            const Accum n = exchange.read(tile, at);
            if (n == 0) continue;
            const Accum far_g = (Accum)exchange.read(tile, at + 1) - base_g;
            const Accum far_u = (Accum)exchange.read(tile, at + 2) - base_u;
            add_products(n, far_g, far_u, stat.rstd[p], [&](int i) { return (Accum)exchange.read(tile, at + 3 + i); },
                         [&](int i) -> Accum& { return s[i]; });
        }
        sum_over_scope<BLOCK, THREADS>(s, partition.size, partition.channel_vecs,
                                       scratch + p * scratch_size<THREADS>(partition.channel_vecs, QUANTITIES));
        if (p == P - 1) exchange.release();
        f(p, coefficients_of<Accum>(count, base_g, base_u, stat.rstd[p], s[OF_X], s[OF_G], s[OF_U],
                                    s[OF_GX], s[OF_VX], s[OF_VG]));
    }
}
#endif

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void double_backward_scope(const DoubleBackwardArguments& call, long long scope_index, long long spatial) {
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
#if GROUPED
    Accum* third = (Accum*)(scratch + scratch_size<THREADS>(partition.channel_vecs, (2 + QUANTITIES) * P));
    Exchange<SCOPE> exchange(call.group, scope_index, partition.channel_vecs * PARTIAL_NUMBERS * P,
                             (Math*)(third + scratch_size<THREADS>(partition.channel_vecs, QUANTITIES * P)));
    merge_products_of_tiles<THREADS>(partition, m, call.group.tiles, spatial, stat, exchange, third, found);
#else
    #pragma unroll
    for (int p = 0; p < P; p++) {
        found(p, coefficients_of<Math>(partition.count(), m.shift_g[p], m.shift_u[p], stat.rstd[p],
                                       m.sums[OF_X * P + p], m.sums[OF_G * P + p], m.sums[OF_U * P + p],
                                       m.sums[OF_GX * P + p], m.sums[OF_VX * P + p], m.sums[OF_VG * P + p]));
    }
#endif
    write_both(partition, call.ddy, call.dx, tile, call.vecs_per_thread, call.inputs.ddx.data, stat, d);
#if GROUPED
    exchange.end();
#endif
}

// SUBWARP: as in forward.cu. dx uses x's buffer, and ddy uses dy's.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD> __device__ inline void double_backward_subwarp(DoubleBackwardArguments call) {
    const Staging<VECS_PER_THREAD> staging(THREADS / 32, call.subdivision, call.spatial, call.channel_tiles);
    const Tensor dx = call.dx, ddy = call.ddy;
    Storage* buffer = staging.buffers(shared_memory(), 3);
    const auto fetch = [&](Tensor& t, Storage* to) {
        staging.fetch(t, to);
        t = staging.staged(t, call.channels, to);
    };
    fetch(call.inputs.x, buffer);
    fetch(call.inputs.dy, buffer + staging.buffer_size);
    if (call.inputs.ddx.data) fetch(call.inputs.ddx, buffer + 2 * staging.buffer_size);
    call.dx = staging.staged(dx, call.channels, buffer);
    call.ddy = staging.staged(ddy, call.channels, buffer + staging.buffer_size);
    __syncwarp();
    const long long spatial = staging.plane < call.channel_tiles ? call.spatial : 0;
    double_backward_scope<SUBWARP, RESIDENCY, THREADS, VECS_PER_THREAD>(call, staging.plane, spatial);
    __syncwarp();
    staging.put(dx, buffer);
    staging.put(ddy, buffer + staging.buffer_size);
}

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void double_backward(DoubleBackwardArguments call) {
    if (!GROUPED) call.group = {1, 0, 0};
    if constexpr (SCOPE == SUBWARP) double_backward_subwarp<RESIDENCY, THREADS, VECS_PER_THREAD>(call);
    else each_scope<SCOPE, Partition<SCOPE, THREADS>>(call.group, call.channel_tiles, [&](long long scope_index) {
        double_backward_scope<SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD>(call, scope_index, call.spatial);
    });
}
