// A group: the blocks that share a channel tile, each with one tile of it on chip. Every block puts a few numbers of
// its tile, all wait at one barrier, and every block merges all of the numbers in the same order.
//
//     CLUSTER   neighbouring blocks: each puts into its own shared memory, and reads the others'
//     GRID      any number of blocks of a cooperative launch, all resident: they put into global memory, and a counter
//               counts their arrivals. They serve one channel tile after another, in two alternating areas of memory,
//               so that no block overwrites numbers that a slow one still reads.

#ifndef CUPYNORM_GROUP
#define CUPYNORM_GROUP

#include "partition.cuh"

template <int SCOPE> constexpr bool grouped = SCOPE == CLUSTER || SCOPE == GRID;

struct Group {
    int tiles;                      // tiles of a channel tile, and blocks of the group
    Math* partial;                  // GRID: [group][phase][tile][number]
    unsigned* arrived;              // GRID: [group], 0 at the launch
};

// Call f(scope_index) for each tile that this block (or warp) serves: scope_index = channel tile * tiles + tile.
template <int SCOPE, class Partition, class F>
__device__ inline void each_scope(const Group& group, long long channel_tiles, F f) {
    const long long scopes = channel_tiles * group.tiles;
    if constexpr (SCOPE == GRID) {
        const long long step = gridDim.x / group.tiles * group.tiles;
        for (long long scope_index = blockIdx.x; scope_index < scopes; scope_index += step) f(scope_index);
    } else {
        const long long scope_index = Partition::scope_in_grid();
        if (scope_index < scopes) f(scope_index);
    }
}

// A scope of one block has nothing to exchange.
template <int SCOPE> struct Exchange {
    __device__ Exchange(const Group&, long long, int, Math*) {}
    __device__ void end() {}
};

#if defined(SIMT) || __CUDA_ARCH__ >= 900       // older GPUs have no clusters
template <> struct Exchange<CLUSTER> {
    Math* area;
    __device__ Exchange(const Group&, long long, int, Math* area) : area(area) {}
    __device__ void put(int i, Math value) { area[i] = value; }
    __device__ void barrier() {
        if (threadIdx.x < 32) cluster_fence();      // only the first warp puts
        cluster_arrive();
        cluster_wait();
    }
    __device__ Math read(int tile, int i) const { return *peer(area + i, tile); }
    // Call this after sum_over_scope has summed all numbers that the thread read: the reads are then complete without
    // a fence. No block ends before all have read, since each waits in end(), at the end of the kernel.
    __device__ void release() { cluster_arrive(); }
    __device__ void end() { cluster_wait(); }
};
#endif

template <> struct Exchange<GRID> {
    Math* areas;
    int numbers, tile;
    unsigned* arrived;
    unsigned target;
    // Exchange `numbers` numbers per tile; this block's tile is scope_index.
    __device__ Exchange(const Group& group, long long scope_index, int numbers, Math*)
        : numbers(numbers), tile((int)(scope_index % group.tiles)) {
        const int number = blockIdx.x / group.tiles, groups = gridDim.x / group.tiles;
        const long long phase = scope_index / group.tiles / groups;
        areas = group.partial + (number * 2 + phase % 2) * (long long)group.tiles * numbers;
        arrived = group.arrived + number;
        target = (unsigned)((phase + 1) * group.tiles);
    }
    __device__ void put(int i, Math value) { store(areas + tile * numbers + i, value); }
    __device__ void barrier() {
        __syncthreads();
        if (threadIdx.x == 0) {
            add_release(arrived);
            wait_until(arrived, target);
        }
        __syncthreads();
    }
    __device__ Math read(int tile, int i) const { return load_fresh(areas + tile * numbers + i); }
    __device__ void release() {}
    // The first sums of the next channel tile may use the same scratch area as the last sums of this one.
    __device__ void end() { __syncthreads(); }
};

#endif
