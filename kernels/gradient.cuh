// The gradient of a plane: its three sums over a tile, and dx from them.

// What is known of a thread's planes: the saved (or running) statistics, in the unit of each, and the affine parameters.
struct Statistics {
    Math unit[P], mean[P], delta[P], rstd[P];
    AffineOfThread affine;

    // own: they are the planes' own, not running statistics, whose unit is 1. delta_ may be null; it is looked at only
    // where there is an epilogue, whose z must be the forward's own.
    template <class Share>
    __device__ Statistics(const Share& share, bool own, const Math* mean_, const Math* delta_, const Math* rstd_,
                          const Affine& affine_, long long channels) : affine(share, affine_, channels) {
        const bool exists = share.exists(channels);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long i = share.n * channels + share.c + p;
            const Math m = exists ? load(mean_ + i) : 0;
            const Math r = exists ? load(rstd_ + i) : 0;
            const Unit u = own ? unit_of(m, r) : Unit{1, r};
            unit[p] = u.unit;
            rstd[p] = u.rstd;
            mean[p] = m * unit[p];
            delta[p] = EPILOGUE && delta_ && exists ? load(delta_ + i) * unit[p] : 0;
        }
    }

    __device__ Math centred(int p, Math x) const { return x * unit[p] - mean[p]; }
};

// Put the gradient g = dy * activation'(z) in the place of dy, in the batch of packs that begins with `from`; with the
// first, in the edge. f(v, x, g) for each element, before g is rounded to what is stored; dresidual, if
// there is one, is g.
template <int REST, int THREADS, int CHUNKS, class Share, class F>
__device__ inline void apply_epilogue(const Share& share, const Epilogue& epilogue, const Tensor& dresidual,
                                      const Rest<REST, THREADS, CHUNKS>& x, Rest<REST, THREADS, CHUNKS>& dy, int from,
                                      const Statistics& stat, F f) {
    const bool more = epilogue.residual.data, wanted = dresidual.data;
    Storage* residual = more ? share.origin(epilogue.residual) : 0;
    Storage* to = wanted ? share.origin(dresidual) : 0;
    Math scale[P], shift[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        scale[p] = stat.rstd[p] * stat.affine.weight[p];
        shift[p] = stat.affine.bias[p] - stat.delta[p] * scale[p];
    }
    const auto gradient = [&](int v, Storage x_, Storage dy_, Math r) {
        const int p = plane_of(v);
        const Math affine = stat.centred(p, widen(x_)) * scale[p] + shift[p];
        const Math g = gradient_through(affine, r, widen(dy_), epilogue.slope);
        f(v, widen(x_), g);
        return narrow(g);
    };
    const auto one = [&](int k) {
        if (!share.holds(k)) return;
        const Pack a = x.get(k);
        Pack b = dy.get(k), r = {};
        if (more) r = share.get(epilogue.residual, residual, k);
        #pragma unroll
        for (int v = 0; v < V; v++) b.v[v] = gradient(v, a.v[v], b.v[v], more ? widen(r.v[v]) : 0);
        dy.set(k, b);
        if (wanted) share.put(dresidual, to, k, b);
    };
    #pragma unroll
    for (int i = 0; i < Rest<REST, THREADS, CHUNKS>::batch; i++) one(from + i);
    if (Share::edges && from == 0 && share.edge >= 0) {
        dy.edge = gradient(0, x.edge, dy.edge, more ? widen(load(residual + share.edge)) : 0);
        if (wanted) store(to + share.edge, dy.edge);
    }
}

// sums: P times sum(g), then P times sum(g * c), then P times sum(c), where c = (x - mean) * rstd, as rounded.
template <int OWNER, int REST, int THREADS, int CHUNKS, class Share>
__device__ inline void gradient_sums(const Share& share, const Tensor& x, const Tensor& dy, const Epilogue& epilogue,
                                     const Tensor& dresidual, Rest<REST, THREADS, CHUNKS>& rest_x,
                                     Rest<REST, THREADS, CHUNKS>& rest_dy, int chunks, const Statistics& stat,
                                     Math (&sums)[3 * P], Math* scratch) {
    Math s_dy[LINES] = {}, s_dyc[LINES] = {}, s_c[LINES] = {};
    const auto add_one = [&](int v, Math x_, Math g) {
        const Math c = stat.centred(plane_of(v), x_);
        s_dy[line_of(v)] += g;
        s_dyc[line_of(v)] += g * c;
        s_c[line_of(v)] += c;
    };
    const auto add = [&](int from) {        // the packs that have been read, and with the first the edge
#if EPILOGUE
        apply_epilogue(share, epilogue, dresidual, rest_x, rest_dy, from, stat, add_one);
#else
        #pragma unroll
        for (int i = 0; i < Rest<REST, THREADS, CHUNKS>::batch; i++) {
            if (!share.holds(from + i)) continue;
            const Pack a = rest_x.get(from + i), b = rest_dy.get(from + i);
            #pragma unroll
            for (int v = 0; v < V; v++) add_one(v, widen(a.v[v]), widen(b.v[v]));
        }
        if (Share::edges && from == 0 && share.edge >= 0) add_one(0, widen(rest_x.edge), widen(rest_dy.edge));
#endif
    };
    for (int from = 0; from < (REST == REGISTERS ? 1 : chunks); from += rest_x.batch) {
        rest_x.read(share, x, from);
        rest_dy.read(share, dy, from);
        add(from);
    }
    fold(s_dy, sums);
    fold(s_dyc, sums + P);
    fold(s_c, sums + 2 * P);
    sum_over_owner<OWNER, THREADS>(sums, share.size, share.lanes, scratch);
    #pragma unroll
    for (int p = 0; p < P; p++) {
        sums[P + p] *= stat.rstd[p];
        sums[2 * P + p] *= stat.rstd[p];
    }
}

// dx = weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), where xhat = c - delta, with delta = mean(c), as
// scale * ((dy - level) - (x - mean) * slope).
struct Gradient {
    Math level[P], slope[P], scale[P];

    __device__ void set(int p, Math sum_dy, Math sum_dy_xhat, Math delta, Math count, const Statistics& stat) {
        const Math mean_dy_xhat = sum_dy_xhat / count;
        slope[p] = mean_dy_xhat * stat.rstd[p];
        level[p] = sum_dy / count - delta * mean_dy_xhat;
        scale[p] = stat.affine.weight[p] * stat.rstd[p];
    }

    __device__ Math dx(int p, Math x, Math dy, const Statistics& stat) const {
        return ((dy - level[p]) - stat.centred(p, x) * slope[p]) * scale[p] * stat.unit[p];
    }
};

// The sums of a plane: in Math, or in Storage where they are the gradient of a per-sample parameter already.
struct Sums {
    void *dy, *dy_xhat;             // may be null
    int flags;

    __device__ void set(long long i, Math sum_dy, Math sum_dy_xhat) const {
        if (dy) store_parameter(dy, !(flags & NARROW_SUM_DY), i, sum_dy);
        set_dy_xhat(i, sum_dy_xhat);
    }
    __device__ void set_dy_xhat(long long i, Math sum) const {
        if (dy_xhat) store_parameter(dy_xhat, !(flags & NARROW_SUM_DY_XHAT), i, sum);
    }
};
