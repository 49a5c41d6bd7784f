// The device's primitives. Global memory is accessed only through load() and store(), so that the emulator, which has
// its own versions of all of these, can count and check every byte.

#ifndef CUPYNORM_DEVICE
#define CUPYNORM_DEVICE

#include "types.cuh"

#if !defined(SIMT)
#define KERNEL(THREADS, BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define CLUSTER_OF(SIZE) __cluster_dims__(SIZE, 1, 1)
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}
// For the blocks of a cluster: the barrier in two halves, and the same place in another block's shared memory. Arriving
// orders no memory accesses: a thread that has written data for others needs a fence before it, which takes as long as
// a fence of the whole GPU.
#if __CUDA_ARCH__ >= 900
__device__ inline void cluster_fence() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
__device__ inline void cluster_arrive() { __cluster_barrier_arrive_relaxed(); }
__device__ inline void cluster_wait() { __cluster_barrier_wait(); }
template <class T> __device__ inline T* peer(T* p, unsigned rank) { return (T*)__cluster_map_shared_rank(p, rank); }
#endif
// A number of which the compiler knows nothing: it would spread a product over each of the sums that contain it.
__device__ inline long long opaque(long long n) {
    asm("" : "+l"(n));
    return n;
}
// For the blocks of a grid: count one's own arrival, after all earlier stores; wait until the others are counted.
__device__ inline void add_release(unsigned* counter) {
    __threadfence();
    atomicAdd(counter, 1);
}
__device__ inline void wait_until(const unsigned* counter, unsigned target) {
    unsigned seen;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    while (seen < target);
}
// Load a value that another block may have just stored: not from the first-level cache.
template <class T> __device__ inline T load_fresh(const T* p) { return __ldcg(p); }
template <class T> __device__ inline T load(const T* p) { return *p; }
// Refer to a value in shared memory: the emulator checks that it is there.
template <class T> __device__ inline T& in_shared(T* p) { return *p; }
template <class T> constexpr bool is_vec = false;
template <class T> constexpr bool is_vec<VecOf<T>> = VEC_SIZE > 1;
template <> constexpr bool is_vec<Wide> = true;
// A vec is stored as words: the compiler splits its assignment, and does not always combine it into one store again.
template <class T> __device__ inline void store(T* p, const T& value) {
    if constexpr (is_vec<T>) {
        unsigned w[sizeof(T) / 4];
        memcpy(w, &value, sizeof(T));
        if constexpr (sizeof(T) == 16) {
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                         :: "l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
        } else if constexpr (sizeof(T) == 8) {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(p), "r"(w[0]), "r"(w[1]) : "memory");
        } else asm volatile("st.global.b32 [%0], %1;" :: "l"(p), "r"(w[0]) : "memory");
    } else *p = value;
}
__device__ inline float reciprocal_sqrt(float f) { return __frsqrt_rn(f); }
__device__ inline double reciprocal_sqrt(double d) { return 1.0 / sqrt(d); }
__device__ inline float reciprocal(float f) { return __frcp_rn(f); }
#endif

// The logarithm of a power of two, by which numbers are divided with a shift.
__device__ inline int log2_of(int n) { return 31 - __clz(n); }
__device__ constexpr int log2_of_constant(int n) { return n < 2 ? 0 : 1 + log2_of_constant(n / 2); }

// Call f(answer) with the answer as a constant: the code of f exists for each answer, without a branch in its loops.
template <class F> __device__ inline void with_constant(bool answer, F f) {
    if (answer) f(true);
    else f(false);
}

#endif
