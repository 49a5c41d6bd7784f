// Backward of a training forward, one launch: a scope reads its planes of x and dy once and writes dx.
//
//     dx = weight * rstd * (g - sum(g) / count - xhat * (sum(g * xhat) / count) * slope)
//
// with xhat = ((x - mean) - mean_lo) * rstd and slope = rstd_slope of scale.cuh, usually 1.
//
// with g = dy * activation'(z), or g = dy without an epilogue.
// sums.dy and sums.dy_xhat have N * C elements and may be null.

#include "gradient.cuh"
#include "group.cuh"
#include "staging.cuh"

struct BackwardArguments {
    Tensor x, dy, dx;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;
    Mask mask;
    const long long* count;         // with a mask: of each plane
    Sums sums;
    long long channels, spatial, channel_tiles;
    int subdivision, vecs_per_thread;
    Scale scale;
    Group group;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void backward_scope(const BackwardArguments& call, long long scope_index, long long spatial) {
    const int vecs_per_thread = RESIDENCY == REGISTERS && !grouped<SCOPE> ? VECS_PER_THREAD : call.vecs_per_thread;
    const Partition<SCOPE, THREADS> partition(scope_index, call.group.tiles, vecs_per_thread, call.subdivision, call.dx,
                                              call.channels, spatial);
    unsigned char* shared = shared_memory();
    const int vecs = call.vecs_per_thread * THREADS * (RESIDENCY == SHARED);
    unsigned char* bits = shared + 2 * vecs * sizeof(Vec);
    unsigned char* scratch = bits + mask_bytes<RESIDENCY, THREADS>(call.vecs_per_thread);
    Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x((Vec*)shared), tile_dy((Vec*)shared + vecs);
    const AffineStats stat(partition, call.mean, call.mean_lo, call.rstd, call.affine, call.channels);
    const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD> mask(partition, call.mask, call.vecs_per_thread, bits);
    Math sums[BACKWARD_SUMS * P];
    gradient_sums_of_tile<SCOPE>(partition, call.x, call.dy, call.epilogue, call.dresidual, tile_x, tile_dy,
                                 call.vecs_per_thread, stat, sums, (Math*)scratch, mask);
    const int area = scratch_size<THREADS>(partition.channel_vecs, BACKWARD_MERGED * P * sizeof(Accum));
    Exchange<SCOPE> exchange(call.group, scope_index, partition.channel_vecs * P * BACKWARD_PARTIALS,
                             (Math*)(scratch + 2 * area));
    if constexpr (grouped<SCOPE>) {
        merge_gradient_sums_of_tiles<THREADS>(partition, sums, call.group.tiles, exchange, (Accum*)(scratch + area));
    }

    Gradient g;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const Math count = count_of_plane(partition, p, call.count, call.channels, spatial);
        const Math slope = call.scale.usual() ? 1 : rstd_slope(stat.rstd[p] * stat.unit[p], count, call.scale);
        const Divisor divide(count);
        g.set(p, divide.quotient(sums[OF_DY * P + p]), divide.quotient(sums[OF_DY_XHAT * P + p]) * slope, stat);
    }
    if (!grouped<SCOPE> || partition.tile == 0) partition.each_plane(call.channels, [&](int p, long long i) {
        call.sums.set(i, sums[OF_DY * P + p], sums[OF_DY_XHAT * P + p]);
    });
    write_tile(partition, call.dx, tile_x, tile_dy, call.vecs_per_thread,
               [&](int p, Math x, Math dy) { return g.dx(p, x, dy, stat); }, mask);
    exchange.end();
}

// SUBWARP: as in forward.cu. dx uses x's buffer; dresidual has its own.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void backward_subwarp(BackwardArguments call) {
    const Staging<VECS_PER_THREAD> staging(THREADS / 32, call.subdivision, call.spatial, call.channel_tiles);
    const Tensor dx = call.dx, dresidual = call.dresidual;
    const bool more = EPILOGUE && call.epilogue.residual.data;     // and then there is a dresidual
    unsigned char* shared = shared_memory();
    const int buffers = 2 + 2 * more;
    Storage* buffer = staging.buffers(shared, buffers);
    staging.fetch(call.x, buffer);
    staging.fetch(call.dy, buffer + staging.buffer_size);
    call.x = staging.staged(call.x, buffer);
    call.dy = staging.staged(call.dy, buffer + staging.buffer_size);
    call.dx = staging.staged(dx, buffer);
    if (more) {
        staging.fetch(call.epilogue.residual, buffer + 2 * staging.buffer_size);
        call.epilogue.residual = staging.staged(call.epilogue.residual, buffer + 2 * staging.buffer_size);
    }
    Storage* last = buffer + (buffers - 1) * staging.buffer_size;
    if (more) call.dresidual = staging.staged(dresidual, last);
    __syncwarp();
    const long long spatial = staging.plane < call.channel_tiles ? call.spatial : 0;
    backward_scope<SUBWARP, RESIDENCY, THREADS, VECS_PER_THREAD>(call, staging.plane, spatial);
    __syncwarp();
    staging.put(dx, buffer);
    if (more) staging.put(dresidual, last);
}

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void backward(BackwardArguments call) {
    without_epilogue(call.epilogue, call.dresidual, call.affine.bias);
    if (!grouped<SCOPE>) call.group = {1, 0, 0};
    if constexpr (SCOPE == SUBWARP) backward_subwarp<RESIDENCY, THREADS, VECS_PER_THREAD>(call);
    else each_scope<SCOPE, Partition<SCOPE, THREADS>>(call.group, call.channel_tiles, [&](long long scope_index) {
        backward_scope<SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD>(call, scope_index, call.spatial);
    });
}
