// Types of numbers:
//
//   Storage  for elements in memory: float, half, bfloat16 or double (STORAGE_... is defined)
//   Math     for computing and summing within a scope: float, or double for double
//   Accum    for merging tiles of a plane, and planes of a channel: always double
//
// A Vec is the VEC_SIZE elements that one thread moves in one access: 16 bytes if alignment allows (channels-last at
// most 4 elements), otherwise one element.
// The 16-bit types are bare bits here: the toolkit's headers would triple the compile time.
//
// The text of each module begins with its constants (cupynorm/cuda/source.py): the macro STORAGE_..., and the numbers
// VEC_SIZE, CHANNELS_LAST, MISALIGNED, EPILOGUE, READ_AHEAD, the bits of flags, and those of ops.py.

#ifndef CUPYNORM_TYPES
#define CUPYNORM_TYPES

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

constexpr bool FLOAT64 = sizeof(Math) == 8;

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

#endif
