// Reductions over the batch, from one value per plane to one per channel, in a fixed order and without atomics.
//
// A block serves COLUMNS channels: thread (c, r) adds samples r, r + ROWS, ...; then row 0 adds the rows.

#include "arrays.cuh"

constexpr int ROWS = SINGLE_THREADS / COLUMNS;

__device__ inline long long channel_of_thread() { return (long long)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS; }

// The sum of value(n * channels + c) over n, for the threads of row 0. Scratch: an Accum for each thread.
template <class F>
__device__ inline Accum sum_over_batch(long long samples, long long channels, long long c, Accum* scratch, F value) {
    const int row = threadIdx.x / COLUMNS;
    Accum mine = 0;
    if (c < channels) for (long long n = row; n < samples; n += ROWS) mine += value(n * channels + c);
    scratch[threadIdx.x] = mine;
    __syncthreads();
    Accum total = 0;
    if (row == 0) for (int r = 0; r < ROWS; r++) total += scratch[r * COLUMNS + threadIdx.x];
    return total;
}

// running <- (1 - momentum) * running + momentum * mean over the batch, for the mean and the unbiased variance. Planes of
// fewer than two positions do not count.
struct RunningStatisticsArguments {
    const Math *mean, *variance;
    const long long* count;         // positions of each plane; null if all have two or more
    long long samples, channels;
    double momentum;
    void *running_mean, *running_var;
    int flags;
};

KERNEL(SINGLE_THREADS, 1) running_statistics(RunningStatisticsArguments call) {
    unsigned char* shared = shared_memory();
    const long long c = channel_of_thread();
    static_assert(RUNNING_STATISTICS_BYTES == 3 * sizeof(Accum), "ops.py");
    Accum *first = (Accum*)shared, *second = first + SINGLE_THREADS, *third = second + SINGLE_THREADS;
    const auto counts = [&](long long i) { return !call.count || load(call.count + i) >= 2; };
    const auto mean_of = [&](const Math* values, Accum* scratch, Accum number) {
        return sum_over_batch(call.samples, call.channels, c, scratch,
                              [&](long long i) { return counts(i) ? (Accum)load(values + i) : 0; }) / number;
    };
    const Accum number = call.count ? sum_over_batch(call.samples, call.channels, c, third, counts) : call.samples;
    const Accum mean = mean_of(call.mean, first, number), var = mean_of(call.variance, second, number);
    if (threadIdx.x >= COLUMNS || c >= call.channels || number == 0) return;
    const bool wide_mean = call.flags & WIDE_RUNNING_MEAN, wide_var = call.flags & WIDE_RUNNING_VAR;
    const Accum old_mean = load_parameter(call.running_mean, wide_mean, c);
    const Accum old_var = load_parameter(call.running_var, wide_var, c);
    const double momentum = call.momentum;
    store_parameter(call.running_mean, wide_mean, c, (Math)((1 - momentum) * old_mean + momentum * mean));
    store_parameter(call.running_var, wide_var, c, (Math)((1 - momentum) * old_var + momentum * var));
}

// dweight = sum of sums.dy_xhat over the batch, dbias = sum of sums.dy; each may be null.
struct ParameterGradientsArguments {
    Sums sums;                      // of each plane, in Math
    long long samples, channels;
    void *dweight, *dbias;
    int flags;
};

KERNEL(SINGLE_THREADS, 1) parameter_gradients(ParameterGradientsArguments call) {
    unsigned char* shared = shared_memory();
    const long long c = channel_of_thread();
    const bool writes = threadIdx.x < COLUMNS && c < call.channels;
    static_assert(PARAMETER_GRADIENTS_BYTES == 2 * sizeof(Accum), "ops.py");
    Accum *first = (Accum*)shared, *second = first + SINGLE_THREADS;
    const auto sum_of = [&](const void* sums, Accum* scratch) {
        return sum_over_batch(call.samples, call.channels, c, scratch,
                              [&](long long i) { return load((const Math*)sums + i); });
    };
    if (call.dweight) {
        const Accum sum = sum_of(call.sums.dy_xhat, first);
        if (writes) store_parameter(call.dweight, call.flags & WIDE_WEIGHT, c, (Math)sum);
    }
    if (call.dbias) {
        const Accum sum = sum_of(call.sums.dy, second);
        if (writes) store_parameter(call.dbias, call.flags & WIDE_BIAS, c, (Math)sum);
    }
}
