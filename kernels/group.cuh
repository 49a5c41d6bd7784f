// A group: the blocks that share a channel tile, each with one tile of it on chip. Every block puts a few numbers of
// its tile, all wait at one barrier, and every block merges all of the numbers in the same order.
//
//     CLUSTER   neighbouring blocks: each puts into its own shared memory, and reads the others'
//     GRID      any number of blocks of a cooperative launch, all resident: they put into global memory, and a counter
//               counts their arrivals. They serve one channel tile after another, in two alternating areas of memory,
//               so that no block overwrites numbers that a slow one still reads.

struct Group {
    int tiles;                      // tiles of a channel tile, and blocks of the group
    Math* partial;                  // GRID: [group][phase][tile][number]
    unsigned* arrived;              // GRID: [group], 0 at the launch
};

// 0, or NaN if the value is not finite: a sum that starts with it cannot be complete before the value has been read.
__device__ inline Accum nothing_of(Accum value) { return 0 * value; }

// Call f(scope_index) for each tile that this block (or warp) serves: scope_index = channel tile * tiles + tile.
template <int SCOPE, class Partition, class F>
__device__ inline void each_scope(const Group& group, long long channel_tiles, F f) {
    const long long scopes = channel_tiles * group.tiles;
    if (SCOPE == GRID) {
        const long long step = gridDim.x / group.tiles * group.tiles;
        for (long long scope_index = blockIdx.x; scope_index < scopes; scope_index += step) f(scope_index);
    } else {
        const long long scope_index = Partition::scope_in_grid();
        if (scope_index < scopes) f(scope_index);
    }
}

template <int SCOPE> struct Exchange;

#if GROUPED
#if defined(SIMT) || __CUDA_ARCH__ >= 900      // older GPUs have no clusters
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

// Merge the moments of a channel tile's tiles, about the mean of tile 0, which has the most elements: the terms that
// cancel in m2 are then at most `tiles` times the result, and Accum has digits to spare.
template <int THREADS, class Partition, class Exchange>
__device__ inline MomentsOfThread merge_moments_of_tiles(const Partition& partition, const MomentsOfThread& mine,
                                                         int tiles, Math count, Exchange& exchange, Accum* scratch) {
    if (partition.rank < partition.channel_vecs) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const int at = (partition.rank * P + p) * 4;
            exchange.put(at, mine.mean[p]);
            exchange.put(at + 1, mine.mean_lo[p]);
            exchange.put(at + 2, mine.scaled_m2[p]);
            exchange.put(at + 3, (Math)partition.count());
        }
    }
    exchange.barrier();
    const int channel_vec = partition.rank % partition.channel_vecs;
    Accum base[P], s[2 * P] = {};
    #pragma unroll
    for (int p = 0; p < P; p++) {
        base[p] = exchange.read(0, (channel_vec * P + p) * 4);
        s[p] = nothing_of(base[p]);
    }
    #pragma unroll 1        // usually one iteration: a block has more threads than a channel tile has tiles
    for (int tile = partition.rank / partition.channel_vecs; tile < tiles; tile += THREADS / partition.channel_vecs) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const int at = (channel_vec * P + p) * 4;
            const Accum n = exchange.read(tile, at + 3);
            if (n == 0) continue;
            const Accum distance = (exchange.read(tile, at) - base[p]) + exchange.read(tile, at + 1);
            s[p] += n * distance;
            s[P + p] += wide_m2(exchange.read(tile, at + 2)) + n * distance * distance;
        }
    }
    sum_over_scope<BLOCK, THREADS>(s, partition.size, partition.channel_vecs, scratch);
    exchange.release();
    MomentsOfThread m;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const Accum distance = s[p] / count, m2 = s[P + p] - s[p] * distance;
        m.mean[p] = (Math)(base[p] + distance);
        m.mean_lo[p] = (Math)((base[p] - m.mean[p]) + distance);
        m.scaled_m2[p] = m2 < 0 ? 0 : scale_m2(m2);
    }
    return m;
}

// Add up the sums of a channel tile's tiles.
template <int THREADS, int K, class Partition, class Exchange>
__device__ inline void merge_sums_of_tiles(const Partition& partition, Math (&sums)[K], int tiles, Exchange& exchange,
                                           Accum* scratch) {
    if (partition.rank < partition.channel_vecs) {
        #pragma unroll
        for (int k = 0; k < K; k++) exchange.put(partition.rank * K + k, sums[k]);
    }
    exchange.barrier();
    Accum s[K] = {};
    #pragma unroll 1        // usually one iteration: a block has more threads than a channel tile has tiles
    for (int tile = partition.rank / partition.channel_vecs; tile < tiles; tile += THREADS / partition.channel_vecs) {
        #pragma unroll
        for (int k = 0; k < K; k++) s[k] += exchange.read(tile, partition.rank % partition.channel_vecs * K + k);
    }
    sum_over_scope<BLOCK, THREADS>(s, partition.size, partition.channel_vecs, scratch);
    exchange.release();
    #pragma unroll
    for (int k = 0; k < K; k++) sums[k] = (Math)s[k];
}
#endif
