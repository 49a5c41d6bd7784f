// Merges of the partials of a plane's tiles: one block for each plane.
//
// Partials lie as [quantity][plane][tile]; the order in which they are merged depends only on how many there are.

#include "double.cuh"
#include "gradient.cuh"
#include "moments.cuh"

// Set the moments of each plane, or, if `merged` is null, the statistics that follow from them.
struct MergeMomentsArguments {
    MomentArrays partials, merged;
    long long tiles, first, planes;
    Scale scale;
    Math *mean, *rstd, *mean_lo, *variance;
    long long* count;               // of the plane; may be null
};

KERNEL(SINGLE_THREADS, 1) merge_moments(MergeMomentsArguments call) {
    const long long plane = merged_plane(call.first, call.planes);
    if (plane < 0) return;
    const auto of_tile = [&](long long tile) { return call.partials.get(plane * call.tiles + tile); };
    const Moments all = merge_over_block<MERGE_MOMENTS_BYTES>(Moments{0, 0, 0}, call.tiles, of_tile, merge);
    if (threadIdx.x != 0) return;
    if (call.merged.count) call.merged.set(plane, all);
    else Statistics{call.mean, call.rstd, call.mean_lo, call.variance}.set(plane, all, call.scale);
    if (call.count) store(call.count + plane, all.count);
}

struct TwoSums { Accum dy, dy_xhat; };

// The partials of gradient_sums_* and frozen_backward_*. Each pointer but partials may be null.
struct MergeGradientSumsArguments {
    const Math* partials;
    long long all_planes, tiles, first, planes, spatial;
    Math *mean_dy, *mean_dy_xhat;   // for input_gradient_*
    const Math* rstd;
    const long long* count;         // of each plane; null if all have `spatial` positions
    Scale scale;
    Totals totals;
    Sums sums;                      // for dbias and dweight, or these themselves
};

KERNEL(SINGLE_THREADS, 1) merge_gradient_sums(MergeGradientSumsArguments call) {
    const long long plane = merged_plane(call.first, call.planes), step = call.all_planes * call.tiles;
    if (plane < 0) return;
    const auto of_tile = [&](long long tile) {
        const Math* at = call.partials + plane * call.tiles + tile;
        return TwoSums{load(at + OF_DY * step), load(at + OF_DY_XHAT * step)};
    };
    const auto add = [](const TwoSums& a, const TwoSums& b) { return TwoSums{a.dy + b.dy, a.dy_xhat + b.dy_xhat}; };
    const TwoSums all = merge_over_block<MERGE_GRADIENT_SUMS_BYTES>(TwoSums{0, 0}, call.tiles, of_tile, add);
    if (threadIdx.x != 0) return;
    if (call.mean_dy) {
        const Accum count = (Accum)(call.count ? load(call.count + plane) : call.spatial);
        store(call.mean_dy + plane, (Math)(all.dy / count));
        const Math slope = call.scale.usual() ? 1 : rstd_slope(load(call.rstd + plane), (Math)count, call.scale);
        store(call.mean_dy_xhat + plane, (Math)(all.dy_xhat / count * slope));
    }
    if (call.totals.dy) call.totals.set(plane, all.dy, all.dy_xhat);
    call.sums.set(plane, (Math)all.dy, (Math)all.dy_xhat);
}

// Coefficients lie as [number][plane]. sums.dy_xhat may be null; it is dweight itself if that has one number per plane.
struct MergeProductsArguments {
    const Math* partials;
    long long all_planes, tiles, first, planes, spatial;
    const Math* rstd;
    Math* coefficients;
    Sums sums;
};

struct SumsOfProducts { Accum of[QUANTITIES]; };

KERNEL(SINGLE_THREADS, 1) merge_products(MergeProductsArguments call) {
    const long long plane = merged_plane(call.first, call.planes), step = call.all_planes * call.tiles;
    if (plane < 0) return;
    const Math* row = call.partials + plane * call.tiles;
    const Accum base_g = load(row + SHIFT_G * step), base_u = load(row + SHIFT_U * step);
    const Accum rstd = load(call.rstd + plane);
    const auto of_tile = [&](long long tile) {
        SumsOfProducts one = {};
        add_products([&](int i) { return (Accum)load(row + tile + i * step); }, base_g, base_u, rstd, one.of);
        return one;
    };
    const auto add = [](const SumsOfProducts& a, const SumsOfProducts& b) {
        SumsOfProducts both;
        #pragma unroll
        for (int i = 0; i < QUANTITIES; i++) both.of[i] = a.of[i] + b.of[i];
        return both;
    };
    const SumsOfProducts all = merge_over_block<MERGE_PRODUCTS_BYTES>(SumsOfProducts{}, call.tiles, of_tile, add);
    if (threadIdx.x != 0) return;
    const Coefficients m = coefficients_of<Accum>(call.spatial, base_g, base_u, rstd, all.of);
    const Math numbers[COEFFICIENTS] = {m.shift_g, m.shift_u, m.g, m.v, m.x, m.a, m.c, m.s};
    #pragma unroll
    for (int k = 0; k < COEFFICIENTS; k++) store(call.coefficients + k * call.all_planes + plane, numbers[k]);
    call.sums.set_dy_xhat(plane, m.s * (Math)call.spatial);
}

// The sums of frozen_double_backward_*.
struct MergeDotsArguments {
    const Math* partials;
    long long tiles, planes;
    Sums sums;
};

KERNEL(SINGLE_THREADS, 1) merge_dots(MergeDotsArguments call) {
    const long long plane = merged_plane(0, call.planes);
    if (plane < 0) return;
    const auto of_tile = [&](long long tile) { return (Accum)load(call.partials + plane * call.tiles + tile); };
    const auto add = [](Accum a, Accum b) { return a + b; };
    const Accum sum = merge_over_block<MERGE_DOTS_BYTES>((Accum)0, call.tiles, of_tile, add);
    if (threadIdx.x == 0) call.sums.set_dy_xhat(plane, (Math)sum);
}
