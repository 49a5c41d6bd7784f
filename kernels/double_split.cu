// Double backward of planes that do not rest on chip, in the three steps of split.cu; double.cuh has the formulas.
//
//     partial   products_*          one owner a tile     -> its elements, pivots and sums
//     merge     merge_products      one block a plane    -> its Means, and the sum that is the weight's gradient
//     apply     apply_products_*    one owner a tile     -> ddy and dx, tiles in reverse: the last read are in L2

#include "types.cuh"
#include "plane.cuh"
#include "epilogue.cuh"
#include "affine.cuh"
#include "sums.cuh"
#include "unit.cuh"
#include "moments.cuh"
#include "gradient.cuh"
#include "double.cuh"
#include "tiles.cuh"

constexpr int PARTIAL = 3 + QUANTITIES;     // numbers of a tile: its elements, the pivots, the sums
constexpr int MEANS = sizeof(Means) / sizeof(Math);

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void products(const Given& given, const Tensor& dx, const Math* mean, const Math* rstd, Math* partial,
                                long long planes, const Tiles& tiles) {
    unsigned char* shared = shared_memory();
    each_tile<OWNER, THREADS, CHUNKS>(tiles, dx, false, [&](const Share<OWNER, THREADS>& share) {
        Math* scratch = (Math*)shared;
        Rests<REGISTERS, THREADS, CHUNKS> rest;
        const Standard stat(share, true, mean, rstd, tiles.channels);
        const Products m = products_of_tile<OWNER>(share, given, rest, CHUNKS, stat, scratch,
                                                   scratch + scratch_size<THREADS>(share.lanes, 2 * P));
        share.each_plane(tiles.channels, [&](int p, long long i) {
            Math* to = partial + i * tiles.tiles + share.tile;
            const long long step = planes * tiles.tiles;
            store(to, (Math)share.count());
            store(to + step, m.pivot_g[p]);
            store(to + 2 * step, m.pivot_u[p]);
            #pragma unroll
            for (int q = 0; q < QUANTITIES; q++) store(to + (3 + q) * step, m.sums[q * P + p]);
        });
    });
}

template <int OWNER, int THREADS, int CHUNKS>
__device__ inline void apply_products(const Given& given, const Tensor& dx, const Tensor& ddy, const Math* mean,
                                      const Math* rstd, const Parameters& given_parameters, const Math* means,
                                      long long planes, const Tiles& tiles) {
    each_tile<OWNER, THREADS, CHUNKS>(tiles, dx, true, [&](const Share<OWNER, THREADS>& share) {
        const bool more = given.ddx.data;
        Rests<REGISTERS, THREADS, CHUNKS> rest;
        rest.x.read(share, given.x, 0);
        rest.dy.read(share, given.dy, 0);
        if (more) rest.ddx.read(share, given.ddx, 0);
        const Standard stat(share, true, mean, rstd, tiles.channels);
        const ParametersOfThread parameters(share, given_parameters, tiles.channels);
        DoubleGradient d;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            Math m[MEANS];
            const bool exists = share.c + p < tiles.channels;
            const Math* from = means + share.n * tiles.channels + share.c + p;
            #pragma unroll
            for (int q = 0; q < MEANS; q++) m[q] = exists ? load(from + q * planes) : 0;
            d.set(p, Means{m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]}, parameters);
        }
        write_both(share, ddy, dx, rest, CHUNKS, more, stat, d);
    });
}

#define RUNG(NAME, OWNER, REST, THREADS, CHUNKS, BLOCKS, CLUSTER_SIZE)                                                \
    KERNEL(THREADS, BLOCKS) products_##NAME(GIVEN_PARAMETERS, TENSOR(dx), const Math* mean, const Math* rstd,         \
                                            Math* partial, long long planes, TILES_PARAMETERS) {                      \
        products<OWNER, THREADS, CHUNKS>(GIVEN, OF(dx), mean, rstd, partial, planes, TILES_OF);                       \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) apply_products_##NAME(GIVEN_PARAMETERS, TENSOR(dx), TENSOR(ddy), KNOWN_PARAMETERS,        \
                                                  const Math* means, long long planes, TILES_PARAMETERS) {            \
        apply_products<OWNER, THREADS, CHUNKS>(GIVEN, OF(dx), OF(ddy), mean, rstd, PARAMETERS, means, planes, TILES_OF);\
    }
LADDER

constexpr int MERGE_THREADS = 256;

// Partials lie as [number][plane][tile], means as [number][plane]. sums and dweight may be null; dweight is where the
// sums are the gradient already.
KERNEL(MERGE_THREADS, 1) merge_products(const Math* partial, long long all_planes, long long tiles, long long first,
                                        long long planes, long long spatial, const Math* rstd, Math* means, void* sums,
                                        int flags) {
    unsigned char* shared = shared_memory();
    const long long plane = first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= first + planes) return;
    const Math* row = partial + plane * tiles;
    const long long step = all_planes * tiles;
    const Accum base_g = load(row + step), base_u = load(row + 2 * step), scale = load(rstd + plane);
    Accum s[QUANTITIES] = {};
    for (long long tile = threadIdx.x; tile < tiles; tile += MERGE_THREADS) {
        const Math* at = row + tile;
        const Accum far_g = load(at + step) - base_g, far_u = load(at + 2 * step) - base_u;
        add_products(load(at), far_g, far_u, scale, [&](int i) { return (Accum)load(at + (3 + i) * step); },
                     [&](int i) -> Accum& { return s[i]; });
    }
    sum_over_owner<BLOCK, MERGE_THREADS>(s, MERGE_THREADS, 1, (Accum*)shared);
    if (threadIdx.x != 0) return;
    const Means m = means_of<Accum>(spatial, base_g, base_u, scale, s[OF_X], s[OF_G], s[OF_U], s[OF_GX], s[OF_VX], s[OF_VG]);
    const Math numbers[MEANS] = {m.pivot_g, m.pivot_u, m.g, m.v, m.x, m.a, m.c, m.s};
    #pragma unroll
    for (int q = 0; q < MEANS; q++) store(means + q * all_planes + plane, numbers[q]);
    Sums{0, sums, flags}.set_dy_xhat(plane, m.s * (Math)spatial);
}
