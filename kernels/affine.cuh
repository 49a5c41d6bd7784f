// The affine parameters: one number a channel, or one for each sample and channel.

struct Affine {
    const void *weight, *bias;      // may be null
    int flags;
};

struct AffineOfThread {
    Math weight[P], bias[P];

    template <class Share>
    __device__ AffineOfThread(const Share& share, const Affine& affine, long long channels) {
        const int flags = affine.flags;
        const bool exists = share.exists(channels);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long c = share.c + p, i = share.n * channels + c;
            weight[p] = affine.weight && exists
                ? load_parameter(affine.weight, flags & WIDE_WEIGHT, flags & SAMPLE_WEIGHT ? i : c) : 1;
            bias[p] = affine.bias && exists
                ? load_parameter(affine.bias, flags & WIDE_BIAS, flags & SAMPLE_BIAS ? i : c) : 0;
        }
    }
};
