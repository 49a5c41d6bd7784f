// Split: planes of any size, each over as many blocks as it has tiles, in three steps:
//
//     forward                          backward
//     moments_*     count, mean, m2    gradient_sums_*       two sums of the tile        one scope per tile
//     merge_moments mean, rstd,        merge_gradient_sums   mean_dy, mean_dy_xhat       one block per plane
//                   mean_lo
//     normalize_*   y                  input_gradient_*      dx                          one scope per tile
//
// Each round of the three serves as many channel tiles as half of L2 holds. The last step takes the tiles in reverse:
// those that were read last are in L2.
// Each step is also a call of its own, for planes that are parts of larger ones: see parts.cu.

#include "normalize.cuh"
#include "steps.cuh"
