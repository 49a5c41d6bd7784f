// The double backward of a plane: what is summed over a tile of it, and both results from that.
//
// With xhat = (x - mean) * rstd, g = dy and v = rstd * u, u = ddx, all of them less their means over the plane, and the
// means a of v * xhat, c of g * xhat and s of v * g, less a * c:
//
//     ddy = weight * v + q * xhat + ddbias,   q = ddweight - weight * a
//     dx = rstd * (q * g - weight * c * v + r * xhat),   r = weight * (a * c - s) - q * c,   dweight = count * s
//
// (derived in cupynorm/functional.py). So all that is multiplied is of the size of some result. Means are taken away in
// two parts, so that large ones cost no digits: first the pivot, the tile's mean as rounded, then what that left.

// Of a tile, for each plane: the pivots, and the sums of QUANTITIES about them.
enum { OF_X, OF_G, OF_U, OF_GX, OF_VX, OF_VG, QUANTITIES };

struct Products {
    Math pivot_g[P], pivot_u[P], sums[QUANTITIES * P];
};

// Where x, dy and ddx rest. ddx may be missing (data null): it is 0 then.
struct Given { Tensor x, dy, ddx; };

template <int REST, int THREADS, int CHUNKS> struct Rests {
    typedef Rest<REST, THREADS, CHUNKS> Each;
    Each x, dy, ddx;
    __device__ Rests(Pack* shared = 0, int tile = 0) : x(shared), dy(shared + tile), ddx(shared + 2 * tile) {}

    // f(v, x, g, u) for each element of pack k.
    template <class F> __device__ void pack(int k, bool more, F f) const {
        const Pack a = x.get(k), b = dy.get(k);
        Pack d = {};
        if (more) d = ddx.get(k);
        #pragma unroll
        for (int v = 0; v < V; v++) f(v, widen(a.v[v]), widen(b.v[v]), more ? widen(d.v[v]) : 0);
    }
    template <class F> __device__ void at_edge(bool more, F f) const {
        f(0, widen(x.edge), widen(dy.edge), more ? widen(ddx.edge) : 0);
    }
};

// The statistics of a thread's planes. For xhat the mean is in a unit, of a plane whose own it is.
struct Standard {
    Math unit[P], mean[P], in_unit[P], rstd[P];

    template <class Share>
    __device__ Standard(const Share& share, bool own, const Math* mean_, const Math* rstd_, long long channels) {
        const bool exists = share.exists(channels);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long i = share.n * channels + share.c + p;
            const Math m = exists ? load(mean_ + i) : 0, r = exists ? load(rstd_ + i) : 0;
            const Unit u = own ? unit_of(m, r) : Unit{1, r};
            unit[p] = u.unit;
            mean[p] = m * u.unit;
            in_unit[p] = u.rstd;
            rstd[p] = u.rstd * u.unit;
        }
    }

    __device__ Math xhat(int p, Math x) const { return (x * unit[p] - mean[p]) * in_unit[p]; }
};

// What else is known of them: read when the sums are there, as it would take registers until then.
struct Parameters {
    Affine affine, gradient;        // weight and ddbias; ddweight, as a bias: where there is none it is 0
};

struct ParametersOfThread {
    Math weight[P], ddbias[P], ddweight[P];

    template <class Share>
    __device__ ParametersOfThread(const Share& share, const Parameters& parameters, long long channels) {
        const AffineOfThread affine(share, parameters.affine, channels), gradient(share, parameters.gradient, channels);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            weight[p] = affine.weight[p];
            ddbias[p] = affine.bias[p];
            ddweight[p] = gradient.bias[p];
        }
    }
};

// scratch, other: of 2 P and of QUANTITIES * P sums (scratch_size).
template <int OWNER, int REST, int THREADS, int CHUNKS, class Share>
__device__ inline Products products_of_tile(const Share& share, const Given& given, Rests<REST, THREADS, CHUNKS>& rest,
                                            int chunks, const Standard& stat, Math* scratch, Math* other) {
    const bool more = given.ddx.data;
    Products m;
    {
        Math s_g[LINES] = {}, s_u[LINES] = {}, means[2 * P];
        const auto add = [&](int v, Math, Math g, Math u) {
            s_g[line_of(v)] += g;
            s_u[line_of(v)] += u;
        };
        for (int from = 0; from < (REST == REGISTERS ? 1 : chunks); from += rest.x.batch) {
            rest.x.read(share, given.x, from);
            rest.dy.read(share, given.dy, from);
            if (more) rest.ddx.read(share, given.ddx, from);
            #pragma unroll
            for (int i = 0; i < Rest<REST, THREADS, CHUNKS>::batch; i++) {
                if (share.holds(from + i)) rest.pack(from + i, more, add);
            }
        }
        if (Share::edges && share.edge >= 0) rest.at_edge(more, add);
        fold(s_g, means);
        fold(s_u, means + P);
        sum_over_owner<OWNER, THREADS>(means, share.size, share.lanes, scratch);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            m.pivot_g[p] = means[p] / (Math)share.count();
            m.pivot_u[p] = means[P + p] / (Math)share.count();
        }
    }
    Math s[QUANTITIES][LINES] = {};
    const auto add = [&](int v, Math x, Math g_, Math u) {
        const int p = plane_of(v), line = line_of(v);
        const Math xhat = stat.xhat(p, x), g = g_ - m.pivot_g[p];
        s[OF_X][line] += xhat;
        s[OF_G][line] += g;
        s[OF_GX][line] += g * xhat;
        const Math u_ = u - m.pivot_u[p], v_ = u_ * stat.rstd[p];
        s[OF_U][line] += u_;
        s[OF_VX][line] += v_ * xhat;
        s[OF_VG][line] += v_ * g;
    };
    rest.x.each(chunks, [&](int k) { if (share.holds(k)) rest.pack(k, more, add); });
    if (Share::edges && share.edge >= 0) rest.at_edge(more, add);
    #pragma unroll
    for (int i = 0; i < QUANTITIES; i++) fold(s[i], m.sums + i * P);
    sum_over_owner<OWNER, THREADS>(m.sums, share.size, share.lanes, other);
    return m;
}

// What follows from the sums of a whole plane.
struct Means {
    Math pivot_g, pivot_u;          // of g and u
    Math g, v, x;                   // what is left of the means without the pivots: of g, v and xhat
    Math a, c, s;
};

// s: the plane's sums, about base_g and base_u; T: Math, or Accum where there are several tiles.
template <class T>
__device__ inline Means means_of(T count, T base_g, T base_u, T rstd, T x, T g, T u, T gx, T vx, T vg) {
    const T mean_x = x / count, mean_g = g / count, mean_u = u / count, v = u * rstd;
    const T a = (vx - v * mean_x) / count, c = (gx - g * mean_x) / count, s = (vg - v * mean_g) / count - a * c;
    Means m;
    m.pivot_g = (Math)(base_g + mean_g);
    m.pivot_u = (Math)(base_u + mean_u);
    m.g = (Math)((base_g - m.pivot_g) + mean_g);
    m.v = (Math)(((base_u - m.pivot_u) + mean_u) * rstd);
    m.x = (Math)mean_x;
    m.a = (Math)a;
    m.c = (Math)c;
    m.s = (Math)s;
    return m;
}

// Add the sums of a tile of n elements, number(i), to those of a plane, at(i). The distances of the tile's pivots from
// the plane's bases count in (as for squares: Chan, Golub, LeVeque 1983).
template <class F, class G>
__device__ inline void add_products(Accum n, Accum far_g, Accum far_u, Accum rstd, F number, G at) {
    const Accum x = number(OF_X), g = number(OF_G), u = number(OF_U), v = u * rstd, far_v = far_u * rstd;
    at(OF_X) += x;
    at(OF_G) += g + n * far_g;
    at(OF_U) += u + n * far_u;
    at(OF_GX) += number(OF_GX) + far_g * x;
    at(OF_VX) += number(OF_VX) + far_v * x;
    at(OF_VG) += number(OF_VG) + far_v * g + far_g * v + n * far_v * far_g;
}

// Both results of a thread's planes.
struct DoubleGradient {
    Math pivot_g[P], pivot_u[P], weight[P], q[P], of_v[P], of_x[P], rest_dy[P], rest_dx[P];

    __device__ void set(int p, const Means& m, const ParametersOfThread& of) {
        const Math w = weight[p] = of.weight[p];
        pivot_g[p] = m.pivot_g;
        pivot_u[p] = m.pivot_u;
        q[p] = of.ddweight[p] - w * m.a;
        of_v[p] = w * m.c;
        of_x[p] = w * (m.a * m.c - m.s) - q[p] * m.c;
        rest_dy[p] = of.ddbias[p] - w * m.v - q[p] * m.x;
        rest_dx[p] = of_v[p] * m.v - q[p] * m.g - of_x[p] * m.x;
    }
};

template <int REST, int THREADS, int CHUNKS, class Share>
__device__ inline void write_both(const Share& share, const Tensor& ddy, const Tensor& dx,
                                  const Rests<REST, THREADS, CHUNKS>& rest, int chunks, bool more, const Standard& stat,
                                  const DoubleGradient& d) {
    Storage *to_ddy = share.origin(ddy), *to_dx = share.origin(dx);
    Storage first, second;
    const auto both = [&](int v, Math x, Math g, Math u) {
        const int p = plane_of(v);
        const Math xhat = stat.xhat(p, x), v_ = (u - d.pivot_u[p]) * stat.rstd[p];
        first = narrow(d.weight[p] * v_ + (d.q[p] * xhat + d.rest_dy[p]));
        second = narrow((d.q[p] * (g - d.pivot_g[p]) + (d.of_x[p] * xhat - d.of_v[p] * v_) + d.rest_dx[p]) * stat.rstd[p]);
    };
    rest.x.each(chunks, [&](int k) {
        if (!share.holds(k)) return;
        Pack a, b;
        rest.pack(k, more, [&](int v, Math x, Math g, Math u) {
            both(v, x, g, u);
            a.v[v] = first;
            b.v[v] = second;
        });
        share.put(ddy, to_ddy, k, a);
        share.put(dx, to_dx, k, b);
    });
    if (Share::edges && share.edge >= 0) {
        rest.at_edge(more, both);
        store(to_ddy + share.edge, first);
        store(to_dx + share.edge, second);
    }
}

#define GIVEN_PARAMETERS TENSOR(x), TENSOR(dy), TENSOR(ddx)
#define GIVEN Given{OF(x), OF(dy), OF(ddx)}
// ddbias takes the place of the bias in flags, and ddweight in those of its own.
#define KNOWN_PARAMETERS                                                                                              \
    const Math *mean, const Math *rstd, const void *weight, const void *ddbias, int flags, const void *ddweight,      \
    int gradient_flags
#define PARAMETERS Parameters{Affine{weight, ddbias, flags}, Affine{0, ddweight, gradient_flags}}
