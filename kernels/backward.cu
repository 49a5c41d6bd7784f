// Backward of a training forward, one launch: an owner reads its planes of x and dy once and writes dx.
//
//     dx = weight * rstd * ((g - sum(g) / count) - xhat * (sum(g * xhat) / count)),   xhat = c - delta
//
// with c = (x - mean) * rstd, and g what the epilogue makes of dy: dy itself without one. The saved mean is rounded:
// delta = mean(c) is what it lost, found again from x, which is on chip anyway, so that all three sums travel in one
// exchange: sum(g * xhat) = sum(g * c) - delta * sum(g).
//
// Macros as in forward.cu. sum_dy and sum_dy_xhat (of g) have N * C elements and may be null.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "chunk.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "group.cuh"

struct Call {
    Tensor x, dy, dx;
    const Math *mean, *rstd, *delta;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;
    Sums sums;
    long long channels, spatial, stripes;
    int lanes, chunks;
    Group group;
};

template <int OWNER, int REST, int THREADS, int CHUNKS>
__device__ inline void backward_owner(const Call& call, long long owner, long long spatial) {
    const Share<OWNER, THREADS> share(owner, call.group.tiles, REST == REGISTERS && !GROUPED ? CHUNKS : call.chunks, call.lanes, call.dx,
                                      call.channels, spatial);
    unsigned char* shared = shared_memory();
    const int tile = call.chunks * THREADS * (REST == SHARED);
    unsigned char* scratch = shared + 2 * tile * sizeof(Pack);
    Rest<REST, THREADS, CHUNKS> rest_x((Pack*)shared), rest_dy((Pack*)shared + tile);
    const Statistics stat(share, true, call.mean, call.delta, call.rstd, call.affine, call.channels);
    Math sums[3 * P], count = (Math)share.count();
    gradient_sums<OWNER>(share, call.x, call.dy, call.epilogue, call.dresidual, rest_x, rest_dy, call.chunks, stat, sums,
                         (Math*)scratch);
#if GROUPED
    const int area = scratch_size<THREADS>(share.lanes, 3 * P * sizeof(Accum));
    Exchange<OWNER> exchange(call.group, owner, share.lanes * 3 * P, (Math*)(scratch + 2 * area));
    count = (Math)spatial;
    merge_sums_of_tiles<THREADS>(share, sums, call.group.tiles, exchange, (Accum*)(scratch + area));
#endif

    Gradient g;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const Math delta = sums[2 * P + p] / count;
        sums[P + p] -= delta * sums[p];
        g.set(p, sums[p], sums[P + p], delta, count, stat);
    }
    if (!GROUPED || share.tile == 0) share.each_plane(call.channels, [&](int p, long long i) {
        call.sums.set(i, sums[p], sums[P + p]);
    });
    write_tile(share, call.dx, rest_x, rest_dy, call.chunks, [&](int p, Math x, Math dy) { return g.dx(p, x, dy, stat); });
#if GROUPED
    exchange.end();
#endif
}

// PART: as in forward.cu; dx takes x's room, dresidual that of the residual.
template <int REST, int THREADS, int CHUNKS> __device__ inline void backward_part(Call call) {
    const Chunk<CHUNKS> chunk(THREADS / 32, call.lanes, call.spatial, call.stripes);
    const Tensor dx = call.dx, dresidual = call.dresidual;
    const bool more = EPILOGUE && call.epilogue.residual.data, wanted = EPILOGUE && dresidual.data;
    unsigned char* shared = shared_memory();
    const int rooms = 2 + more + wanted;
    Storage* room = chunk.rooms(shared, rooms);
    chunk.fetch(call.x, room);
    chunk.fetch(call.dy, room + chunk.room);
    call.x = chunk.staged(call.x, call.channels, room);
    call.dy = chunk.staged(call.dy, call.channels, room + chunk.room);
    call.dx = chunk.staged(dx, call.channels, room);
    if (more) {
        chunk.fetch(call.epilogue.residual, room + 2 * chunk.room);
        call.epilogue.residual = chunk.staged(call.epilogue.residual, call.channels, room + 2 * chunk.room);
    }
    Storage* last = room + (rooms - 1) * chunk.room;
    if (wanted) call.dresidual = chunk.staged(dresidual, call.channels, last);
    __syncwarp();
    backward_owner<PART, REST, THREADS, CHUNKS>(call, chunk.plane, chunk.plane < call.stripes ? call.spatial : 0);
    __syncwarp();
    chunk.put(dx, room);
    if (wanted) chunk.put(dresidual, last);
}

template <int OWNER, int REST, int THREADS, int CHUNKS> __device__ inline void backward(const Call& call) {
    if constexpr (OWNER == PART) backward_part<REST, THREADS, CHUNKS>(call);
    else each_owner<OWNER, Share<OWNER, THREADS>>(call.group, call.stripes, [&](long long owner) {
        backward_owner<OWNER, REST, THREADS, CHUNKS>(call, owner, call.spatial);
    });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS, CLUSTER_SIZE)                                                \
    CLUSTER_KERNEL(THREADS, BLOCKS, CLUSTER_SIZE) backward_##NAME(                                                    \
        TENSOR(x), TENSOR(dy), TENSOR(dx), const Math* mean, const Math* rstd, const void* weight, int flags,         \
        GRADIENT_PARAMETERS void* sum_dy, void* sum_dy_xhat, long long channels, long long spatial,                   \
        long long stripes, int lanes, int chunks GROUP_PARAMETERS) {                                             \
        backward<OWNER, REST, THREADS, CHUNKS>(Call{                                                                  \
            OF(x), OF(dy), OF(dx), mean, rstd, DELTA, Affine{weight, BIAS, flags}, EPILOGUE_OF, DRESIDUAL,            \
            Sums{sum_dy, sum_dy_xhat, flags}, channels, spatial, stripes, lanes, chunks, GROUP_OF});                  \
    }
LADDER
