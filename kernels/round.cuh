// A round: the channel tiles that a launch serves, with one scope for each tile. A split may have several rounds.

#ifndef CUPYNORM_ROUND
#define CUPYNORM_ROUND

#include "partition.cuh"

struct Round {
    long long channels, spatial;
    long long first, channel_tiles; // the channel tiles [first, first + channel_tiles)
    long long tiles;                // of each channel tile
    int subdivision;
};

// Call f(partition) for the tile of this scope, with vecs aligned in x. reverse: begin with the last tile.
template <int SCOPE, int THREADS, int VECS_PER_THREAD, class T, class F>
__device__ inline void each_tile(const Round& round, const TensorOf<T>& x, bool reverse, F f) {
    const long long scope_index = Partition<SCOPE, THREADS>::scope_in_grid();
    const long long scopes = round.channel_tiles * round.tiles;
    if (scope_index >= scopes) return;
    f(Partition<SCOPE, THREADS>(round.first * round.tiles + (reverse ? scopes - 1 - scope_index : scope_index),
                                round.tiles, VECS_PER_THREAD, round.subdivision, x, round.channels, round.spatial));
}

#endif
