// Double backward of planes that do not stay on chip, in the three steps of split.cu; double.cuh has the formulas.
//
//     partial   products_*          one scope per tile   -> the tile's element count, shifts and sums
//     merge     merge_products      one block per plane  -> the plane's Coefficients and sum for the gradient of weight
//     apply     apply_products_*    one scope per tile   -> ddy and dx; in reverse: the tiles read last are in L2

#include "double.cuh"
#include "round.cuh"

struct ProductsArguments {
    Inputs inputs;
    Tensor dx;
    const Math *mean, *rstd;
    Math* partials;
    long long all_planes;
    Round round;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void products(const ProductsArguments& call) {
    unsigned char* shared = shared_memory();
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.dx, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Math* scratch = (Math*)shared;
        InputTiles<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
        const Stats stat(partition, true, call.mean, call.rstd, round.channels);
        const Products m = products_of_tile<SCOPE>(partition, call.inputs, tile, VECS_PER_THREAD, stat, scratch,
                                                   scratch + scratch_size<THREADS>(partition.channel_vecs, 2 * P));
        partition.each_plane(round.channels, [&](int p, long long i) {
            Math* to = call.partials + i * round.tiles + partition.tile;
            const long long step = call.all_planes * round.tiles;
            #pragma unroll
            for (int k = 0; k < DOUBLE_BACKWARD_PARTIALS; k++) {
                store(to + k * step, partial_of_tile(partition, m, p, k));
            }
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
    Round round;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void apply_products(const ApplyProductsArguments& call) {
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.dx, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const bool more = call.inputs.ddx.data;
        InputTiles<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
        tile.x.read(partition, call.inputs.x, 0);
        tile.dy.read(partition, call.inputs.dy, 0);
        if (more) tile.ddx.read(partition, call.inputs.ddx, 0);
        const Stats stat(partition, true, call.mean, call.rstd, round.channels);
        const ParametersOfThread parameters(partition, call.parameters, round.channels);
        DoubleGradient d;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            static_assert(sizeof(Coefficients) == COEFFICIENTS * sizeof(Math), "ops.py");
            Math m[COEFFICIENTS];
            const bool exists = partition.c + p < round.channels;
            const Math* from = call.coefficients + partition.n * round.channels + partition.c + p;
            #pragma unroll
            for (int q = 0; q < COEFFICIENTS; q++) m[q] = exists ? load(from + q * call.all_planes) : 0;
            d.set(p, Coefficients{m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]}, parameters);
        }
        write_both(partition, call.ddy, call.dx, tile, VECS_PER_THREAD, more, stat, d);
    });
}
