// The epilogue: operations on a normalised element before it is stored, and on its gradient before it is used.
//
//     z = xhat * weight + bias + residual,   y = activation(z),   and backward   g = dy * activation'(z)
//
// EPILOGUE is the module's kind of activation: without one, a rectifier of slope 1; for relu, a rectifier of slope 0. g
// replaces dy as soon as x and dy are on chip, so that later code ignores the epilogue.

#ifndef CUPYNORM_EPILOGUE
#define CUPYNORM_EPILOGUE

#include "arrays.cuh"

enum { NONE, RECTIFIER, SILU, GELU };

struct Epilogue {
    Tensor residual;                // data may be null
    double slope;
};

__device__ inline double exponential(double z) { return exp(z); }
__device__ inline double inverse(double z) { return 1 / z; }
__device__ inline double scaled_erfc(double x) { return erfcx(x); }
__device__ inline float exponential(float z) { return expf(z); }
__device__ inline float inverse(float z) { return reciprocal(z); }
__device__ inline float scaled_erfc(float x) { return erfcxf(x); }
constexpr Math HALF_ROOT = (Math)0.70710678118654752440, PDF_AT_0 = (Math)0.39894228040143267794;

// Without an epilogue, make constants of the arguments that only epilogues use: the compiler then removes the code that
// reads them.
template <class... Arguments> __device__ inline void without_epilogue(Arguments&... arguments) {
    if constexpr (EPILOGUE == 0) ((arguments = Arguments{}), ...);
}

// The normal distribution's Phi(z), from e = exp(-z^2 / 2). Its lower tail is e * erfcx(|z| / sqrt(2)) / 2.
__device__ inline Math normal_cdf(Math z, Math e) {
    const Math tail = e * scaled_erfc((Math)fabs(z) * HALF_ROOT) * (Math)0.5;
    return z < 0 ? tail : 1 - tail;
}

// activation(affine + residual)
__device__ inline Math activated(Math affine, Math residual, Math slope) {
    if (EPILOGUE == NONE) return affine;
    const Math z = affine + residual;
    if (EPILOGUE == RECTIFIER) return z < 0 ? (slope == 0 ? 0 : z * slope) : z;     // NaN stays, -inf * 0 is avoided
    if (EPILOGUE == SILU) return z * inverse(1 + exponential(-z));
    return z * normal_cdf(z, exponential(z * z * (Math)-0.5));      // GELU: Hendrycks, Gimpel 2016, the exact form
}

// dy * activation'(affine + residual)
__device__ inline Math gradient_through(Math affine, Math residual, Math dy, Math slope) {
    const Math z = affine + residual;
    if (EPILOGUE == RECTIFIER) return z <= 0 ? (slope == 0 ? 0 : dy * slope) : dy;
    if (EPILOGUE == SILU) {
        const Math e = exponential(-z), s = inverse(1 + e);
        return dy * (s + z * s * (z > 0 ? e * s : 1 - s));      // 1 - s, without cancellation
    }
    const Math e = exponential(z * z * (Math)-0.5);
    return dy * (normal_cdf(z, e) + z * (e * PDF_AT_0));
}

#endif
