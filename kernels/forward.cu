// Forward, one launch: an owner reads its planes once, takes their statistics on chip and writes y.
//
//     y = activation(((x - mean) - delta) * (rstd * weight) + bias + residual),   rstd = 1 / sqrt(squares / count + eps)
//
// Macros: STORAGE_..., V, CHANNELS_LAST (types.cuh, plane.cuh), SKEWED (plane.cuh), EPILOGUE (epilogue.cuh), GROUPED (group.cuh), and
// LADDER, a list of RUNG(name, owner, rest, threads, chunks, blocks, cluster): the kernels to make, and how many blocks
// of each must fit on a multiprocessor.
// mean, rstd, delta and variance (unbiased) have N * C elements and may be null, like weight and bias.

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "chunk.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "group.cuh"

struct Call {
    Tensor x, y;
    Epilogue epilogue;
    Affine affine;
    Math *mean, *rstd, *delta, *variance;
    long long channels, spatial, stripes;
    int lanes, chunks;
    double eps;
    Group group;
};

template <int OWNER, int REST, int THREADS, int CHUNKS>
__device__ inline void forward_owner(const Call& call, long long owner, long long spatial) {
    const Share<OWNER, THREADS> share(owner, call.group.tiles, REST == REGISTERS && !GROUPED ? CHUNKS : call.chunks, call.lanes, call.y,
                                      call.channels, spatial);
    unsigned char* shared = shared_memory();
    const int tile = call.chunks * THREADS * (int)sizeof(Pack) * (REST == SHARED);
    const int area = scratch_size<THREADS>(share.lanes, 2 * P * (GROUPED ? sizeof(Accum) : sizeof(Math)));
    Math* scratch = (Math*)(shared + tile);
    Math* other = (Math*)(shared + tile + area);
    Rest<REST, THREADS, CHUNKS> rest((Pack*)shared);
    Moments m = moments_of_tile<OWNER>(share, call.x, rest, call.chunks, scratch, other);
    Math count = (Math)share.count();
#if GROUPED
    Exchange<OWNER> exchange(call.group, owner, share.lanes * P * 4, (Math*)(shared + tile + 2 * area));
    count = (Math)spatial;
    m = merge_moments_of_tiles<THREADS>(share, m, call.group.tiles, count, exchange, (Accum*)scratch);
#endif

    Math inverse[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        // The mean as it is saved, and what it lost: backward finds the very same values again.
        const Math mean = m.mean[p] + m.delta[p];
        m.delta[p] = (m.mean[p] - mean) + m.delta[p];
        m.mean[p] = mean;
        inverse[p] = rstd_of(m.squares[p], count, (Math)call.eps);
    }
    if (!GROUPED || share.tile == 0) share.each_plane(call.channels, [&](int p, long long i) {
        if (call.mean) store(call.mean + i, m.mean[p]);
        if (call.rstd) store(call.rstd + i, inverse[p]);
        if (call.delta) store(call.delta + i, m.delta[p]);
        if (call.variance) store(call.variance + i, variance_of(m.squares[p], count - 1));
    });
    // Not sooner: the widest register variant has none to spare.
    const AffineOfThread affine(share, call.affine, call.channels);
    Normalization to;
    #pragma unroll
    for (int p = 0; p < P; p++) to.set(p, m.mean[p], m.delta[p], inverse[p], affine);
    write_tile(share, call.y, rest, call.chunks, call.epilogue.residual, [&](int p, Math value, Math residual) {
        return activated(to.z(p, value), residual, call.epilogue.slope);
    });
#if GROUPED
    exchange.end();
#endif
}

// PART: the warp stages its planes, and takes x's room for y: every value of x has been read when the first is written,
// since it has gone into the sums that all lanes waited for.
template <int REST, int THREADS, int CHUNKS> __device__ inline void forward_part(Call call) {
    const Chunk<CHUNKS> chunk(THREADS / 32, call.lanes, call.spatial, call.stripes);
    const Tensor y = call.y;
    const bool more = EPILOGUE && call.epilogue.residual.data;
    Storage* room = chunk.rooms(shared_memory(), 1 + more);
    chunk.fetch(call.x, room);
    call.x = chunk.staged(call.x, call.channels, room);
    call.y = chunk.staged(y, call.channels, room);
    if (more) {
        chunk.fetch(call.epilogue.residual, room + chunk.room);
        call.epilogue.residual = chunk.staged(call.epilogue.residual, call.channels, room + chunk.room);
    }
    __syncwarp();
    forward_owner<PART, REST, THREADS, CHUNKS>(call, chunk.plane, chunk.plane < call.stripes ? call.spatial : 0);
    __syncwarp();
    chunk.put(y, room);
}

template <int OWNER, int REST, int THREADS, int CHUNKS> __device__ inline void forward(const Call& call) {
    if constexpr (OWNER == PART) forward_part<REST, THREADS, CHUNKS>(call);
    else each_owner<OWNER, Share<OWNER, THREADS>>(call.group, call.stripes, [&](long long owner) {
        forward_owner<OWNER, REST, THREADS, CHUNKS>(call, owner, call.spatial);
    });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS, CLUSTER_SIZE)                                                \
    CLUSTER_KERNEL(THREADS, BLOCKS, CLUSTER_SIZE) forward_##NAME(                                                     \
        TENSOR(x), TENSOR(y), const void* weight, const void* bias, int flags, EPILOGUE_PARAMETERS Math* mean,        \
        Math* rstd, Math* delta, Math* variance, long long channels, long long spatial, long long stripes, int lanes, \
        int chunks, double eps GROUP_PARAMETERS) {                                                                    \
        forward<OWNER, REST, THREADS, CHUNKS>(Call{                                                                   \
            OF(x), OF(y), EPILOGUE_OF, Affine{weight, bias, flags}, mean, rstd, delta, variance, channels, spatial,   \
            stripes, lanes, chunks, eps, GROUP_OF});                                                                  \
    }
LADDER
