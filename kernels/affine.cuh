// The affine parameters: one number per channel, or one per sample and channel.

#ifndef CUPYNORM_AFFINE
#define CUPYNORM_AFFINE

#include "partition.cuh"

struct Affine {
    const void *weight, *bias;      // may be null
    int flags;
};

struct AffineOfThread {
    Math weight[P], bias[P];

    template <class Partition>
    __device__ AffineOfThread(const Partition& partition, const Affine& affine, long long channels) {
        const int flags = affine.flags;
        const bool exists = partition.exists(channels);
        const long long c = partition.c, i = partition.n * channels + c;
        load_parameters(weight, exists ? affine.weight : 0, flags & WIDE_WEIGHT, flags & SAMPLE_WEIGHT ? i : c, 1);
        load_parameters(bias, exists ? affine.bias : 0, flags & WIDE_BIAS, flags & SAMPLE_BIAS ? i : c, 0);
    }
};

#endif
