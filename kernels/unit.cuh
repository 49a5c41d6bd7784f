// The unit of a plane: a power of two near its rstd.
//
// Deviations between 1e-38 and 3e38 are in float's range, but their products with dy, with a weight or with each other
// need not be. So x - mean is computed in this unit, in which it is near 1: x * unit - mean * unit has the same digits
// as x - mean, and also costs one instruction.

#ifndef CUPYNORM_UNIT
#define CUPYNORM_UNIT

#include "device.cuh"

// Divides by one number several times. In float a quotient is the product with the reciprocal, corrected by its exact
// remainder. Unless it is near the ends of float's range, that is the rounded quotient, but takes 3 instructions instead
// of 14. (Infinity divided by a number is NaN here.)
struct Divisor {
    Math number, inverse;

    __device__ explicit Divisor(Math n) : number(n), inverse(FLOAT64 ? 0 : reciprocal(n)) {}
    __device__ Math quotient(Math a) const {
        if constexpr (FLOAT64) return a / number;
        else {
            const float q = a * inverse;
            return fmaf(fmaf(-q, number, a), inverse, q);
        }
    }
};

struct Unit {
    Math unit, rstd;        // rstd is in this unit: usually 1 to 2
};

// count * 2^-149, a number below 2^-126: arithmetic would flush it to 0.
__device__ inline float denormal(float count) { return __uint_as_float((unsigned)(count + 0.5f)); }

// The unit is smaller than rstd where mean * unit would otherwise overflow: x is close to the mean then. Neither the
// unit nor its inverse is denormal; rstd may be.
__device__ inline Unit unit_of(float mean, float rstd) {
    const unsigned bits = __float_as_uint(rstd);
    const int of_mean = (int)(__float_as_uint(mean) << 1 >> 24);
    const int exponent = max(1, min(min((int)(bits >> 23), 253), 376 - of_mean));
    const float inverse = __uint_as_float((unsigned)(254 - exponent) << 23);
    return {__uint_as_float((unsigned)exponent << 23), bits < 0x800000 ? (float)bits * 1.1920929e-7f : rstd * inverse};
}
__device__ inline Unit unit_of(double, double rstd) { return {1, (Math)rstd}; }    // squares must be in range anyway

#endif
