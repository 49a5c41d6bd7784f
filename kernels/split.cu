// Split: planes of any size, each over as many blocks as it has tiles, in three steps:
//
//     forward                          backward
//     moments_*     count, mean, m2    gradient_sums_*       three sums of the tile      one scope per tile
//     merge_moments mean, rstd,        merge_gradient_sums   sum_dy, sum_dy_xhat,        one block per plane
//                   mean_lo                                  mean_lo
//     normalize_*   y                  input_gradient_*      dx                          one scope per tile
//
// Each round of the three serves as many channel tiles as half of L2 holds. The last step takes the tiles in reverse:
// those that were read last are in L2.
// Partials lie as [quantity][plane][tile]. The merges are in merges.cu.

#include "gradient.cuh"
#include "moments.cuh"
#include "normalize.cuh"
#include "round.cuh"

struct MomentsArguments {
    Tensor x;
    long long* counts;
    Accum *means, *m2;
    Round round;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void moments(const MomentsArguments& call) {
    unsigned char* shared = shared_memory();
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile;
        Math* scratch = (Math*)shared;
        Math* other = scratch + scratch_size<THREADS>(partition.channel_vecs, FORWARD_SUMS * P);
        const MomentsOfThread m = moments_of_tile<SCOPE>(partition, call.x, tile, VECS_PER_THREAD, scratch, other);
        partition.each_plane(round.channels, [&](int p, long long i) {
            const long long at = i * round.tiles + partition.tile;
            store(call.counts + at, (long long)partition.count());
            store(call.means + at, (Accum)m.mean[p] + (Accum)m.mean_lo[p]);
            store(call.m2 + at, wide_m2(m.scaled_m2[p]));
        });
    });
}

struct GradientSumsArguments {
    Tensor x, dy;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    Tensor dresidual;
    Math* partials;
    long long all_planes;
    Round round;
};

// If there is a dresidual, it is written here.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void gradient_sums(GradientSumsArguments call) {
    without_epilogue(call.epilogue, call.dresidual, call.mean_lo, call.affine.bias);
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.x, false, [&](const Partition<SCOPE, THREADS>& partition) {
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        const AffineStats stat(partition, true, call.mean, call.mean_lo, call.rstd, call.affine, round.channels);
        Math sums[BACKWARD_SUMS * P];
        gradient_sums_of_tile<SCOPE>(partition, call.x, call.dy, call.epilogue, call.dresidual, tile_x, tile_dy,
                                     VECS_PER_THREAD, stat, sums, (Math*)shared_memory());
        partition.each_plane(round.channels, [&](int p, long long i) {
            #pragma unroll
            for (int q = 0; q < BACKWARD_PARTIALS; q++) {
                store(call.partials + (q * call.all_planes + i) * round.tiles + partition.tile, sums[q * P + p]);
            }
        });
    });
}

// merged_mean_lo: mean_lo times rstd, as merged from all tiles. g: dy, or, with a residual, dresidual, which
// gradient_sums has written: there is no epilogue then.
struct InputGradientArguments {
    Tensor x, g, dx;
    const Math *mean, *rstd, *mean_lo;
    Affine affine;
    Epilogue epilogue;
    const Math *merged_mean_lo, *sum_dy, *sum_dy_xhat;
    Round round;
};

template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void input_gradient(InputGradientArguments call) {
    without_epilogue(call.epilogue, call.mean_lo, call.affine.bias);
    const Round& round = call.round;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.dx, true, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineStats stat(partition, true, call.mean, call.mean_lo, call.rstd, call.affine, round.channels);
        Gradient g;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const bool exists = partition.c + p < round.channels;
            const long long i = partition.n * round.channels + partition.c + p;
            g.set(p, exists ? load(call.sum_dy + i) : 0, exists ? load(call.sum_dy_xhat + i) : 0,
                  exists ? load(call.merged_mean_lo + i) : 0, (Math)round.spatial, stat);
        }
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD> tile_x, tile_dy;
        tile_x.read(partition, call.x, 0);
        tile_dy.read(partition, call.g, 0);
        if constexpr (EPILOGUE != 0) {
            const Epilogue epilogue{{}, call.epilogue.slope};
            apply_epilogue(partition, epilogue, Tensor{}, tile_x, tile_dy, 0, stat, [](int, Math, Math) {});
        }
        write_tile(partition, call.dx, tile_x, tile_dy, VECS_PER_THREAD,
                   [&](int p, Math x_, Math dy_) { return g.dx(p, x_, dy_, stat); });
    });
}
