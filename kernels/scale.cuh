// How rstd follows from a variance, and how it depends on x: the conventions of cupynorm/conventions.py.
//
//     mode            rstd, with var = m2 / (count - ddof) and std = sqrt(var)
//     EPS_VARIANCE    1 / sqrt(var + eps)
//     EPS_STD         1 / (std + eps)
//     EPS_MAX         1 / max(std, eps)
//
// They are chosen for each plane, so no element takes longer.

#ifndef CUPYNORM_SCALE
#define CUPYNORM_SCALE

#include "unit.cuh"

struct Scale {
    double eps, ddof;
    int mode;

    __device__ bool usual() const { return mode == EPS_VARIANCE && ddof == 0; }
};

// What 1 is divided by, for EPS_STD and EPS_MAX. NaN stays.
template <class T> __device__ inline T with_eps(T std, const Scale& scale) {
    const T eps = (T)scale.eps;
    return scale.mode == EPS_STD ? std + eps : std < eps ? eps : std;
}

// Below 2^-126 the reciprocal is assembled from bits, since arithmetic would flush it.
__device__ inline float rstd_of_std(float std, const Scale& scale) {
    const float divisor = with_eps(std, scale);
    const bool denormal_result = divisor > 4.2535296e37f;                                   // 2^125
    if (denormal_result) return denormal(reciprocal(divisor * 7.8886091e-31f) * 5.6294995e14f);     // 2^-100, 2^49
    return reciprocal(divisor);
}
__device__ inline double rstd_of_std(double std, const Scale& scale) { return 1 / with_eps(std, scale); }

// rstd of a given variance.
__device__ inline Math rstd_of_variance(Math var, const Scale& scale) {
    if (scale.mode == EPS_VARIANCE) return reciprocal_sqrt(var + (Math)scale.eps);
    if constexpr (FLOAT64) return rstd_of_std(sqrt(var), scale);
    else return rstd_of_std(sqrtf(var), scale);
}

// count * s, where d rstd / dx = -s * rstd^2 * xhat. It is 0 where rstd is a constant. std follows from rstd; if that
// has lost it beside eps, the result does not matter, since dx contains it times xhat^2.
__device__ inline Math rstd_slope(Math rstd, Math count, const Scale& scale) {
    const Math rest = count - (Math)scale.ddof;
    if (!(rest > 0)) return 0;
    const Math ratio = count / rest;
    if (scale.mode == EPS_VARIANCE) return ratio;
    const Math beyond = 1 - (Math)scale.eps * rstd;       // with EPS_STD it is std / (std + eps)
    if (!(beyond > (FLOAT64 ? (Math)8.881784197001252e-16 : (Math)4.7683716e-7))) return 0;  // four times the precision
    return scale.mode == EPS_STD ? ratio / beyond : ratio;
}

#endif
