// Sums over a scope, in an order fixed by the thread numbers: the same bits every run.

#ifndef CUPYNORM_SUMS
#define CUPYNORM_SUMS

#include "partition.cuh"

// Fold the sums that a thread keeps into one for each plane that it sees.
__device__ inline void fold(const Math (&s)[LINES], Math* out) {
    if (CHANNELS_LAST) {
        #pragma unroll
        for (int v = 0; v < VEC_SIZE; v++) out[plane_of(v)] = s[line_of(v)];
    } else {
        Math t[LINES];
        #pragma unroll
        for (int i = 0; i < LINES; i++) t[i] = s[i];
        #pragma unroll
        for (int width = LINES / 2; width > 0; width /= 2) {
            #pragma unroll
            for (int i = 0; i < width; i++) t[i] += t[i + width];
        }
        out[0] = t[0];
    }
}

// any(so) over the threads that sum together, since all of them must take the same branch afterwards.
template <int SCOPE, int THREADS> __device__ inline bool any_of_scope(bool so, int channel_vecs) {
    if (SCOPE == SUBWARP || SCOPE == WARP) return __any_sync(0xffffffff, so);
    return CHANNELS_LAST && channel_vecs > 1 ? __syncthreads_or(so) : so;
}

// Scratch of one sum_over_scope of K sums over a block of THREADS, in elements of the sums.
template <int THREADS> __device__ constexpr int scratch_size(int channel_vecs, int K) {
    return THREADS / 32 * channel_vecs * K;
}

// Add up the K sums of lanes at distances from `most` down to `least`, powers of two, in every lane.
template <int K, class T> __device__ inline void sum_over_lanes(T (&s)[K], int most, int least) {
    for (int distance = most; distance >= least; distance /= 2) {
        #pragma unroll
        for (int k = 0; k < K; k++) s[k] += __shfl_xor_sync(0xffffffff, s[k], distance);
    }
}

// Replace the K sums of every thread by the totals over the scope's threads of the same channel vec (over `size`
// neighbouring threads if the scope is SUBWARP).
// Consecutive calls must alternate between two scratch areas of scratch_size() each: that saves a second barrier.
template <int SCOPE, int THREADS, int K, class T>
__device__ inline void sum_over_scope(T (&s)[K], int size, int channel_vecs, T* scratch) {
    sum_over_lanes(s, SCOPE == SUBWARP ? size / 2 : 16, channel_vecs);
    // Shuffles do not order memory accesses: without this, y may overwrite x before other lanes read it (staging.cuh).
    if (SCOPE == SUBWARP) __syncwarp();
    if (SCOPE == SUBWARP || SCOPE == WARP) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane < channel_vecs) {
        #pragma unroll
        for (int k = 0; k < K; k++) scratch[(warp * channel_vecs + lane) * K + k] = s[k];
    }
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < K; k++) s[k] = 0;
    const int warps = THREADS / 32, vec = lane & (channel_vecs - 1);
    // In a large block the lanes of a channel vec add up the sums of some warps each, then each other's: fewer additions.
    constexpr bool shared_out = CHANNELS_LAST && THREADS >= 512;
    const int log_width = shared_out ? log2_of(channel_vecs) : 0;
    const int lanes = shared_out ? min(32 >> log_width, warps) : 1;
    for (int w = shared_out ? (lane >> log_width) & (lanes - 1) : 0; w < warps; w += lanes) {
        #pragma unroll
        for (int k = 0; k < K; k++) s[k] += scratch[(w * channel_vecs + vec) * K + k];
    }
    if (shared_out) sum_over_lanes(s, lanes << log_width >> 1, channel_vecs);
}

#endif
