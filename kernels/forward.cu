// Forward, one launch: an owner reads its planes once, takes their statistics on chip and writes y.
//
//     y = ((x - mean) - delta) * (rstd * weight) + bias,   rstd = 1 / sqrt(squares / count + eps)
//
// Macros: STORAGE_..., V, CHANNELS_LAST (types.cuh, plane.cuh), and LADDER, a list of RUNG(name, owner, rest, threads,
// chunks, blocks): the kernels to make, and how many blocks of each must fit on a multiprocessor.
// mean, rstd and variance (unbiased) have N * C elements and may be null, like weight and bias.

#include "types.cuh"
#include "plane.cuh"
#include "sums.cuh"
#include "moments.cuh"

template <int OWNER, int REST, int THREADS, int CHUNKS>
__device__ inline void forward(const Tensor& x, const Tensor& y, const void* weight, const void* bias, int wide,
                               Math* mean, Math* rstd, Math* variance, long long channels, long long spatial,
                               long long stripes, int lanes, int chunks, double eps) {
    unsigned char* shared = shared_memory();
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= stripes) return;
    const Owner share(owner, 1, REST == REGISTERS ? CHUNKS : chunks, lanes, x, channels, spatial);

    Math* scratch = (Math*)(shared + chunks * THREADS * sizeof(Pack) * (REST == SHARED));
    Rest<REST, THREADS, CHUNKS> rest((Pack*)shared);
    const Moments m = moments_of_tile<OWNER>(share, x, rest, chunks, scratch);

    Math inverse[P], scale[P], shift[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const bool exists = share.c + p < channels;
        inverse[p] = reciprocal_sqrt(m.squares[p] / share.count() + (Math)eps);
        scale[p] = weight && exists ? inverse[p] * load_parameter(weight, wide & WIDE_WEIGHT, share.c + p) : inverse[p];
        shift[p] = bias && exists ? load_parameter(bias, wide & WIDE_BIAS, share.c + p) : 0;
    }
    share.each_plane(channels, [&](int p, long long i) {
        if (mean) store(mean + i, m.mean[p] + m.delta[p]);
        if (rstd) store(rstd + i, inverse[p]);
        if (variance) store(variance + i, m.squares[p] / (share.count() - 1));
    });
    write_tile(share, y, rest, chunks, [&](int p, Math value) {
        return ((value - m.mean[p]) - m.delta[p]) * scale[p] + shift[p];
    });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS)                                                              \
    KERNEL(THREADS, BLOCKS) forward_##NAME(                                                                           \
        Storage* x, long long xn, long long xc, long long xs, Storage* y, long long yn, long long yc, long long ys,   \
        const void* weight, const void* bias, int wide, Math* mean, Math* rstd, Math* variance, long long channels,   \
        long long spatial, long long stripes, int lanes, int chunks, double eps) {                                    \
        forward<OWNER, REST, THREADS, CHUNKS>(Tensor{x, xn, xc, xs}, Tensor{y, yn, yc, ys}, weight, bias, wide,       \
                                              mean, rstd, variance, channels, spatial, stripes, lanes, chunks, eps);  \
    }
LADDER
