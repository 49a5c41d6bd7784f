// Types: three named things.
//
//   Storage  how an element lies in memory      float, half, bfloat16 or double (STORAGE_... is defined)
//   Math     what the threads of one owner compute and add up in: float, or double for double
//   Accum    what tiles of a plane, and planes of a channel, are merged in: always double
//
// A Pack is what one thread moves in one access: V elements, 16 bytes wherever alignment allows, else one.
// Global memory is touched through load() and store() only, so that the emulator can count and check every byte.
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

struct alignas(V * sizeof(Storage)) Pack { Storage v[V]; };

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
    // Opaque on purpose: the compiler would keep the wide values in registers between passes, and spill.
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
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}
template <class T> __device__ inline T load(const T* p) { return *p; }
template <class T> __device__ inline void store(T* p, T value) { *p = value; }
#if V > 1
// Spelled out: the compiler takes the assignment of a Pack apart, and does not always find one store for it again.
__device__ inline void store(Pack* p, const Pack& value) {
    unsigned w[4];
    memcpy(w, &value, sizeof(Pack));
    if (sizeof(Pack) == 16) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :: "l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
    } else asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(p), "r"(w[0]), "r"(w[1]) : "memory");
}
#endif
#if defined(STORAGE_FLOAT64)
__device__ inline Math reciprocal_sqrt(Math m) { return 1.0 / sqrt(m); }
#else
__device__ inline Math reciprocal_sqrt(Math m) { return __frsqrt_rn(m); }
#endif
#endif

// Parameters and running statistics are stored in Math ("wide") or in Storage, each array for itself.
enum { WIDE_WEIGHT = 1, WIDE_BIAS = 2, WIDE_RUNNING_MEAN = 4, WIDE_RUNNING_VAR = 8 };

__device__ inline Math load_parameter(const void* data, bool wide, long long i) {
    return wide ? load((const Math*)data + i) : widen(load((const Storage*)data + i));
}

__device__ inline void store_parameter(void* data, bool wide, long long i, Math value) {
    if (wide) store((Math*)data + i, value);
    else store((Storage*)data + i, narrow(value));
}
