// Numbers of whole planes that a caller gives, for kernels whose arrays are parts of these planes: one thread per plane.

#include "gradient.cuh"
#include "moments.cuh"

// mean, rstd, mean_lo and variance from moments: for normalize_* and running_statistics.
struct StatisticsOfMomentsArguments {
    MomentArrays moments;
    long long planes;
    Scale scale;
    Math *mean, *rstd, *mean_lo, *variance;
};

KERNEL(SINGLE_THREADS, 1) statistics_of_moments(StatisticsOfMomentsArguments call) {
    const long long plane = plane_of_thread();
    if (plane >= call.planes) return;
    const Statistics statistics{call.mean, call.rstd, call.mean_lo, call.variance};
    statistics.set(plane, call.moments.get(plane), call.scale);
}

// The means of g and of g * xhat for input_gradient_*, if mean_dy is not null; and the sums for dweight and dbias.
struct MeansOfSumsArguments {
    Totals totals;
    const long long* count;         // of each plane; null if all have `spatial` positions
    long long planes, spatial;
    Math *mean_dy, *mean_dy_xhat;
    const Math* rstd;
    Scale scale;
    Sums sums;
};

KERNEL(SINGLE_THREADS, 1) means_of_sums(MeansOfSumsArguments call) {
    const long long plane = plane_of_thread();
    if (plane >= call.planes) return;
    const Accum sum_dy = load(call.totals.dy + plane), sum_dy_xhat = load(call.totals.dy_xhat + plane);
    if (call.mean_dy) {
        const Accum count = (Accum)(call.count ? load(call.count + plane) : call.spatial);
        store(call.mean_dy + plane, (Math)(sum_dy / count));
        const Math slope = call.scale.usual() ? 1 : rstd_slope(load(call.rstd + plane), (Math)count, call.scale);
        store(call.mean_dy_xhat + plane, (Math)(sum_dy_xhat / count * slope));
    }
    call.sums.set(plane, (Math)sum_dy, (Math)sum_dy_xhat);
}
