// Mean and m2 of one tile, read once.
//
// First the mean, then the mean of the centred values: mean_lo, the part that rounding took from the mean. x - mean is
// exact where the values lie close to their mean, so (x - mean) - mean_lo keeps its digits however large the mean is.
// The same pass sums the squares of x - mean; the contribution of mean_lo to this sum is subtracted afterwards.

#ifndef CUPYNORM_MOMENTS
#define CUPYNORM_MOMENTS

#include "affine.cuh"
#include "merge.cuh"
#include "scale.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "unit.cuh"

// Each value is multiplied by this in the sum for the mean, which would otherwise overflow for values of 1e34 and more:
// no tile has 2^17 elements. If values are so small that the products flush to 0, mean_lo becomes their mean.
constexpr Math SUM_SCALE = 7.6293945e-6;        // 2^-17

// Likewise in a sum of means, each times its count.
constexpr Accum TINY = 9.094947017729282e-13;   // 2^-40

struct MomentsOfThread {
    Math mean[P], mean_lo[P], scaled_m2[P];     // scaled_m2: the sum of ((x - mean) - mean_lo)^2, scaled as below
};

// Squares of values around 1e25 or 1e-25 are out of float's range. If m2 is too, or so small that it has lost digits,
// scaled_m2 is minus its root, computed in a unit in which the squares are in range. Such roots are less than 1, or
// 1e19 and more; the large ones are divided by 2^20, since they may overflow themselves.
constexpr float LEAST_M2 = 7.8886091e-31f, MOST_M2 = 3.4028235e38f;    // 2^-100, and float's largest
__device__ inline bool in_range(Math m2, Math count) { return m2 >= LEAST_M2 * count && m2 <= MOST_M2; }
__device__ inline Math unit_for(Math m2) { return m2 <= 1 ? 1.2089258e24f : 8.2718061e-25f; }  // 2^80, 2^-80
template <class T> __device__ inline T root_of(float scaled_m2) {
    return scaled_m2 > -1 ? (T)scaled_m2 : (T)scaled_m2 * 1048576;
}
__device__ inline Accum wide_m2(float scaled_m2) {
    return scaled_m2 <= 0 ? root_of<Accum>(scaled_m2) * root_of<Accum>(scaled_m2) : scaled_m2;      // not -0
}
// (The root is taken in float: in double it needs registers that the widest variants do not have.)
__device__ inline float scale_m2_to_float(Accum m2) {
    if (m2 >= LEAST_M2 && m2 <= MOST_M2) return (float)m2;
    const bool large = m2 > 1;
    const Accum unit = large ? 6.223015277861142e-61 : 1.6069380442589903e60;       // 2^-200, 2^200
    return -sqrtf((float)(m2 * unit)) * (large ? 1.2089258e24f : 7.8886091e-31f);   // 2^80, 2^-100
}
__device__ inline float rstd_of(float scaled_m2, const Divisor& all, const Scale& scale) {
    const float eps = (float)scale.eps;
    float count = all.number - (float)scale.ddof;
    if (MASKED && !(count > 0)) {           // as in Statistics
        scaled_m2 = 0;
        count = 1;
    }
    if (scale.mode != EPS_VARIANCE) {
        const float root = (scaled_m2 < 0 ? -scaled_m2 : sqrtf(scaled_m2)) / sqrtf(count);
        return rstd_of_std(scaled_m2 <= -1 ? root * 1048576 : root, scale);
    }
    if (!(scaled_m2 < 0)) {
        return reciprocal_sqrt((scale.ddof == 0 ? all.quotient(scaled_m2) : scaled_m2 / count) + eps);
    }
    if (scaled_m2 > -1 && eps > 1) return reciprocal_sqrt(eps);
    const float unit = scaled_m2 > -1 ? 1.1529215e18f : 8.2718061e-25f;                           // 2^60, 2^-80
    const float root = scaled_m2 * (scaled_m2 > -1 ? 1.1529215e18f : 8.6736174e-19f);             // 2^60, 2^-60
    const float scaled = reciprocal_sqrt(root * root / count + (float)(scale.eps * unit * unit));
    // Below 2^-126 it is assembled from bits, since arithmetic would flush it.
    return unit < 1 && scaled < 1.4210855e-14f ? denormal(scaled * 5.9029581e20f) : scaled * unit;      // 2^-46, 2^69
}
__device__ inline float variance_of(float scaled_m2, float count) {
    return scaled_m2 < 0 ? root_of<float>(scaled_m2) / count * root_of<float>(scaled_m2) : scaled_m2 / count;
}
// double has the range.
__device__ inline Accum wide_m2(double scaled_m2) { return scaled_m2; }
__device__ inline double rstd_of(double scaled_m2, const Divisor& all, const Scale& scale) {
    const double rest = all.number - scale.ddof, var = MASKED && !(rest > 0) ? 0 : scaled_m2 / rest;
    return scale.mode == EPS_VARIANCE ? reciprocal_sqrt(var + scale.eps) : rstd_of_std(sqrt(var), scale);
}
__device__ inline double variance_of(double scaled_m2, double count) { return scaled_m2 / count; }
__device__ inline Math scale_m2(Accum m2) {
    if constexpr (FLOAT64) return m2;
    else return scale_m2_to_float(m2);
}
__device__ inline Math narrow_rstd(Accum rstd) {
    if constexpr (FLOAT64) return rstd;
    else return rstd < 1.1754944e-38 ? denormal((float)(rstd * 7.1362384635298e44)) : (Math)rstd;     // 2^-126, 2^149
}

// The numbers of positions of a thread's planes, to divide by: without a mask they are all the same.
template <bool = MASKED> struct Divisors {
    Divisor all;
    __device__ explicit Divisors(const Counts<>& count) : all(count.least(0)) {}
    __device__ Divisor of(int) const { return all; }
};
template <> struct Divisors<true> {
    Counts<> count;
    __device__ explicit Divisors(const Counts<>& c) : count(c) {}
    __device__ Divisor of(int p) const { return Divisor(count.least(p)); }
};

template <class T> __device__ inline void swap(T& a, T& b) {
    const T first = a;
    a = b;
    b = first;
}

// Sum each of the K terms that f(p, value, terms) computes, for each plane p of the scope's tile. If READ, first read
// the vecs.
template <bool READ, int K, int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition, class F>
__device__ inline void sum_tile(const Partition& partition, const TensorOf<Input>& x,
                                Tile<RESIDENCY, THREADS, VECS_PER_THREAD, Input>& tile, int vecs_per_thread,
                                Math* scratch, Math (&total)[K * P], F f,
                                const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD>& mask) {
    Math s[K][LINES] = {};
    const auto add_one = [&](int v, Input value) {
        Math terms[K];
        f(plane_of(v), widen(value), terms);
        #pragma unroll
        for (int k = 0; k < K; k++) s[k][line_of(v)] += terms[k];
    };
    const auto add = [&](int k) {
        if (!partition.holds(k)) return;
        const VecOf<Input> vec = tile.get(k);
        #pragma unroll
        for (int v = 0; v < VEC_SIZE; v++) {
            if constexpr (MASKED) if (!mask.has(k, v)) continue;
            add_one(v, vec.v[v]);
        }
    };
    if (!READ) tile.each(vecs_per_thread, add);
    else if (RESIDENCY == REGISTERS) {
        tile.read(partition, x, 0);
        tile.each(VECS_PER_THREAD, add);
    } else {
        for (int from = 0; from < vecs_per_thread; from += tile.batch) {
            tile.read(partition, x, from);
            #pragma unroll
            for (int i = 0; i < tile.batch; i++) add(from + i);
        }
    }
    if (Partition::has_tails && partition.tail >= 0 && mask.has_tail()) add_one(0, tile.tail);
    #pragma unroll
    for (int k = 0; k < K; k++) fold(s[k], total + k * P);
    sum_over_scope<SCOPE, THREADS>(total, partition.size, partition.channel_vecs, scratch);
}

// scratch and other are two areas for two sums each, used alternately; on return `scratch` is the free one. count: of
// the tile's positions; with a mask it is set.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition>
__device__ inline MomentsOfThread moments_of_tile(const Partition& partition, const TensorOf<Input>& x,
                                                  Tile<RESIDENCY, THREADS, VECS_PER_THREAD, Input>& tile,
                                                  int vecs_per_thread, Math*& scratch, Math*& other,
                                                  const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD>& mask,
                                                  Counts<>& count) {
    MomentsOfThread m;
    if constexpr (MASKED) {
        Math first[FORWARD_SUMS * P];
        sum_tile<true, FORWARD_SUMS, SCOPE>(partition, x, tile, vecs_per_thread, scratch, first,
                                            [](int, Math value, Math (&terms)[FORWARD_SUMS]) {
            terms[0] = value * SUM_SCALE;
            terms[1] = 1;
        }, mask);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            m.mean[p] = first[p];
            count.set(p, (int)first[P + p]);
        }
    } else {
        sum_tile<true, 1, SCOPE>(partition, x, tile, vecs_per_thread, scratch, m.mean,
                                 [](int, Math value, Math (&terms)[1]) {
            terms[0] = value * SUM_SCALE;
        }, mask);
    }
    const Divisors divide(count);
    #pragma unroll
    for (int p = 0; p < P; p++) m.mean[p] = divide.of(p).quotient(m.mean[p]) / SUM_SCALE;
    Math sums[FORWARD_SUMS * P];
    sum_tile<false, FORWARD_SUMS, SCOPE>(partition, x, tile, vecs_per_thread, other, sums,
                                         [&](int p, Math value, Math (&terms)[FORWARD_SUMS]) {
        const Math d = value - m.mean[p];
        terms[0] = d;
        terms[1] = d * d;
    }, mask);
    // If a plane is nearly constant, most of the sum of squares may come from mean_lo: sum the squares again.
    bool cancelled = false, rare = false;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        m.mean_lo[p] = divide.of(p).quotient(sums[p]);
        m.scaled_m2[p] = sums[P + p] - sums[p] * m.mean_lo[p];
        cancelled |= m.scaled_m2[p] < sums[P + p] / 4;
        rare |= !FLOAT64 && !in_range(m.scaled_m2[p], count.least(p));
    }
    // Usually neither this nor the next case occurs for any plane.
    if (!any_of_scope<SCOPE, THREADS>(cancelled || rare, partition.channel_vecs)) return m;
    Math again[P];
    if (any_of_scope<SCOPE, THREADS>(cancelled, partition.channel_vecs)) {
        sum_tile<false, 1, SCOPE>(partition, x, tile, vecs_per_thread, scratch, again,
                                  [&](int p, Math value, Math (&terms)[1]) {
            const Math d = (value - m.mean[p]) - m.mean_lo[p];
            terms[0] = d * d;
        }, mask);
        // Only for these planes: the bits of the others must not depend on the planes that share their warp.
        #pragma unroll
        for (int p = 0; p < P; p++) if (m.scaled_m2[p] < sums[P + p] / 4) m.scaled_m2[p] = again[p];
        swap(scratch, other);
    }
    if constexpr (!FLOAT64) {
        // If m2 is out of range, sum in a unit in which it is not. The sum for mean_lo may have overflowed as well.
        bool odd = false;
        #pragma unroll
        for (int p = 0; p < P; p++) {
            odd |= !in_range(m.scaled_m2[p], count.least(p));
            if (!(m.scaled_m2[p] <= MOST_M2)) m.mean_lo[p] = 0;
        }
        if (any_of_scope<SCOPE, THREADS>(odd, partition.channel_vecs)) {
            sum_tile<false, FORWARD_SUMS, SCOPE>(partition, x, tile, vecs_per_thread, scratch, sums,
                                                 [&](int p, Math value, Math (&terms)[FORWARD_SUMS]) {
                const Math d = ((value - m.mean[p]) - m.mean_lo[p]) * unit_for(m.scaled_m2[p]);
                terms[0] = d;
                terms[1] = d * d;
            }, mask);
            #pragma unroll
            for (int p = 0; p < P; p++) {
                if (in_range(m.scaled_m2[p], count.least(p))) continue;
                const Math more = sums[p] / count.least(p), m2 = sums[P + p] - sums[p] * more;
                const bool small = m.scaled_m2[p] <= 1;
                m.mean_lo[p] += more * (small ? 8.2718061e-25f : 1.2089258e24f);                        // 2^-80, 2^80
                m.scaled_m2[p] = -sqrtf(m2 < 0 ? 0 : m2) * (small ? 8.2718061e-25f : 1.1529215e18f);    // 2^-80, 2^60
            }
            swap(scratch, other);
        }
    }
    return m;
}

// Merge the moments of a channel tile's tiles, about the mean of tile 0, which has the most elements: the terms that
// cancel in m2 are then at most `tiles` times the result, and Accum has digits to spare. With a mask it may have few:
// then about the mean of all. count: of the tile; becomes that of all.
template <int THREADS, class Partition, class Exchange>
__device__ inline MomentsOfThread merge_moments_of_tiles(const Partition& partition, const MomentsOfThread& mine,
                                                         int tiles, long long spatial, Counts<>& count,
                                                         Exchange& exchange, Accum* scratch, Accum* other) {
    enum { MEAN, MEAN_LO, SCALED_M2, COUNT };
    const TileNumbers<FORWARD_PARTIALS, Partition, Exchange> numbers(partition, exchange, [&](int p, int i) {
        return i == MEAN ? mine.mean[p] : i == MEAN_LO ? mine.mean_lo[p] : i == SCALED_M2 ? mine.scaled_m2[p]
                                                                                          : count[p];
    });
    Accum base[P], s[FORWARD_MERGED * P] = {};
    if constexpr (MASKED) {
        numbers.template sum<THREADS>(tiles, s, scratch, [&](int tile) {
            #pragma unroll
            for (int p = 0; p < P; p++) {
                const Accum n = numbers.read(tile, p, COUNT);
                s[p] += n;
                if (n > 0) s[P + p] += n * TINY * numbers.read(tile, p, MEAN);
            }
        });
        #pragma unroll
        for (int p = 0; p < P; p++) {
            count.set(p, (int)s[p]);
            base[p] = s[p] > 0 ? s[P + p] / (s[p] * TINY) : 0;
            s[p] = s[P + p] = 0;
        }
    } else {
        count = Counts<>((int)spatial);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            base[p] = numbers.read(0, p, MEAN);
            s[p] = nothing_of(base[p]);
        }
    }
    numbers.template sum<THREADS>(tiles, s, MASKED ? other : scratch, [&](int tile) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const Accum n = numbers.read(tile, p, COUNT);
            if (n == 0) continue;
            const Accum distance = (numbers.read(tile, p, MEAN) - base[p]) + numbers.read(tile, p, MEAN_LO);
            s[p] += n * distance;
            s[P + p] += wide_m2(numbers.read(tile, p, SCALED_M2)) + n * distance * distance;
        }
    });
    exchange.release();
    MomentsOfThread m;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const Accum distance = s[p] / count.least(p), m2 = s[P + p] - s[p] * distance;
        m.mean[p] = (Math)(base[p] + distance);
        m.mean_lo[p] = (Math)((base[p] - m.mean[p]) + distance);
        m.scaled_m2[p] = m2 < 0 ? 0 : scale_m2(m2);
    }
    return m;
}

// Moments of `count` values: m2 is the sum of their squared distances from their mean.
struct Moments {
    long long count;
    Accum mean, m2;
};

struct MomentArrays {
    long long* count;
    Accum *mean, *m2;

    __device__ Moments get(long long i) const { return {load(count + i), load(mean + i), load(m2 + i)}; }
    __device__ void set(long long i, const Moments& m) const {
        store(count + i, m.count);
        store(mean + i, m.mean);
        store(m2 + i, m.m2);
    }
};

// What normalize and running_statistics need of each plane; mean + mean_lo has twice Math's digits. variance is unbiased,
// and may be null.
struct Statistics {
    Math *mean, *rstd, *mean_lo, *variance;

    // The variance of a plane with no more than ddof positions is 0, and rstd of one without any.
    __device__ void set(long long i, const Moments& m, const Scale& scale) const {
        const Math rounded = (Math)m.mean;
        const Accum rest = m.count - scale.ddof, var = rest > 0 ? m.m2 / rest : 0;
        store(mean + i, rounded);
        store(mean_lo + i, (Math)(m.mean - rounded));
        const Accum inverse = scale.mode == EPS_VARIANCE ? 1 / sqrt(var + scale.eps) : rstd_of_std(sqrt(var), scale);
        store(rstd + i, m.count ? narrow_rstd(inverse) : 0);
        if (variance) store(variance + i, (Math)(m.m2 / (m.count - 1)));
    }
};

// Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1, about the pooled mean.
__device__ inline Moments merge(const Moments& a, const Moments& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const Accum distance = b.mean - a.mean, fraction = (Accum)b.count / (Accum)(a.count + b.count);
    return {a.count + b.count, a.mean + distance * fraction,
            a.m2 + b.m2 + distance * distance * ((Accum)a.count * fraction)};
}

#endif
