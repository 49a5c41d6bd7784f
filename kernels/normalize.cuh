// normalize: y from given statistics, for planes of any size. Each element is read once and written once.
//
//     y = activation(((x - mean) - mean_lo) * (rstd * weight) + bias + residual)
//
// It is the last step of a split forward, and the whole of a forward in tracked eval.

#ifndef CUPYNORM_NORMALIZE
#define CUPYNORM_NORMALIZE

#include "affine.cuh"
#include "epilogue.cuh"
#include "round.cuh"
#include "scale.cuh"
#include "tile.cuh"
#include "unit.cuh"

struct NormalizeArguments {
    TensorOf<Input> x;
    Tensor y;
    const void *given_mean, *given_var;     // of each channel (tracked eval), or null
    Math *mean, *rstd, *mean_lo;            // of each plane: read if given_mean is null, else the first two are written
    Scale scale;
    Affine affine;
    Epilogue epilogue;
    Mask mask;
    Round round;
};

// Use the statistics that are given for each channel, and save them as those of each plane, if mean is not null.
template <class Partition>
__device__ inline void use_given_statistics(const NormalizeArguments& call, const Partition& partition,
                                            const AffineOfThread& affine, Normalization& to) {
    const int flags = call.affine.flags;
    const long long channels = call.round.channels;
    Math mean[P], var[P], rstd[P];
    load_of_planes(mean, partition, channels, call.given_mean, flags & WIDE_RUNNING_MEAN, false, 0);
    load_of_planes(var, partition, channels, call.given_var, flags & WIDE_RUNNING_VAR, false, 1);
    #pragma unroll
    for (int p = 0; p < P; p++) {
        rstd[p] = rstd_of_variance(var[p], call.scale);
        to.set(p, mean[p], Unit{1, rstd[p]}, affine);
    }
    if (call.mean && partition.tile == 0) partition.each_plane(channels, [&](int p, long long i) {
        store(call.mean + i, mean[p]);
        store(call.rstd + i, rstd[p]);
    });
}

// In a split, begin with the last tile: those that were read last are in L2.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD>
__device__ inline void normalize(NormalizeArguments call) {
    without_epilogue(call.epilogue);
    const Round& round = call.round;
    const bool reverse = !call.given_mean;
    each_tile<SCOPE, THREADS, VECS_PER_THREAD>(round, call.y, reverse, [&](const Partition<SCOPE, THREADS>& partition) {
        const AffineOfThread affine(partition, call.affine, round.channels);
        Normalization to;
        if (call.given_mean) use_given_statistics(call, partition, affine, to);
        else {
            const long long i = partition.n * round.channels + partition.c;
            const bool exists = partition.exists(round.channels);
            #pragma unroll
            for (int p = 0; p < P; p++) {
                to.set(p, exists ? load(call.mean + i + p) : 0, exists ? load(call.mean_lo + i + p) : 0,
                       exists ? load(call.rstd + i + p) : 0, affine);
            }
        }
        Tile<RESIDENCY, THREADS, VECS_PER_THREAD, Input> tile;
        tile.read(partition, call.x, 0);
        const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD> mask(partition, call.mask);
        const Math slope = (Math)call.epilogue.slope;
        write_tile(partition, call.y, tile, VECS_PER_THREAD, call.epilogue.residual,
                   [&](int p, Math value, Math residual) {
            return activated(to.z(p, value), residual, slope);
        }, mask);
    });
}

#endif
