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

struct ProductsArguments {
    Inputs inputs;
    Tensor dx;
    const Math *mean, *rstd;
    Math* partials;
    long long all_planes;
    Tiles tiles;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void products(const ProductsArguments& call) {
    unsigned char* shared = shared_memory();
    const Tiles& tiles = call.tiles;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, call.dx, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Math* scratch = (Math*)shared;
        InputTiles<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
        const Stats stat(partition, true, call.mean, call.rstd, tiles.channels);
        const Products m = products_of_tile<SCOPE>(partition, call.inputs, tile, VECS_PER_THREAD, stat, scratch,
                                                   scratch + scratch_size<THREADS>(partition.channel_vecs, 2 * P));
        partition.each_plane(tiles.channels, [&](int p, long long i) {
            Math* to = call.partials + i * tiles.tiles + partition.tile;
            const long long step = call.all_planes * tiles.tiles;
            store(to, (Math)partition.count());
            store(to + step, m.shift_g[p]);
            store(to + 2 * step, m.shift_u[p]);
            #pragma unroll
            for (int q = 0; q < QUANTITIES; q++) store(to + (3 + q) * step, m.sums[q * P + p]);
        });
    });
}

struct ApplyProductsArguments {
    Inputs inputs;
    Tensor dx, ddy;
    const Math *mean, *rstd;
    Parameters parameters;
    const Math* coefficients;
    long long all_planes;
    Tiles tiles;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void apply_products(const ApplyProductsArguments& call) {
    const Tiles& tiles = call.tiles;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(tiles, call.dx, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const bool more = call.inputs.ddx.data;
        InputTiles<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
        tile.x.read(partition, call.inputs.x, 0);
        tile.dy.read(partition, call.inputs.dy, 0);
        if (more) tile.ddx.read(partition, call.inputs.ddx, 0);
        const Stats stat(partition, true, call.mean, call.rstd, tiles.channels);
        const ParametersOfThread parameters(partition, call.parameters, tiles.channels);
        DoubleGradient d;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            Math m[COEFFICIENTS];
            const bool exists = partition.c + p < tiles.channels;
            const Math* from = call.coefficients + partition.n * tiles.channels + partition.c + p;
            #pragma unroll
            for (int q = 0; q < COEFFICIENTS; q++) m[q] = exists ? load(from + q * call.all_planes) : 0;
            d.set(p, Coefficients{m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]}, parameters);
        }
        write_both(partition, call.ddy, call.dx, tile, VECS_PER_THREAD, more, stat, d);
    });
}

constexpr int MERGE_THREADS = 256;

// Partials lie as [number][plane][tile], coefficients as [number][plane]. sums may be null; it is dweight itself if
// that has one number per plane.
struct MergeProductsArguments {
    const Math* partials;
    long long all_planes, tiles, first, planes, spatial;
    const Math* rstd;
    Math* coefficients;
    Sums sums;
};

KERNEL(MERGE_THREADS, 1) merge_products(MergeProductsArguments call) {
    unsigned char* shared = shared_memory();
    const long long plane = call.first + blockIdx.x + (long long)gridDim.x * blockIdx.y;
    if (plane >= call.first + call.planes) return;
    const Math* row = call.partials + plane * call.tiles;
    const long long step = call.all_planes * call.tiles;
    const Accum base_g = load(row + step), base_u = load(row + 2 * step), scale = load(call.rstd + plane);
    Accum s[QUANTITIES] = {};
    for (long long tile = threadIdx.x; tile < call.tiles; tile += MERGE_THREADS) {
        const Math* at = row + tile;
        const Accum far_g = load(at + step) - base_g, far_u = load(at + 2 * step) - base_u;
        add_products(load(at), far_g, far_u, scale, [&](int i) { return (Accum)load(at + (3 + i) * step); },
                     [&](int i) -> Accum& { return s[i]; });
    }
    sum_over_scope<BLOCK, MERGE_THREADS>(s, MERGE_THREADS, 1, (Accum*)shared);
    if (threadIdx.x != 0) return;
    const Coefficients m = coefficients_of<Accum>(call.spatial, base_g, base_u, scale, s[OF_X], s[OF_G], s[OF_U],
                                                  s[OF_GX], s[OF_VX], s[OF_VG]);
    const Math numbers[COEFFICIENTS] = {m.shift_g, m.shift_u, m.g, m.v, m.x, m.a, m.c, m.s};
    #pragma unroll
    for (int q = 0; q < COEFFICIENTS; q++) store(call.coefficients + q * call.all_planes + plane, numbers[q]);
    call.sums.set_dy_xhat(plane, m.s * (Math)call.spatial);
}
