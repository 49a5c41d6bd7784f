// Double backward of a training forward, one launch: an owner reads its planes of x, dy and ddx once and writes ddy and
// dx, both of which double.cuh explains; all three rest on chip.
//
// Macros as in forward.cu, without an epilogue. sums (those of the weight's gradient) has N * C elements and may be null.

#define READ_AHEAD (GROUPED && CHANNELS_LAST ? 1 : 2)   // packs of each array: there are three

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "chunk.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "double.cuh"
#include "group.cuh"

struct Call {
    Given given;
    Tensor dx, ddy;
    const Math *mean, *rstd;
    Parameters parameters;
    Sums sums;
    long long channels, spatial, stripes;
    int lanes, chunks;
    Group group;
};

#if GROUPED
// What a block publishes of each plane of its tile: its elements, the pivots and the sums.
constexpr int PUBLISHED = 3 + QUANTITIES;

// f(p, means) for each plane p of a thread, from the sums of all tiles.
template <int THREADS, class Share, class Exchange, class F>
__device__ inline void merge_products_of_tiles(const Share& share, const Products& mine, int tiles, Accum count,
                                               const Standard& stat, Exchange& exchange, Accum* scratch, F f) {
    if (share.rank < share.lanes) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const int at = (share.rank * P + p) * PUBLISHED;
            exchange.publish(at, (Math)share.count());
            exchange.publish(at + 1, mine.pivot_g[p]);
            exchange.publish(at + 2, mine.pivot_u[p]);
            #pragma unroll
            for (int i = 0; i < QUANTITIES; i++) exchange.publish(at + 3 + i, mine.sums[i * P + p]);
        }
    }
    exchange.meet();
    const int lane = share.rank % share.lanes;
    #pragma unroll
    for (int p = 0; p < P; p++) {   // one plane after the other: all of them would need too many registers
        const int at = (lane * P + p) * PUBLISHED;
        const Math base_g = exchange.read(0, at + 1), base_u = exchange.read(0, at + 2);    // tile 0 has the most elements
        Accum s[QUANTITIES] = {};
        s[OF_G] = nothing_of(base_g);
        s[OF_U] = nothing_of(base_u);
        #pragma unroll 1
        for (int tile = share.rank / share.lanes; tile < tiles; tile += THREADS / share.lanes) {
            const Accum n = exchange.read(tile, at);
            if (n == 0) continue;
            const Accum far_g = (Accum)exchange.read(tile, at + 1) - base_g;
            const Accum far_u = (Accum)exchange.read(tile, at + 2) - base_u;
            add_products(n, far_g, far_u, stat.rstd[p], [&](int i) { return (Accum)exchange.read(tile, at + 3 + i); },
                         [&](int i) -> Accum& { return s[i]; });
        }
        sum_over_owner<BLOCK, THREADS>(s, share.size, share.lanes,
                                       scratch + p * scratch_size<THREADS>(share.lanes, QUANTITIES));
        if (p == P - 1) exchange.leave();
        f(p, means_of<Accum>(count, base_g, base_u, stat.rstd[p], s[OF_X], s[OF_G], s[OF_U], s[OF_GX], s[OF_VX],
                             s[OF_VG]));
    }
}
#endif

template <int OWNER, int REST, int THREADS, int CHUNKS>
__device__ inline void double_backward_owner(const Call& call, long long owner, long long spatial) {
    const Share<OWNER, THREADS> share(owner, call.group.tiles, REST == REGISTERS ? CHUNKS : call.chunks, call.lanes, call.dx,
                                      call.channels, spatial);
    unsigned char* shared = shared_memory();
    const int tile = call.chunks * THREADS * (REST == SHARED);
    // Behind the tiles: scratch for two exchanges, for a third, of Accum, and what is published.
    Math* scratch = (Math*)(shared + 3 * tile * sizeof(Pack));
    Math* other = scratch + scratch_size<THREADS>(share.lanes, 2 * P);
    Rests<REST, THREADS, CHUNKS> rest((Pack*)shared, tile);
    const Standard stat(share, true, call.mean, call.rstd, call.channels);
    const Products m = products_of_tile<OWNER>(share, call.given, rest, call.chunks, stat, scratch, other);
    const ParametersOfThread parameters(share, call.parameters, call.channels);
    DoubleGradient d;
    const auto found = [&](int p, const Means& means) {
        d.set(p, means, parameters);
        // One thread a plane.
        if (share.tile == 0 && share.rank < share.lanes && share.c + p < call.channels) {
            call.sums.set_dy_xhat(share.n * call.channels + share.c + p, means.s * (Math)spatial);
        }
    };
#if GROUPED
    Accum* third = (Accum*)(scratch + scratch_size<THREADS>(share.lanes, (2 + QUANTITIES) * P));
    Exchange<OWNER> exchange(call.group, owner, share.lanes * PUBLISHED * P,
                             (Math*)(third + scratch_size<THREADS>(share.lanes, QUANTITIES * P)));
    merge_products_of_tiles<THREADS>(share, m, call.group.tiles, spatial, stat, exchange, third, found);
#else
    #pragma unroll
    for (int p = 0; p < P; p++) {
        found(p, means_of<Math>(share.count(), m.pivot_g[p], m.pivot_u[p], stat.rstd[p], m.sums[OF_X * P + p],
                                m.sums[OF_G * P + p], m.sums[OF_U * P + p], m.sums[OF_GX * P + p], m.sums[OF_VX * P + p],
                                m.sums[OF_VG * P + p]));
    }
#endif
    write_both(share, call.ddy, call.dx, rest, call.chunks, call.given.ddx.data, stat, d);
#if GROUPED
    exchange.end();
#endif
}

// PART: as in forward.cu; dx takes x's room, ddy that of dy.
template <int REST, int THREADS, int CHUNKS> __device__ inline void double_backward_part(Call call) {
    const Chunk<CHUNKS> chunk(THREADS / 32, call.lanes, call.spatial, call.stripes);
    const Tensor dx = call.dx, ddy = call.ddy;
    Storage* room = chunk.rooms(shared_memory(), 3);
    const auto fetch = [&](Tensor& t, Storage* to) {
        chunk.fetch(t, to);
        t = chunk.staged(t, call.channels, to);
    };
    fetch(call.given.x, room);
    fetch(call.given.dy, room + chunk.room);
    if (call.given.ddx.data) fetch(call.given.ddx, room + 2 * chunk.room);
    call.dx = chunk.staged(dx, call.channels, room);
    call.ddy = chunk.staged(ddy, call.channels, room + chunk.room);
    __syncwarp();
    double_backward_owner<PART, REST, THREADS, CHUNKS>(call, chunk.plane, chunk.plane < call.stripes ? call.spatial : 0);
    __syncwarp();
    chunk.put(dx, room);
    chunk.put(ddy, room + chunk.room);
}

template <int OWNER, int REST, int THREADS, int CHUNKS> __device__ inline void double_backward(const Call& call) {
    if constexpr (OWNER == PART) double_backward_part<REST, THREADS, CHUNKS>(call);
    else each_owner<OWNER, Share<OWNER, THREADS>>(call.group, call.stripes, [&](long long owner) {
        double_backward_owner<OWNER, REST, THREADS, CHUNKS>(call, owner, call.spatial);
    });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS, CLUSTER_SIZE)                                                \
    CLUSTER_KERNEL(THREADS, BLOCKS, CLUSTER_SIZE) double_backward_##NAME(                                             \
        GIVEN_PARAMETERS, TENSOR(dx), TENSOR(ddy), KNOWN_PARAMETERS, void* sums, long long channels,                  \
        long long spatial, long long stripes, int lanes, int chunks GROUP_PARAMETERS) {                               \
        double_backward<OWNER, REST, THREADS, CHUNKS>(Call{                                                           \
            GIVEN, OF(dx), OF(ddy), mean, rstd, PARAMETERS, Sums{0, sums, flags}, channels, spatial, stripes,        \
            lanes, chunks, GROUP_OF});                                                                                \
    }
LADDER
