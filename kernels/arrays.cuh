// Arrays as the kernels see them.

#ifndef CUPYNORM_ARRAYS
#define CUPYNORM_ARRAYS

#include "device.cuh"

// An array of the elements of planes: strides in elements between samples, channels and spatial positions.
template <class T> struct TensorOf {
    T* data;
    long long n, c, s;
};
typedef TensorOf<Storage> Tensor;

// Flags say how arrays of per-channel or per-plane numbers are stored (cupynorm/cuda/arguments.py). WIDE_...: in Math,
// else in Storage. SAMPLE_...: one number per sample and channel, else one per channel. NARROW_...: sums in Storage,
// else in Math.

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

// The sums of each plane, in Math, or in Storage if they are themselves the gradient of a per-sample parameter.
struct Sums {
    void *dy, *dy_xhat;             // may be null
    int flags;

    __device__ void set(long long i, Math sum_dy, Math sum_dy_xhat) const {
        if (dy) store_parameter(dy, !(flags & NARROW_SUM_DY), i, sum_dy);
        set_dy_xhat(i, sum_dy_xhat);
    }
    __device__ void set_dy_xhat(long long i, Math sum) const {
        if (dy_xhat) store_parameter(dy_xhat, !(flags & NARROW_SUM_DY_XHAT), i, sum);
    }
};

#endif
