// Backward of a training forward, one launch: an owner reads its planes of x and dy once and writes dx.
//
//     dx = weight * rstd * ((dy - sum(dy) / count) - xhat * (sum(dy * xhat) / count)),   xhat = (c - delta) * rstd
//
// with c = x - mean. The saved mean is rounded: delta = mean(c) is what it lost, found again from x, which is on chip
// anyway, so that all three sums travel in one exchange: sum(dy * xhat) = rstd * (sum(dy * c) - delta * sum(dy)).
//
// Macros as in forward.cu. sum_dy and sum_dy_xhat have N * C elements and may be null.

#include "types.cuh"
#include "plane.cuh"
#include "sums.cuh"
#include "gradient.cuh"

template <int OWNER, int REST, int THREADS, int CHUNKS>
__device__ inline void backward(const Tensor& x, const Tensor& dy, const Tensor& dx, const Math* mean, const Math* rstd,
                                const void* weight, int wide, Math* sum_dy, Math* sum_dy_xhat, long long channels,
                                long long spatial, long long stripes, int lanes, int chunks) {
    unsigned char* shared = shared_memory();
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid();
    if (owner >= stripes) return;
    const Owner share(owner, 1, REST == REGISTERS ? CHUNKS : chunks, lanes, x, channels, spatial);

    const int tile = chunks * THREADS * (REST == SHARED);
    Math* scratch = (Math*)(shared + 2 * tile * sizeof(Pack));
    Rest<REST, THREADS, CHUNKS> rest_x((Pack*)shared), rest_dy((Pack*)shared + tile);
    const Statistics stat(share, mean, rstd, weight, wide, channels);
    Math sums[3 * P];
    gradient_sums<OWNER>(share, x, dy, rest_x, rest_dy, chunks, stat, sums, scratch);

    Gradient g;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const Math delta = sums[2 * P + p] / share.count();
        g.set(p, sums[p], (sums[P + p] - delta * sums[p]) * stat.rstd[p], delta, share.count());
    }
    share.each_plane(channels, [&](int p, long long i) {
        if (sum_dy) store(sum_dy + i, g.sum_dy[p]);
        if (sum_dy_xhat) store(sum_dy_xhat + i, g.sum_dy_xhat[p]);
    });

    write_tile(share, dx, rest_x, rest_dy, chunks, [&](int p, Math x_, Math dy_) { return g.dx(p, x_, dy_, stat); });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS)                                                              \
    KERNEL(THREADS, BLOCKS) backward_##NAME(                                                                          \
        Storage* x, long long xn, long long xc, long long xs, Storage* dy, long long dyn, long long dyc,              \
        long long dys, Storage* dx, long long dxn, long long dxc, long long dxs, const Math* mean, const Math* rstd,  \
        const void* weight, int wide, Math* sum_dy, Math* sum_dy_xhat, long long channels, long long spatial,         \
        long long stripes, int lanes, int chunks) {                                                                   \
        backward<OWNER, REST, THREADS, CHUNKS>(                                                                       \
            Tensor{x, xn, xc, xs}, Tensor{dy, dyn, dyc, dys}, Tensor{dx, dxn, dxc, dxs}, mean, rstd, weight, wide,    \
            sum_dy, sum_dy_xhat, channels, spatial, stripes, lanes, chunks);                                          \
    }
LADDER
