// Types of numbers:
//
//   Storage  for elements in memory: float, half, bfloat16 or double (STORAGE_... is defined)
//   Math     for computing and summing within a scope: float, or double for double
//   Accum    for merging tiles of a plane, and planes of a channel: always double
//
// A Vec is the VEC_SIZE elements that one thread moves in one access: 16 bytes if alignment allows (channels-last at
// most 4 elements), otherwise one element.
// Global memory is accessed only through load() and store(), so that the emulator can count and check every byte.
// The 16-bit types are bare bits here: the toolkit's headers would triple the compile time.

typedef double Accum;

#if defined(STORAGE_FLOAT32)
typedef float Storage;
typedef float Math;
#elif defined(STORAGE_FLOAT64)
typedef double Storage;
typedef double Math;
#elif defined(STORAGE_FLOAT16) || defined(STORAGE_BFLOAT16)
struct Storage { unsigned short bits; };
typedef float Math;
#else
#error "define one of STORAGE_FLOAT16, STORAGE_BFLOAT16, STORAGE_FLOAT32, STORAGE_FLOAT64"
#endif

struct alignas(VEC_SIZE * sizeof(Storage)) Vec { Storage v[VEC_SIZE]; };

constexpr int WIDEST = 16 / sizeof(Storage);
struct alignas(16) Wide { Storage v[WIDEST]; };

#if defined(STORAGE_FLOAT32) || defined(STORAGE_FLOAT64)
__device__ inline Math widen(Storage s) { return s; }
__device__ inline Storage narrow(Math m) { return m; }
#elif defined(SIMT)
__device__ inline Math widen(Storage s) { return simt::widen16(s.bits); }
__device__ inline Storage narrow(Math m) { return Storage{simt::narrow16(m)}; }
#elif defined(STORAGE_FLOAT16)
__device__ inline Math widen(Storage s) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(s.bits));
    return f;
}
__device__ inline Storage narrow(Math m) {
    Storage s;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(s.bits) : "f"(m));
    return s;
}
#else
__device__ inline Math widen(Storage s) {
    // Opaque on purpose: otherwise the compiler keeps the wide values in registers between passes, and spills.
    float f;
    asm("mov.b32 %0, {%2, %1};" : "=f"(f) : "h"(s.bits), "h"((unsigned short)0));
    return f;
}
__device__ inline Storage narrow(Math m) {
    Storage s;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(s.bits) : "f"(m));
#else
    // Round to nearest even by hand; a NaN stays a NaN although its payload is cut.
    unsigned u = __float_as_uint(m);
    s.bits = m != m ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#endif
    return s;
}
#endif

#if !defined(SIMT)
#define KERNEL(THREADS, BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define CLUSTER_OF(SIZE) __cluster_dims__(SIZE, 1, 1)
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}
#if GROUPED
// For the blocks of a cluster: the barrier in two halves, and the same place in another block's shared memory. Arriving
// orders no memory accesses: a thread that has written data for others needs a fence before it, which takes as long as
// a fence of the whole GPU.
#if __CUDA_ARCH__ >= 900
__device__ inline void cluster_fence() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
__device__ inline void cluster_arrive() { __cluster_barrier_arrive_relaxed(); }
__device__ inline void cluster_wait() { __cluster_barrier_wait(); }
template <class T> __device__ inline T* peer(T* p, unsigned rank) { return (T*)__cluster_map_shared_rank(p, rank); }
#endif
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
#endif
template <class T> __device__ inline T load(const T* p) { return *p; }
template <class T> __device__ inline void store(T* p, T value) { *p = value; }
// Refer to a value in shared memory: the emulator checks that it is there.
template <class T> __device__ inline T& in_shared(T* p) { return *p; }
// Spelled out: the compiler splits the assignment of a Vec, and does not always combine it into one store again.
template <class T> __device__ inline void store_words(T* p, const T& value) {
    unsigned w[4];
    memcpy(w, &value, sizeof(T));
    if (sizeof(T) == 16) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :: "l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
    } else asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}
__device__ inline void store(Wide* p, const Wide& value) { store_words(p, value); }
#if VEC_SIZE > 1
__device__ inline void store(Vec* p, const Vec& value) { store_words(p, value); }
#endif
#if defined(STORAGE_FLOAT64)
__device__ inline Math reciprocal_sqrt(Math m) { return 1.0 / sqrt(m); }
#else
__device__ inline Math reciprocal_sqrt(Math m) { return __frsqrt_rn(m); }
__device__ inline float reciprocal(float f) { return __frcp_rn(f); }
#endif
#endif

// Call f(answer) with the answer as a constant: the code of f exists for each answer, without a branch in its loops.
template <class F> __device__ inline void with_constant(bool answer, F f) {
    if (answer) f(true);
    else f(false);
}

// An array as the kernels see it: strides in elements between samples, channels and spatial positions.
struct Tensor {
    Storage* data;
    long long n, c, s;
};

// Flags say how arrays of per-channel or per-plane numbers are stored; cupynorm/cuda/arguments.py defines them. WIDE_...:
// in Math, else in Storage. SAMPLE_...: one number per sample and channel, else one per channel. NARROW_...: sums in
// Storage, else in Math.

__device__ inline Math load_parameter(const void* data, bool wide, long long i) {
    return wide ? load((const Math*)data + i) : widen(load((const Storage*)data + i));
}

// Load K numbers from place `first` on; without data, each is `missing`.
template <int K>
__device__ inline void load_parameters(Math (&to)[K], const void* data, bool wide, long long first, Math missing) {
    if (!data) {
        #pragma unroll
        for (int k = 0; k < K; k++) to[k] = missing;
    } else if (wide) {
        #pragma unroll
        for (int k = 0; k < K; k++) to[k] = load((const Math*)data + first + k);
    } else {
        #pragma unroll
        for (int k = 0; k < K; k++) to[k] = widen(load((const Storage*)data + first + k));
    }
}

__device__ inline void store_parameter(void* data, bool wide, long long i, Math value) {
    if (wide) store((Math*)data + i, value);
    else store((Storage*)data + i, narrow(value));
}
