// Mean and centred squares of one tile, read once.
//
// Mean first, then the mean of the centred values: delta, what rounding took from the mean. (x - mean) is exact where
// the values lie close to their mean, so (x - mean) - delta keeps its digits however large the offset is.

struct Moments {
    Math mean[P], delta[P], squares[P];     // squares: the sum of ((x - mean) - delta)^2
};

// The sum of f(p, value) over the owner's tile, for each plane p: packs are read first where READ is set.
template <bool READ, int OWNER, int REST, int THREADS, int CHUNKS, class Share, class F>
__device__ inline void sum_tile(const Share& share, const Tensor& x, Rest<REST, THREADS, CHUNKS>& rest, int chunks,
                                Math* scratch, Math (&total)[P], F f) {
    Math s[LINES] = {};
    const auto add = [&](int k) {
        if (!share.holds(k)) return;
        const Pack pack = rest.get(k);
        #pragma unroll
        for (int v = 0; v < V; v++) s[line_of(v)] += f(plane_of(v), widen(pack.v[v]));
    };
    if (!READ) rest.each(chunks, add);
    else if (REST == REGISTERS) {
        rest.read(share, x, 0);
        rest.each(CHUNKS, add);
    } else {
        for (int from = 0; from < chunks; from += rest.batch) {
            rest.read(share, x, from);
            #pragma unroll
            for (int i = 0; i < rest.batch; i++) add(from + i);
        }
    }
    if (Share::edges && share.edge >= 0) s[0] += f(0, widen(rest.edge));
    fold(s, total);
    sum_over_owner<OWNER, THREADS>(total, share.size, share.lanes, scratch);
}

template <int OWNER, int REST, int THREADS, int CHUNKS, class Share>
__device__ inline Moments moments_of_tile(const Share& share, const Tensor& x, Rest<REST, THREADS, CHUNKS>& rest,
                                          int chunks, Math* scratch, Math* other) {
    Moments m;
    const Math count = (Math)share.count();
    sum_tile<true, OWNER>(share, x, rest, chunks, scratch, m.mean, [](int, Math value) { return value; });
    #pragma unroll
    for (int p = 0; p < P; p++) m.mean[p] /= count;
    sum_tile<false, OWNER>(share, x, rest, chunks, other, m.delta, [&](int p, Math value) {
        return value - m.mean[p];
    });
    #pragma unroll
    for (int p = 0; p < P; p++) m.delta[p] /= count;
    sum_tile<false, OWNER>(share, x, rest, chunks, scratch, m.squares, [&](int p, Math value) {
        const Math d = (value - m.mean[p]) - m.delta[p];
        return d * d;
    });
    return m;
}
