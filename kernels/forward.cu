// Forward, one launch: a scope reads its planes once, computes their statistics on chip and writes y.
//
//     y = activation(((x - mean) - mean_lo) * (rstd * weight) + bias + residual),   rstd: see scale.cuh
//
// The module's text ends with a kernel for each of its variants, which calls
// forward<SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD>(call) (cupynorm/cuda/source.py).
// mean, rstd, mean_lo, variance (unbiased) and count have N * C elements. They, weight and bias may be null.
// With a mask, only positions where it is True are in the statistics, and y is 0 elsewhere.

#include "epilogue.cuh"
#include "group.cuh"
#include "moments.cuh"
#include "staging.cuh"

struct ForwardArguments {
    TensorOf<Input> x;
    Tensor y;
    Epilogue epilogue;
    Affine affine;
    Mask mask;
    Math *mean, *rstd, *mean_lo, *variance;
    long long* count;               // with a mask: of each plane
    long long channels, spatial, channel_tiles;
    int subdivision, vecs_per_thread;
    Scale scale;
    Group group;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void forward_scope(const ForwardArguments& call, long long scope_index, long long spatial) {
    const int vecs_per_thread = RESIDENCY == REGISTERS && !grouped<SCOPE> ? VECS_PER_THREAD : call.vecs_per_thread;
    const Partition<SCOPE, THREADS> partition(scope_index, call.group.tiles, vecs_per_thread, call.subdivision, call.y,
                                              call.channels, spatial);
    unsigned char* shared = shared_memory();
    const int tile_bytes = call.vecs_per_thread * THREADS * (int)sizeof(VecOf<Input>) * (RESIDENCY == SHARED);
    const int bytes = P * (grouped<SCOPE> ? FORWARD_MERGED * sizeof(Accum) : FORWARD_SUMS * sizeof(Math));
    const int area = scratch_size<THREADS>(partition.channel_vecs, bytes);
    const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD> mask(partition, call.mask, call.vecs_per_thread,
                                                               shared + tile_bytes);
    unsigned char* rest = shared + tile_bytes + mask_bytes<RESIDENCY, THREADS>(call.vecs_per_thread);
    Math *scratch = (Math*)rest, *other = (Math*)(rest + area);
    Tile<RESIDENCY, THREADS, VECS_PER_THREAD, Input> tile((VecOf<Input>*)shared);
    Counts<> count(partition.count());
    MomentsOfThread m = moments_of_tile<SCOPE>(partition, call.x, tile, call.vecs_per_thread, scratch, other, mask,
                                                count);
    Exchange<SCOPE> exchange(call.group, scope_index, partition.channel_vecs * P * FORWARD_PARTIALS,
                             (Math*)(rest + 2 * area));
    if constexpr (grouped<SCOPE>) {
        m = merge_moments_of_tiles<THREADS>(partition, m, call.group.tiles, spatial, count, exchange, (Accum*)scratch,
                                            (Accum*)other);
    }

    const Divisors divide(count);
    Math inverse[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        // Split the mean into the rounded mean that is saved, and mean_lo: backward finds exactly the same values.
        const Math mean = m.mean[p] + m.mean_lo[p];
        m.mean_lo[p] = (m.mean[p] - mean) + m.mean_lo[p];
        m.mean[p] = mean;
        inverse[p] = MASKED && count.positions(p) == 0 ? 0 : rstd_of(m.scaled_m2[p], divide.of(p), call.scale);
    }
    if (!grouped<SCOPE> || partition.tile == 0) partition.each_plane(call.channels, [&](int p, long long i) {
        if (call.mean) store(call.mean + i, m.mean[p]);
        if (call.rstd) store(call.rstd + i, inverse[p]);
        if (call.mean_lo) store(call.mean_lo + i, m.mean_lo[p]);
        if (call.variance) store(call.variance + i, variance_of(m.scaled_m2[p], count[p] - 1));
        if (MASKED && call.count) store(call.count + i, (long long)count.positions(p));
    });
    // Load these only now: the widest register variant has no registers to spare earlier.
    const AffineOfThread affine(partition, call.affine, call.channels);
    Normalization to;
    #pragma unroll
    for (int p = 0; p < P; p++) to.set(p, m.mean[p], m.mean_lo[p], inverse[p], affine);
    const Math slope = (Math)call.epilogue.slope;
    write_tile(partition, call.y, tile, call.vecs_per_thread, call.epilogue.residual,
               [&](int p, Math value, Math residual) {
        return activated(to.z(p, value), residual, slope);
    }, mask);
    exchange.end();
}

// SUBWARP: the warp stages its planes, and uses x's buffer for y. All of x has been read before the first y is written:
// all lanes wait for sums that contain every x.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void forward_subwarp(ForwardArguments call) {
    const Staging<VECS_PER_THREAD> staging(THREADS / 32, call.subdivision, call.spatial, call.channel_tiles);
    const Tensor y = call.y;
    const bool more = EPILOGUE && call.epilogue.residual.data;
    Storage* buffer = staging.buffers(shared_memory(), 1 + more);
    staging.fetch(call.x, buffer);
    call.x = staging.staged(call.x, buffer);
    call.y = staging.staged(y, buffer);
    if (more) {
        staging.fetch(call.epilogue.residual, buffer + staging.buffer_size);
        call.epilogue.residual = staging.staged(call.epilogue.residual, buffer + staging.buffer_size);
    }
    __syncwarp();
    const long long spatial = staging.plane < call.channel_tiles ? call.spatial : 0;
    forward_scope<SUBWARP, RESIDENCY, THREADS, VECS_PER_THREAD>(call, staging.plane, spatial);
    __syncwarp();
    staging.put(y, buffer);
}

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void forward(ForwardArguments call) {
    without_epilogue(call.epilogue);
    if (!grouped<SCOPE>) call.group = {1, 0, 0};
    if constexpr (SCOPE == SUBWARP) forward_subwarp<RESIDENCY, THREADS, VECS_PER_THREAD>(call);
    else each_scope<SCOPE, Partition<SCOPE, THREADS>>(call.group, call.channel_tiles, [&](long long scope_index) {
        forward_scope<SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD>(call, scope_index, call.spatial);
    });
}
