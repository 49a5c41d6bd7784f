// Reductions over the batch, from one value per plane to one per channel, in a fixed order and without atomics.
//
// A block of 256 threads serves 32 channels: thread (c, r) adds samples r, r + 8, ...; then row 0 adds the 8 rows.

#include "types.cuh"

constexpr int COLUMNS = 32, ROWS = 8;

__device__ inline long long channel_of_thread() { return (long long)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS; }

// The sum of values[n * channels + c] over n, for the threads of row 0. Scratch: 256 Accums for each call.
__device__ inline Accum sum_over_batch(const Math* values, long long samples, long long channels, long long c,
                                       Accum* scratch) {
    const int row = threadIdx.x / COLUMNS;
    Accum mine = 0;
    if (c < channels) for (long long n = row; n < samples; n += ROWS) mine += load(values + n * channels + c);
    scratch[threadIdx.x] = mine;
    __syncthreads();
    Accum total = 0;
    if (row == 0) for (int r = 0; r < ROWS; r++) total += scratch[r * COLUMNS + threadIdx.x];
    return total;
}

// running <- (1 - momentum) * running + momentum * mean over the batch, for the mean and the unbiased variance.
KERNEL(COLUMNS * ROWS, 1) running_statistics(const Math* mean, const Math* variance, long long samples,
                                             long long channels, double momentum, void* running_mean,
                                             void* running_var, int flags) {
    unsigned char* shared = shared_memory();
    const long long c = channel_of_thread();
    const Accum mean_ = sum_over_batch(mean, samples, channels, c, (Accum*)shared) / samples;
    const Accum var_ = sum_over_batch(variance, samples, channels, c, (Accum*)shared + COLUMNS * ROWS) / samples;
    if (threadIdx.x >= COLUMNS || c >= channels) return;
    const bool wide_mean = flags & WIDE_RUNNING_MEAN, wide_var = flags & WIDE_RUNNING_VAR;
    const Accum old_mean = load_parameter(running_mean, wide_mean, c), old_var = load_parameter(running_var, wide_var, c);
    store_parameter(running_mean, wide_mean, c, (Math)((1 - momentum) * old_mean + momentum * mean_));
    store_parameter(running_var, wide_var, c, (Math)((1 - momentum) * old_var + momentum * var_));
}

// dweight = sum of sum_dy_xhat over the batch, dbias = sum of sum_dy; each may be null.
KERNEL(COLUMNS * ROWS, 1) parameter_gradients(const Math* sum_dy, const Math* sum_dy_xhat, long long samples,
                                              long long channels, void* dweight, void* dbias, int flags) {
    unsigned char* shared = shared_memory();
    const long long c = channel_of_thread();
    const bool writes = threadIdx.x < COLUMNS && c < channels;
    if (dweight) {
        const Accum sum = sum_over_batch(sum_dy_xhat, samples, channels, c, (Accum*)shared);
        if (writes) store_parameter(dweight, flags & WIDE_WEIGHT, c, (Math)sum);
    }
    if (dbias) {
        const Accum sum = sum_over_batch(sum_dy, samples, channels, c, (Accum*)shared + COLUMNS * ROWS);
        if (writes) store_parameter(dbias, flags & WIDE_BIAS, c, (Math)sum);
    }
}
