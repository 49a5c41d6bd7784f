// Mean and centred squares of one tile, read once.
//
// Mean first, then the mean of the centred values: delta, what rounding took from the mean. (x - mean) is exact where
// the values lie close to their mean, so (x - mean) - delta keeps its digits however large the offset is. The squares
// are summed in the same pass, about the mean without delta: what that adds to them is taken off again.

// What of each value goes into their sum, which would be too large for values of 1e34 and more: no tile has as many as
// 2^17. Means of values so small that this flushes are found with delta.
constexpr Math SHARE = 7.6293945e-6;        // 2^-17

struct Moments {
    Math mean[P], delta[P], squares[P];     // squares: the sum of ((x - mean) - delta)^2, as below
};

// Squares of values around 1e25 or 1e-25 are no numbers of float. Where their sum is not, or is so small that it has
// lost digits, it is kept as minus its root, taken in a unit that has room. Roots are less than 1 then, or 1e19 and more:
// those are kept divided by 2^20, since they may be too large themselves.
#if !defined(STORAGE_FLOAT64)
constexpr Math LEAST_SQUARES = 7.8886091e-31f, MOST_SQUARES = 3.4028235e38f;    // 2^-100, and float's last
__device__ inline bool has_room(Math squares, Math count) {
    return squares >= LEAST_SQUARES * count && squares <= MOST_SQUARES;
}
__device__ inline Math room_for(Math squares) { return squares <= 1 ? 1.2089258e24f : 8.2718061e-25f; }  // 2^80, 2^-80
template <class T> __device__ inline T root_of(Math kept) { return kept > -1 ? (T)kept : (T)kept * 1048576; }
__device__ inline Accum wide_squares(Math kept) {
    return kept < 0 ? root_of<Accum>(kept) * root_of<Accum>(kept) : kept;
}
// (In float: a double's root needs registers that the widest variants do not have.)
__device__ inline Math kept_squares(Accum squares) {
    if (squares >= LEAST_SQUARES && squares <= MOST_SQUARES) return (Math)squares;
    const bool large = squares > 1;
    const Accum unit = large ? 6.223015277861142e-61 : 1.6069380442589903e60;       // 2^-200, 2^200
    return -sqrtf((Math)(squares * unit)) * (large ? 1.2089258e24f : 7.8886091e-31f);   // 2^80, 2^-100
}
__device__ inline Math rstd_of(Math kept, Math count, Math eps) {
    if (!(kept < 0)) return reciprocal_sqrt(kept / count + eps);
    if (kept > -1 && eps > 1) return reciprocal_sqrt(eps);
    const Math unit = kept > -1 ? 1.1529215e18f : 8.2718061e-25f;                           // 2^60, 2^-80
    const Math root = kept * (kept > -1 ? 1.1529215e18f : 8.6736174e-19f);                  // 2^60, 2^-60
    const Math scaled = reciprocal_sqrt(root * root / count + eps * unit * unit);
    // Below 2^-126 it is put together by hand.
    return unit < 1 && scaled < 1.4210855e-14f ? denormal(scaled * 5.9029581e20f) : scaled * unit;      // 2^-46, 2^69
}
__device__ inline Math variance_of(Math kept, Math count) {
    return kept < 0 ? root_of<Math>(kept) / count * root_of<Math>(kept) : kept / count;
}
__device__ inline Math rstd_of(Accum square) {
    const Accum rstd = 1 / sqrt(square);
    return rstd < 1.1754944e-38 ? denormal((Math)(rstd * 7.1362384635298e44)) : (Math)rstd;     // 2^-126, 2^149
}
#else
__device__ inline Math rstd_of(Accum square) { return 1 / sqrt(square); }
__device__ inline Accum wide_squares(Math kept) { return kept; }
__device__ inline Math kept_squares(Accum squares) { return squares; }
__device__ inline Math rstd_of(Math kept, Math count, Math eps) { return reciprocal_sqrt(kept / count + eps); }
__device__ inline Math variance_of(Math kept, Math count) { return kept / count; }
#endif

template <class T> __device__ inline void swap(T& a, T& b) {
    const T first = a;
    a = b;
    b = first;
}

// The sums of f(p, value, terms) over the owner's tile: of each of the K terms, for each plane p. Packs are read first
// where READ is set.
template <bool READ, int K, int OWNER, int REST, int THREADS, int CHUNKS, class Share, class F>
__device__ inline void sum_tile(const Share& share, const Tensor& x, Rest<REST, THREADS, CHUNKS>& rest, int chunks,
                                Math* scratch, Math (&total)[K * P], F f) {
    Math s[K][LINES] = {};
    const auto add_one = [&](int v, Storage value) {
        Math terms[K];
        f(plane_of(v), widen(value), terms);
        #pragma unroll
        for (int k = 0; k < K; k++) s[k][line_of(v)] += terms[k];
    };
    const auto add = [&](int k) {
        if (!share.holds(k)) return;
        const Pack pack = rest.get(k);
        #pragma unroll
        for (int v = 0; v < V; v++) add_one(v, pack.v[v]);
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
    if (Share::edges && share.edge >= 0) add_one(0, rest.edge);
    #pragma unroll
    for (int k = 0; k < K; k++) fold(s[k], total + k * P);
    sum_over_owner<OWNER, THREADS>(total, share.size, share.lanes, scratch);
}

// Two scratch areas of two sums each, which take turns: the first is free afterwards.
template <int OWNER, int REST, int THREADS, int CHUNKS, class Share>
__device__ inline Moments moments_of_tile(const Share& share, const Tensor& x, Rest<REST, THREADS, CHUNKS>& rest,
                                          int chunks, Math*& scratch, Math*& other) {
    Moments m;
    const Math count = (Math)share.count();
    sum_tile<true, 1, OWNER>(share, x, rest, chunks, scratch, m.mean, [](int, Math value, Math (&terms)[1]) {
        terms[0] = value * SHARE;
    });
    #pragma unroll
    for (int p = 0; p < P; p++) m.mean[p] = m.mean[p] / count / SHARE;
    Math sums[2 * P];
    sum_tile<false, 2, OWNER>(share, x, rest, chunks, other, sums, [&](int p, Math value, Math (&terms)[2]) {
        const Math d = value - m.mean[p];
        terms[0] = d;
        terms[1] = d * d;
    });
    // Of a plane that is all but constant, most of the squares may be delta's: they are summed again then.
    bool cancelled = false;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        m.delta[p] = sums[p] / count;
        m.squares[p] = sums[P + p] - sums[p] * m.delta[p];
        cancelled |= m.squares[p] < sums[P + p] / 4;
    }
    Math again[P];
    if (any_of_owner<OWNER, THREADS>(cancelled, share.lanes)) {
        sum_tile<false, 1, OWNER>(share, x, rest, chunks, scratch, again, [&](int p, Math value, Math (&terms)[1]) {
            const Math d = (value - m.mean[p]) - m.delta[p];
            terms[0] = d * d;
        });
        // Only of those planes: the others' bits must not depend on what they share a warp with.
        #pragma unroll
        for (int p = 0; p < P; p++) if (m.squares[p] < sums[P + p] / 4) m.squares[p] = again[p];
        swap(scratch, other);
    }
#if !defined(STORAGE_FLOAT64)
    // And in a unit that has room, where they are out of range; so may be the sums for delta, where the values are.
    bool odd = false;
    #pragma unroll
    for (int p = 0; p < P; p++) {
        odd |= !has_room(m.squares[p], count);
        if (!(m.squares[p] <= MOST_SQUARES)) m.delta[p] = 0;
    }
    if (any_of_owner<OWNER, THREADS>(odd, share.lanes)) {
        sum_tile<false, 2, OWNER>(share, x, rest, chunks, scratch, sums, [&](int p, Math value, Math (&terms)[2]) {
            const Math d = ((value - m.mean[p]) - m.delta[p]) * room_for(m.squares[p]);
            terms[0] = d;
            terms[1] = d * d;
        });
        #pragma unroll
        for (int p = 0; p < P; p++) {
            if (has_room(m.squares[p], count)) continue;
            const Math more = sums[p] / count, squares = sums[P + p] - sums[p] * more;
            const bool small = m.squares[p] <= 1;
            m.delta[p] += more * (small ? 8.2718061e-25f : 1.2089258e24f);                              // 2^-80, 2^80
            m.squares[p] = -sqrtf(squares < 0 ? 0 : squares) * (small ? 8.2718061e-25f : 1.1529215e18f);    // 2^-80, 2^60
        }
        swap(scratch, other);
    }
#endif
    return m;
}
