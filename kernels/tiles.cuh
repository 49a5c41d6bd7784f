// Tiles of a split plane: one owner each, for some stripes at a time.

struct Tiles {
    long long channels, spatial, first, stripes, tiles;
    int lanes;
};

// f(share) for the tile of this owner, in packs of x.
template <int OWNER, int THREADS, int CHUNKS, class F>
__device__ inline void each_tile(const Tiles& t, const Tensor& x, bool reverse, F f) {
    typedef Share<OWNER, THREADS> Owner;
    const long long owner = Owner::owner_in_grid(), owners = t.stripes * t.tiles;
    if (owner >= owners) return;
    f(Owner(t.first * t.tiles + (reverse ? owners - 1 - owner : owner), t.tiles, CHUNKS, t.lanes, x, t.channels, t.spatial));
}

#define TILES_PARAMETERS                                                                                              \
    long long channels, long long spatial, long long first, long long stripes, long long tiles, int lanes
#define TILES_OF Tiles{channels, spatial, first, stripes, tiles, lanes}
