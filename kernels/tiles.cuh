// Tiles of split planes: one scope per tile, for the channel tiles of one round.

struct Tiles {
    long long channels, spatial, first, channel_tiles, tiles;
    int subdivision;
};

// Call f(partition) for the tile of this scope, with vecs aligned in x.
template <int SCOPE, int THREADS, int VECS_PER_THREAD, class F>
__device__ inline void each_tile(const Tiles& t, const Tensor& x, bool reverse, F f) {
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid(), scopes = t.channel_tiles * t.tiles;
    if (scope_index >= scopes) return;
    f(Partition<SCOPE, THREADS>(t.first * t.tiles + (reverse ? scopes - 1 - scope_index : scope_index), t.tiles,
                                VECS_PER_THREAD, t.subdivision, x, t.channels, t.spatial));
}
