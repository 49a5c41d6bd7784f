// Sums over a scope, in an order fixed by the thread numbers: the same bits every run.

// Fold the sums a thread keeps into one for each plane it sees.
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

// Whether it is so for any plane of the threads that add up together: all of them must go the same way afterwards.
template <int SCOPE, int THREADS> __device__ inline bool any_of_scope(bool so, int channel_vecs) {
    if (SCOPE == SUBWARP || SCOPE == WARP) return __any_sync(0xffffffff, so);
    return CHANNELS_LAST && channel_vecs > 1 ? __syncthreads_or(so) : so;
}

// Scratch of one exchange of K sums over a block of THREADS, in elements of the sums.
template <int THREADS> __device__ constexpr int scratch_size(int channel_vecs, int K) {
    return THREADS / 32 * channel_vecs * K;
}

// K sums of every thread become the totals over the scope's threads of the same channel vec (of `size` neighbouring
// threads, if the scope is part of a warp); every thread gets them.
// Consecutive calls must alternate between two scratch areas of scratch_size() each: that saves a second barrier.
template <int SCOPE, int THREADS, int K, class T>
__device__ inline void sum_over_scope(T (&s)[K], int size, int channel_vecs, T* scratch) {
    for (int distance = SCOPE == SUBWARP ? size / 2 : 16; distance >= channel_vecs; distance /= 2) {
        #pragma unroll
        for (int k = 0; k < K; k++) s[k] += __shfl_xor_sync(0xffffffff, s[k], distance);
    }
    // Shuffles do not order memory accesses, and y overwrites the x that other lanes still have to read (staging.cuh).
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
    for (int w = 0; w < THREADS / 32; w++) {
        #pragma unroll
        for (int k = 0; k < K; k++) s[k] += scratch[(w * channel_vecs + lane % channel_vecs) * K + k];
    }
}
