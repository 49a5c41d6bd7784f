// The affine parameters: one number per channel, or one per sample and channel.

#ifndef CUPYNORM_AFFINE
#define CUPYNORM_AFFINE

#include "partition.cuh"
#include "unit.cuh"

// Load the numbers of a thread's planes: one per channel, or, if `sample`, one per sample and channel. Without data,
// and for planes that do not exist, each is `missing`.
template <class Partition>
__device__ inline void load_of_planes(Math (&to)[P], const Partition& partition, long long channels, const void* data,
                                      bool wide, bool sample, Math missing) {
    const long long first = sample ? partition.n * channels + partition.c : partition.c;
    load_parameters(to, partition.exists(channels) ? data : 0, wide, first, missing);
}

struct Affine {
    const void *weight, *bias;      // may be null
    int flags;
};

struct AffineOfThread {
    Math weight[P], bias[P];

    template <class Partition>
    __device__ AffineOfThread(const Partition& partition, const Affine& affine, long long channels) {
        const int flags = affine.flags;
        load_of_planes(weight, partition, channels, affine.weight, flags & WIDE_WEIGHT, flags & SAMPLE_WEIGHT, 1);
        load_of_planes(bias, partition, channels, affine.bias, flags & WIDE_BIAS, flags & SAMPLE_BIAS, 0);
    }
};

// xhat * weight + bias for a thread's planes, with xhat = ((x - mean) - mean_lo) * rstd: y, or z without the residual.
struct Normalization {
    Math unit[P], mean[P], scale[P], offset[P];

    // With the plane's own statistics, in its unit.
    __device__ void set(int p, Math mean_, Math mean_lo, Math rstd, const AffineOfThread& affine) {
        const Unit u = unit_of(mean_, rstd);
        set(p, mean_, u, affine);
        offset[p] -= mean_lo * u.unit * scale[p];
    }
    __device__ void set(int p, Math mean_, const Unit& u, const AffineOfThread& affine) {
        unit[p] = u.unit;
        mean[p] = mean_ * u.unit;
        scale[p] = u.rstd * affine.weight[p];
        offset[p] = affine.bias[p];
    }
    __device__ Math z(int p, Math x) const { return (x * unit[p] - mean[p]) * scale[p] + offset[p]; }
};

#endif
