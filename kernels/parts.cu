// The steps for small planes, by warps, as calls of their own: an image in tiles, or on several devices, has its moments
// and gradient sums taken of each part and merged by the caller. split.cu has the same steps for large planes, and
// frozen.cu has normalize.

#include "steps.cuh"
