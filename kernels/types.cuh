// Types of numbers:
//
//   Storage  for elements of results, and of all inputs but x: float16, bfloat16, float32 or float64
//   Input    for elements of x: the same type, or another one, also 8- and 16-bit integers
//   Math     for computing and summing within a scope: float, or double if Storage or Input is
//   Accum    for merging tiles of a plane, and planes of a channel: always double
//
// A VecOf<T> is the VEC_SIZE elements that one thread moves in one access: 16 bytes of the wider type if alignment allows
// (channels-last at most 4 elements), otherwise one element.
// The 16-bit floats are bare bits here: the toolkit's headers would triple the compile time.
//
// The text of each module begins with its constants (cupynorm/cuda/source.py): the macros STORAGE and INPUT, which name
// types below, and the numbers VEC_SIZE, CHANNELS_LAST, MISALIGNED, EPILOGUE, READ_AHEAD, the modes of scale.cuh, the bits
// of flags, and those of ops.py.

#ifndef CUPYNORM_TYPES
#define CUPYNORM_TYPES

typedef unsigned char uint8;
typedef signed char int8;
typedef unsigned short uint16;
typedef short int16;
typedef float float32;
typedef double float64;
struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

typedef STORAGE Storage;
typedef INPUT Input;
typedef double Accum;

constexpr bool FLOAT64 = sizeof(Storage) == 8 || sizeof(Input) == 8;
template <bool> struct Precision { typedef float type; };
template <> struct Precision<true> { typedef double type; };
typedef Precision<FLOAT64>::type Math;

template <class T> struct alignas(VEC_SIZE * sizeof(T)) VecOf { T v[VEC_SIZE]; };
typedef VecOf<Storage> Vec;

constexpr int WIDEST = 16 / sizeof(Storage);
struct alignas(16) Wide { Storage v[WIDEST]; };

__device__ inline Math widen(float32 s) { return s; }
__device__ inline Math widen(float64 s) { return (Math)s; }
__device__ inline void set_narrow(float32& s, Math m) { s = (float32)m; }
__device__ inline void set_narrow(float64& s, Math m) { s = m; }

#if defined(SIMT)
__device__ inline Math widen(float16 s) { return simt::widen_float16(s.bits); }
__device__ inline Math widen(bfloat16 s) { return simt::widen_bfloat16(s.bits); }
__device__ inline Math widen(uint8 s) { return s; }
__device__ inline Math widen(int8 s) { return s; }
__device__ inline Math widen(uint16 s) { return s; }
__device__ inline Math widen(int16 s) { return s; }
__device__ inline void set_narrow(float16& s, Math m) { s.bits = simt::narrow_float16((float)m); }
__device__ inline void set_narrow(bfloat16& s, Math m) { s.bits = simt::narrow_bfloat16((float)m); }
#else
// Opaque on purpose: otherwise the compiler keeps the wide values in registers between passes, and spills.
__device__ inline Math widen(float16 s) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(s.bits));
    return f;
}
__device__ inline Math widen(bfloat16 s) {
    float f;
    asm("mov.b32 %0, {%2, %1};" : "=f"(f) : "h"(s.bits), "h"((unsigned short)0));
    return f;
}
__device__ inline Math widen(uint16 s) {
    float f;
    asm("cvt.rn.f32.u16 %0, %1;" : "=f"(f) : "h"(s));
    return f;
}
__device__ inline Math widen(int16 s) {
    float f;
    asm("cvt.rn.f32.s16 %0, %1;" : "=f"(f) : "h"(s));
    return f;
}
__device__ inline Math widen(uint8 s) { return widen((uint16)s); }
__device__ inline Math widen(int8 s) { return widen((int16)s); }
__device__ inline void set_narrow(float16& s, Math m) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(s.bits) : "f"((float)m)); }
__device__ inline void set_narrow(bfloat16& s, Math m) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(s.bits) : "f"((float)m));
#else
    // Round to nearest even by hand; a NaN stays a NaN although its payload is cut.
    unsigned u = __float_as_uint((float)m);
    s.bits = m != m ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#endif
}
#endif

__device__ inline Storage narrow(Math m) {
    Storage s;
    set_narrow(s, m);
    return s;
}

#endif
