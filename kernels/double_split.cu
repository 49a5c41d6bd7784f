// Double backward of planes that do not stay on chip, in the three steps of split.cu; double.cuh has the formulas.
//
//     partial   products_*          one scope per tile   -> the tile's element count, shifts and sums
//     merge     merge_products      one block per plane  -> the plane's Coefficients and sum for the gradient of weight
//     apply     apply_products_*    one scope per tile   -> ddy and dx; in reverse: the tiles read last are in L2

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

constexpr int PARTIAL_NUMBERS = 3 + QUANTITIES;     // numbers per tile: element count, shifts, sums
constexpr int COEFFICIENTS = sizeof(Coefficients) / sizeof(Math);

template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void products(const Inputs& inputs, const Tensor& dx, const Math* mean, const Math* rstd,
                                Math* partial, long long planes, const Tiles& tiles) {
    unsigned char* shared = shared_memory();
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, dx, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Math* scratch = (Math*)shared;
        InputTiles<REGISTERS, THREADS, VECS_PER_THREAD> tile;
        const Stats stat(partition, true, mean, rstd, tiles.channels);
        const Products m = products_of_tile<SCOPE>(partition, inputs, tile, VECS_PER_THREAD, stat, scratch,
                                                   scratch + scratch_size<THREADS>(partition.channel_vecs, 2 * P));
        partition.each_plane(tiles.channels, [&](int p, long long i) {
            Math* to = partial + i * tiles.tiles + partition.tile;
            const long long step = planes * tiles.tiles;
            store(to, (Math)partition.count());
            store(to + step, m.shift_g[p]);
            store(to + 2 * step, m.shift_u[p]);
            #pragma unroll
            for (int q = 0; q < QUANTITIES; q++) store(to + (3 + q) * step, m.sums[q * P + p]);
        });
    });
}

template <int SCOPE, int THREADS, int VECS_PER_THREAD>
__device__ inline void apply_products(const Inputs& inputs, const Tensor& dx, const Tensor& ddy, const Math* mean,
                                      const Math* rstd, const Parameters& affine_parameters, const Math* coefficients,
                                      long long planes, const Tiles& tiles) {
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, dx, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const bool more = inputs.ddx.data;
        InputTiles<REGISTERS, THREADS, VECS_PER_THREAD> tile;
        tile.x.read(partition, inputs.x, 0);
        tile.dy.read(partition, inputs.dy, 0);
        if (more) tile.ddx.read(partition, inputs.ddx, 0);
        const Stats stat(partition, true, mean, rstd, tiles.channels);
        const ParametersOfThread parameters(partition, affine_parameters, tiles.channels);
        DoubleGradient d;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            Math m[COEFFICIENTS];
            const bool exists = partition.c + p < tiles.channels;
            const Math* from = coefficients + partition.n * tiles.channels + partition.c + p;
            #pragma unroll
            for (int q = 0; q < COEFFICIENTS; q++) m[q] = exists ? load(from + q * planes) : 0;
            d.set(p, Coefficients{m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]}, parameters);
        }
        write_both(partition, ddy, dx, tile, VECS_PER_THREAD, more, stat, d);
    });
}

#define VARIANT(NAME, SCOPE, RESIDENCY, THREADS, VECS_PER_THREAD, BLOCKS, CLUSTER_SIZE)                               \
    KERNEL(THREADS, BLOCKS) products_##NAME(INPUT_PARAMETERS, TENSOR(dx), const Math* mean, const Math* rstd,         \
                                            Math* partial, long long planes, TILES_PARAMETERS) {                      \
        products<SCOPE, THREADS, VECS_PER_THREAD>(INPUTS, OF(dx), mean, rstd, partial, planes, TILES_OF);             \
    }                                                                                                                 \
    KERNEL(THREADS, BLOCKS) apply_products_##NAME(INPUT_PARAMETERS, TENSOR(dx), TENSOR(ddy), KNOWN_PARAMETERS,        \
                                                  const Math* coefficients, long long planes, TILES_PARAMETERS) {     \
        apply_products<SCOPE, THREADS, VECS_PER_THREAD>(INPUTS, OF(dx), OF(ddy), mean, rstd, PARAMETERS,              \
                                                        coefficients, planes, TILES_OF);                              \
    }
VARIANTS

constexpr int MERGE_THREADS = 256;

// Partials lie as [number][plane][tile], coefficients as [number][plane]. sums may be null; it is dweight itself if
// that has one number per plane.
KERNEL(MERGE_THREADS, 1) merge_products(const Math* partial, long long all_planes, long long tiles, long long first,
                                        long long planes, long long spatial, const Math* rstd, Math* coefficients,
                                        void* sums, int flags) {
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
    sum_over_scope<BLOCK, MERGE_THREADS>(s, MERGE_THREADS, 1, (Accum*)shared);
    if (threadIdx.x != 0) return;
    const Coefficients m = coefficients_of<Accum>(spatial, base_g, base_u, scale, s[OF_X], s[OF_G], s[OF_U],
                                                  s[OF_GX], s[OF_VX], s[OF_VG]);
    const Math numbers[COEFFICIENTS] = {m.shift_g, m.shift_u, m.g, m.v, m.x, m.a, m.c, m.s};
    #pragma unroll
    for (int q = 0; q < COEFFICIENTS; q++) store(coefficients + q * all_planes + plane, numbers[q]);
    Sums{0, sums, flags}.set_dy_xhat(plane, m.s * (Math)spatial);
}
