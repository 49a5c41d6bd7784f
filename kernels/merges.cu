// Merges of the partials of a plane's tiles: one block for each plane.
//
// Partials lie as [quantity][plane][tile]; the order in which they are merged depends only on how many there are.

#include "double.cuh"
#include "gradient.cuh"
#include "moments.cuh"

// Compute mean, rstd and mean_lo for normalize; mean + mean_lo is exact to twice Math's digits. variance may be null.
struct MergeMomentsArguments {
    const long long* counts;
    const Accum *means, *m2;
    long long tiles, first, planes;
    double eps;
    Math *mean, *rstd, *mean_lo, *variance;
};

KERNEL(SINGLE_THREADS, 1) merge_moments(MergeMomentsArguments call) {
    const long long plane = merged_plane(call.first, call.planes);
    if (plane < 0) return;
    const auto of_tile = [&](long long tile) {
        const long long at = plane * call.tiles + tile;
        return Moments{load(call.counts + at), load(call.means + at), load(call.m2 + at)};
    };
    const Moments all = merge_over_block<MERGE_MOMENTS_BYTES>(Moments{0, 0, 0}, call.tiles, of_tile, merge);
    if (threadIdx.x != 0) return;
    const Math rounded = (Math)all.mean;
    store(call.mean + plane, rounded);
    store(call.mean_lo + plane, (Math)(all.mean - rounded));
    store(call.rstd + plane, rstd_of(all.m2 / all.count + call.eps));
    if (call.variance) store(call.variance + plane, (Math)(all.m2 / (all.count - 1)));
}

struct ThreeSums { Accum dy, dy_c, c; };        // as in gradient.cuh

struct MergeGradientSumsArguments {
    const Math* partials;
    long long all_planes, tiles, first, planes, spatial;
    Math *sum_dy, *sum_dy_xhat, *merged_mean_lo;
    Sums sums;                      // dbias and dweight, if they have one number per plane
};

// Training: sum_dy, sum_dy_xhat and merged_mean_lo from the partials of gradient_sums_*. Tracked eval, where these are
// null: the partials of frozen_backward_* are sum(dy) and sum(dy * xhat) already, and are only added up. If the sums
// are gradients themselves, they are also written to dbias and dweight. Each pointer may be null.
KERNEL(SINGLE_THREADS, 1) merge_gradient_sums(MergeGradientSumsArguments call) {
    const long long plane = merged_plane(call.first, call.planes), step = call.all_planes * call.tiles;
    if (plane < 0) return;
    const auto of_tile = [&](long long tile) {
        const Math* at = call.partials + plane * call.tiles + tile;
        return ThreeSums{load(at + OF_DY * step), load(at + OF_DY_C * step),
                         call.merged_mean_lo ? load(at + OF_C * step) : 0};
    };
    const auto add = [](const ThreeSums& a, const ThreeSums& b) {
        return ThreeSums{a.dy + b.dy, a.dy_c + b.dy_c, a.c + b.c};
    };
    const ThreeSums all = merge_over_block<MERGE_GRADIENT_SUMS_BYTES>(ThreeSums{0, 0, 0}, call.tiles, of_tile, add);
    if (threadIdx.x != 0) return;
    Math dot = (Math)all.dy_c;
    if (call.merged_mean_lo) {
        const Accum mean_c = all.c / call.spatial;
        store(call.merged_mean_lo + plane, (Math)mean_c);
        dot = (Math)(all.dy_c - mean_c * all.dy);
    }
    Sums{call.sum_dy, call.sum_dy_xhat, 0}.set(plane, (Math)all.dy, dot);
    call.sums.set(plane, (Math)all.dy, dot);
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
