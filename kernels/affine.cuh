// The affine parameters: one number per channel, or one per sample and channel.

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
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long c = partition.c + p, i = partition.n * channels + c;
            weight[p] = affine.weight && exists
                ? load_parameter(affine.weight, flags & WIDE_WEIGHT, flags & SAMPLE_WEIGHT ? i : c) : 1;
            bias[p] = affine.bias && exists
                ? load_parameter(affine.bias, flags & WIDE_BIAS, flags & SAMPLE_BIAS ? i : c) : 0;
        }
    }
};
