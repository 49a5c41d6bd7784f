// Vecs that begin at any address. Each is combined from the two aligned vecs in which it lies.

#ifndef CUPYNORM_UNALIGNED
#define CUPYNORM_UNALIGNED

#include "device.cuh"

// The vec that begins `offset` elements into two adjacent vecs. Words move by the powers of two in the distance, so
// indices are constants and all words stay in registers.
template <class T> __device__ inline VecOf<T> realigned(const VecOf<T>& a, const VecOf<T>& b, int offset) {
    static_assert(sizeof(VecOf<T>) == 16, "as four words");
    unsigned w[8];
    memcpy(w, &a, 16);
    memcpy(w + 4, &b, 16);
    const int bytes = offset * (int)sizeof(T);
    #pragma unroll
    for (int step = 2; step > 0; step /= 2) {
        #pragma unroll
        for (int i = 0; i + step < 8; i++) w[i] = bytes & 4 * step ? w[i + step] : w[i];
    }
    if (sizeof(T) == 2) {
        #pragma unroll
        for (int i = 0; i < 4; i++) w[i] = bytes & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
    }
    VecOf<T> vec;
    memcpy(&vec, w, 16);
    return vec;
}

// Load the vec at p, which has the elements from `position` on. Elements outside [lo, hi) are not read.
template <class T> __device__ inline VecOf<T> load_unaligned(const VecOf<T>* p, int position, int lo, int hi) {
    const int offset = (int)((unsigned long long)p / sizeof(T) % VEC_SIZE);
    if (offset == 0) return load(p);
    const VecOf<T>* border = (const VecOf<T>*)((const T*)p - offset);
    if (position - offset >= lo && position - offset + 2 * VEC_SIZE <= hi) {
        return realigned(load(border), load(border + 1), offset);
    }
    VecOf<T> vec;
    #pragma unroll
    for (int v = 0; v < VEC_SIZE; v++) vec.v[v] = load((const T*)p + v);
    return vec;
}

// Store a vec at p, element by element if it is not aligned there.
__device__ inline void store_unaligned(Vec* p, const Vec& vec) {
    if ((unsigned long long)p % sizeof(Vec) == 0) {
        store(p, vec);
        return;
    }
    #pragma unroll
    for (int v = 0; v < VEC_SIZE; v++) store((Storage*)p + v, vec.v[v]);
}

#endif
