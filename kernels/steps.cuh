// The steps of forward and backward, for planes of any size, with one scope for each tile:
//
//     moments_*          count, mean and m2 of the tile
//     gradient_sums_*    sum(g) and sum(g * xhat) of the tile
//     input_gradient_*   dx, given the means of g and of g * xhat over the plane
//
// and normalize.cuh's. merges.cu merges tiles. A plane of one tile needs no merge: its partials are its moments, and its
// sums are written as totals at once.
// Partials lie as [quantity][plane][tile].

#ifndef CUPYNORM_STEPS
#define CUPYNORM_STEPS

#include "gradient.cuh"
#include "moments.cuh"
#include "round.cuh"

struct MomentsArguments {
    TensorOf<Input> x;
    Mask mask;
    MomentArrays partials;
    Round round;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void moments(const MomentsArguments& call) {
    unsigned char* shared = shared_memory();
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD, Input> tile;
        Math* scratch = (Math*)shared;
        Math* other = scratch + scratch_size<THREADS>(partition.channel_vecs, FORWARD_SUMS * P);
        const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD> mask(partition, call.mask);
        Counts<> count(partition.count());
        const MomentsOfThread m = moments_of_tile<SCOPE>(partition, call.x, tile, VECS_PER_THREAD, scratch, other, mask,
                                                         count);
        partition.each_plane(round.channels, [&](int p, long long i) {
            call.partials.set(i * round.tiles + partition.tile, {count.positions(p),
                              (Accum)m.mean[p] + (Accum)m.mean_lo[p], wide_m2(m.scaled_m2[p])});
        });
    });
}

struct GradientSumsArguments {
    Tensor x, dy;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;               // data may be null
    Mask mask;
    Totals totals;                  // of planes of one tile; else null, and partials are written
    Math* partials;
    long long all_planes;
    Round round;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void gradient_sums(GradientSumsArguments call) {
    without_epilogue(call.epilogue, call.dresidual, call.affine.bias);
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        const AffineStats stat(partition, call.mean, call.mean_lo, call.rstd, call.affine, round.channels);
        const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD> mask(partition, call.mask);
        Math sums[BACKWARD_SUMS * P];
        gradient_sums_of_tile<SCOPE>(partition, call.x, call.dy, call.epilogue, call.dresidual, tile_x, tile_dy,
                                     VECS_PER_THREAD, stat, sums, (Math*)shared_memory(), mask);
        partition.each_plane(round.channels, [&](int p, long long i) {
            if (call.totals.dy) call.totals.set(i, sums[OF_DY * P + p], sums[OF_DY_XHAT * P + p]);
            else {
                #pragma unroll
                for (int q = 0; q < BACKWARD_PARTIALS; q++) {
                    store(call.partials + (q * call.all_planes + i) * round.tiles + partition.tile, sums[q * P + p]);
                }
            }
        });
    });
}

// g: dy, or, in a split with a residual, dresidual, which gradient_sums has written: there is no epilogue then.
struct InputGradientArguments {
    Tensor x, g, dx;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;               // data may be null
    Mask mask;
    const Math *mean_dy, *mean_dy_xhat;
    Round round;
};

// In a split, begin with the last tile: those that were read last are in L2.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void input_gradient(InputGradientArguments call) {
    without_epilogue(call.epilogue, call.dresidual, call.affine.bias);
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.dx, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineStats stat(partition, call.mean, call.mean_lo, call.rstd, call.affine, round.channels);
        Gradient g;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const bool exists = partition.exists(round.channels);
            const long long i = partition.n * round.channels + partition.c + p;
            g.set(p, exists ? load(call.mean_dy + i) : 0, exists ? load(call.mean_dy_xhat + i) : 0, stat);
        }
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        tile_x.read(partition, call.x, 0);
        tile_dy.read(partition, call.g, 0);
        const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD> mask(partition, call.mask);
        if constexpr (EPILOGUE != 0) {
            apply_epilogue(partition, call.epilogue, call.dresidual, tile_x, tile_dy, 0, stat, [](int, Math, Math) {},
                           mask);
        }
        write_tile(partition, call.dx, tile_x, tile_dy, VECS_PER_THREAD,
                   [&](int p, Math x_, Math dy_) { return g.dx(p, x_, dy_, stat); }, mask);
    });
}

#endif
