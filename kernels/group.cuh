// A group: the blocks that share a stripe, each with one tile of it on chip. Every block publishes a few numbers of its
// tile, all meet once, and every block merges all of them in the same order.
//
//     CLUSTER   neighbours; each publishes in its own shared memory, and reads that of the others
//     GRID      any number of blocks of a cooperative launch, all resident: published in global memory, counted in.
//               They serve stripe after stripe; two areas take turns, so that a slow reader is never overtaken.

struct Group {
    int tiles;                      // of a stripe, and blocks of the group
    Math* partial;                  // GRID: [group][turn][tile][number]
    unsigned* arrived;              // GRID: [group], 0 at the launch
};

#if GROUPED
#define GROUP_PARAMETERS , int tiles, Math* partial, unsigned* arrived
#define GROUP_OF Group{tiles, partial, arrived}
#else
#define GROUP_PARAMETERS
#define GROUP_OF Group{1, 0, 0}
#endif

// 0, or NaN for what is not finite: a sum that begins with it is not there before the value has been read.
__device__ inline Accum nothing_of(Accum value) { return 0 * value; }

// f(owner) for each tile that this block (or warp) serves: owner = stripe * tiles + tile.
template <int OWNER, class Share, class F>
__device__ inline void each_owner(const Group& group, long long stripes, F f) {
    const long long owners = stripes * group.tiles;
    if (OWNER == GRID) {
        const long long step = gridDim.x / group.tiles * group.tiles;
        for (long long owner = blockIdx.x; owner < owners; owner += step) f(owner);
    } else {
        const long long owner = Share::owner_in_grid();
        if (owner < owners) f(owner);
    }
}

template <int OWNER> struct Exchange;

#if GROUPED
#if defined(SIMT) || __CUDA_ARCH__ >= 900      // older ones have no clusters
template <> struct Exchange<CLUSTER> {
    Math* area;
    __device__ Exchange(const Group&, long long, int, Math* area) : area(area) {}
    __device__ void publish(int i, Math value) { area[i] = value; }
    __device__ void meet() {
        if (threadIdx.x < 32) cluster_fence();      // only the first warp publishes
        cluster_arrive();
        cluster_wait();
    }
    __device__ Math read(int tile, int i) const { return *peer(area + i, tile); }
    // No block ends before all have read: the last wait is at the end of the kernel. To be called once all that the
    // thread read has gone into sum_over_owner: its reads are complete then, without a fence.
    __device__ void leave() { cluster_arrive(); }
    __device__ void end() { cluster_wait(); }
};
#endif

template <> struct Exchange<GRID> {
    Math* areas;
    int numbers, tile;
    unsigned* arrived;
    unsigned target;
    // Exchange of `numbers` numbers for the tile of `owner`.
    __device__ Exchange(const Group& group, long long owner, int numbers, Math*)
        : numbers(numbers), tile((int)(owner % group.tiles)) {
        const int number = blockIdx.x / group.tiles, groups = gridDim.x / group.tiles;
        const long long turn = owner / group.tiles / groups;
        areas = group.partial + (number * 2 + turn % 2) * (long long)group.tiles * numbers;
        arrived = group.arrived + number;
        target = (unsigned)((turn + 1) * group.tiles);
    }
    __device__ void publish(int i, Math value) { store(areas + tile * numbers + i, value); }
    __device__ void meet() {
        __syncthreads();
        if (threadIdx.x == 0) {
            add_release(arrived);
            wait_until(arrived, target);
        }
        __syncthreads();
    }
    __device__ Math read(int tile, int i) const { return load_fresh(areas + tile * numbers + i); }
    __device__ void leave() {}
    // The next stripe's first sums may take the scratch area that this one's last took.
    __device__ void end() { __syncthreads(); }
};

// The moments of a stripe from those of its tiles, about the mean of tile 0, which has the most elements: what
// cancels in the squares is then at most as many times the result as there are tiles, and Accum has digits to spare.
template <int THREADS, class Share, class Exchange>
__device__ inline Moments merge_moments_of_tiles(const Share& share, const Moments& mine, int tiles, Math count,
                                                 Exchange& exchange, Accum* scratch) {
    if (share.rank < share.lanes) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const int at = (share.rank * P + p) * 4;
            exchange.publish(at, mine.mean[p]);
            exchange.publish(at + 1, mine.delta[p]);
            exchange.publish(at + 2, mine.squares[p]);
            exchange.publish(at + 3, (Math)share.count());
        }
    }
    exchange.meet();
    const int lane = share.rank % share.lanes;
    Accum base[P], s[2 * P] = {};
    #pragma unroll
    for (int p = 0; p < P; p++) {
        base[p] = exchange.read(0, (lane * P + p) * 4);
        s[p] = nothing_of(base[p]);
    }
    #pragma unroll 1        // once, as a rule: a block has more threads than a stripe has tiles
    for (int tile = share.rank / share.lanes; tile < tiles; tile += THREADS / share.lanes) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const int at = (lane * P + p) * 4;
            const Accum n = exchange.read(tile, at + 3);
            if (n == 0) continue;
            const Accum distance = (exchange.read(tile, at) - base[p]) + exchange.read(tile, at + 1);
            s[p] += n * distance;
            s[P + p] += wide_squares(exchange.read(tile, at + 2)) + n * distance * distance;
        }
    }
    sum_over_owner<BLOCK, THREADS>(s, share.size, share.lanes, scratch);
    exchange.leave();
    Moments m;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        const Accum distance = s[p] / count, squares = s[P + p] - s[p] * distance;
        m.mean[p] = (Math)(base[p] + distance);
        m.delta[p] = (Math)((base[p] - m.mean[p]) + distance);
        m.squares[p] = squares < 0 ? 0 : kept_squares(squares);
    }
    return m;
}

// Sums of a stripe from those of its tiles.
template <int THREADS, int K, class Share, class Exchange>
__device__ inline void merge_sums_of_tiles(const Share& share, Math (&sums)[K], int tiles, Exchange& exchange,
                                           Accum* scratch) {
    if (share.rank < share.lanes) {
        #pragma unroll
        for (int k = 0; k < K; k++) exchange.publish(share.rank * K + k, sums[k]);
    }
    exchange.meet();
    Accum s[K] = {};
    #pragma unroll 1        // once, as a rule: a block has more threads than a stripe has tiles
    for (int tile = share.rank / share.lanes; tile < tiles; tile += THREADS / share.lanes) {
        #pragma unroll
        for (int k = 0; k < K; k++) s[k] += exchange.read(tile, share.rank % share.lanes * K + k);
    }
    sum_over_owner<BLOCK, THREADS>(s, share.size, share.lanes, scratch);
    exchange.leave();
    #pragma unroll
    for (int k = 0; k < K; k++) sums[k] = (Math)s[k];
}
#endif
