// Merging numbers of tiles, in an order that depends only on how many tiles there are: over the blocks of a group, or,
// where partials are in global memory, by one block for each plane (merges.cu). All merges are in Accum.

#ifndef CUPYNORM_MERGE
#define CUPYNORM_MERGE

#include "group.cuh"
#include "sums.cuh"

// 0, or NaN if the value is not finite: a sum that starts with it cannot be complete before the value has been read.
__device__ inline Accum nothing_of(Accum value) { return 0 * value; }

// N numbers of each of P planes that every block of a group has of its own tile, and reads of the others'.
template <int N, class Partition, class Exchange> struct TileNumbers {
    const Partition& partition;
    Exchange& exchange;

    // put(p, i) is number i of plane p of this block's tile.
    template <class F>
    __device__ TileNumbers(const Partition& partition, Exchange& exchange, F put)
        : partition(partition), exchange(exchange) {
        if (partition.rank < partition.channel_vecs) {
            #pragma unroll
            for (int p = 0; p < P; p++) {
                #pragma unroll
                for (int i = 0; i < N; i++) exchange.put((partition.rank * P + p) * N + i, put(p, i));
            }
        }
        exchange.barrier();
    }

    // Number i of this thread's plane p in a tile.
    __device__ Math read(int tile, int p, int i) const {
        return exchange.read(tile, (partition.rank % partition.channel_vecs * P + p) * N + i);
    }

    // Let add(tile) add each tile's terms to the sums s; every thread then has the totals of its planes.
    template <int THREADS, int K, class F>
    __device__ void sum(int tiles, Accum (&s)[K], Accum* scratch, F add) const {
        const int width = partition.channel_vecs;
        #pragma unroll 1        // usually one iteration: a block has more threads than a channel tile has tiles
        for (int tile = partition.rank / width; tile < tiles; tile += THREADS / width) add(tile);
        sum_over_scope<BLOCK, THREADS>(s, partition.size, width, scratch);
    }
};

// Return the plane that this block merges, or -1.
__device__ inline long long merged_plane(long long first, long long planes) {
    const long long number = blockIdx.x + (long long)gridDim.x * blockIdx.y;
    return number < planes ? first + number : -1;
}

// Return the plane of this thread, where one thread serves each.
__device__ inline long long plane_of_thread() {
    return (blockIdx.x + (long long)gridDim.x * blockIdx.y) * SINGLE_THREADS + threadIdx.x;
}

// Merge what the tiles of a plane have: load(tile) returns the T of a tile, merge(a, b) that of both; `nothing` is that
// of no tile. Each thread merges every SINGLE_THREADS-th tile. A tree in shared memory, BYTES for each thread, merges
// the threads'.
template <int BYTES, class T, class Load, class F>
__device__ inline T merge_over_block(const T& nothing, long long tiles, Load load, F merge) {
    static_assert(sizeof(T) == BYTES, "ops.py");
    T* slots = (T*)shared_memory();
    T mine = nothing;
    for (long long tile = threadIdx.x; tile < tiles; tile += SINGLE_THREADS) mine = merge(mine, load(tile));
    slots[threadIdx.x] = mine;
    __syncthreads();
    for (int width = SINGLE_THREADS / 2; width > 0; width /= 2) {
        if (threadIdx.x < width) slots[threadIdx.x] = merge(slots[threadIdx.x], slots[threadIdx.x + width]);
        __syncthreads();
    }
    return slots[0];
}

#endif
