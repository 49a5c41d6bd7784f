// Double backward of a plane: the sums over each of its tiles, and both results from these sums.
//
// Let xhat = (x - mean) * rstd, g = dy, u = ddx and v = rstd * u, each minus its mean over the plane. With
// a = mean(v * xhat), c = mean(g * xhat) and s = mean(v * g) - a * c:
//
//     ddy = weight * v + q * xhat + ddbias,   q = ddweight - weight * a
//     dx = rstd * (q * g - weight * c * v + r * xhat),   r = weight * (a * c - s) - q * c,   dweight = count * s
//
// (derived in cupynorm/functional.py). In this form every factor is of the size of some result. Means are subtracted in
// two parts, so that large ones cost no digits: first the shift, which is the tile's rounded mean, then the remainder.

#ifndef CUPYNORM_DOUBLE
#define CUPYNORM_DOUBLE

#include "affine.cuh"
#include "merge.cuh"
#include "sums.cuh"
#include "tile.cuh"
#include "unit.cuh"

// For each plane of a tile: the shifts, and the sums of these QUANTITIES, with the shifts subtracted from g and u.
enum { OF_X, OF_G, OF_U, OF_GX, OF_VX, OF_VG, QUANTITIES };
static_assert(QUANTITIES == DOUBLE_BACKWARD_MERGED, "ops.py");

struct Products {
    Math shift_g[P], shift_u[P], sums[QUANTITIES * P];
};

// ddx.data may be null: ddx is then 0.
struct Inputs { Tensor x, dy, ddx; };

template <int RESIDENCY, int THREADS, int VECS_PER_THREAD> struct InputTiles {
    Tile<RESIDENCY, THREADS, VECS_PER_THREAD> x, dy, ddx;
    __device__ InputTiles(Vec* shared = 0, int vecs = 0) : x(shared), dy(shared + vecs), ddx(shared + 2 * vecs) {}

    // Call f(v, x, g, u) for each element v of vec k.
    template <class F> __device__ void vec(int k, bool more, F f) const {
        const Vec a = x.get(k), b = dy.get(k);
        Vec d = {};
        if (more) d = ddx.get(k);
        #pragma unroll
        for (int v = 0; v < VEC_SIZE; v++) f(v, widen(a.v[v]), widen(b.v[v]), more ? widen(d.v[v]) : 0);
    }
    template <class F> __device__ void at_tail(bool more, F f) const {
        f(0, widen(x.tail), widen(dy.tail), more ? widen(ddx.tail) : 0);
    }
};

// The statistics of a thread's planes. If they are the planes' own, xhat is computed in each plane's unit (unit.cuh),
// otherwise in unit 1: `mean` is the mean times unit, in_unit is rstd / unit.
struct Stats {
    Math unit[P], mean[P], in_unit[P], rstd[P];

    template <class Partition>
    __device__ Stats(const Partition& partition, bool own, const Math* mean_, const Math* rstd_, long long channels) {
        const bool exists = partition.exists(channels);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long i = partition.n * channels + partition.c + p;
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

// Each may be null; flags are those of weight, of ddbias (as of a bias) and of ddweight.
struct Parameters {
    const void *weight, *ddbias, *ddweight;
    int flags;
};

// Load them after the sums: they would occupy registers until then.
struct ParametersOfThread {
    Math weight[P], ddbias[P], ddweight[P];

    template <class Partition>
    __device__ ParametersOfThread(const Partition& partition, const Parameters& parameters, long long channels) {
        const int flags = parameters.flags;
        load_of_planes(weight, partition, channels, parameters.weight, flags & WIDE_WEIGHT, flags & SAMPLE_WEIGHT, 1);
        load_of_planes(ddbias, partition, channels, parameters.ddbias, flags & WIDE_BIAS, flags & SAMPLE_BIAS, 0);
        load_of_planes(ddweight, partition, channels, parameters.ddweight, flags & WIDE_DDWEIGHT,
                       flags & SAMPLE_DDWEIGHT, 0);
    }
};

// scratch and other: areas for 2 * P and for QUANTITIES * P sums (scratch_size).
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition>
__device__ inline Products products_of_tile(const Partition& partition, const Inputs& inputs,
                                            InputTiles<RESIDENCY, THREADS, VECS_PER_THREAD>& tile,
                                            int vecs_per_thread, const Stats& stat, Math* scratch, Math* other) {
    Products m;
    Math s_g[LINES] = {}, s_u[LINES] = {}, means[2 * P];
    const auto add_means = [&](int v, Math, Math g, Math u) {
        s_g[line_of(v)] += g;
        s_u[line_of(v)] += u;
    };
    for (int from = 0; from < (RESIDENCY == REGISTERS ? 1 : vecs_per_thread); from += tile.x.batch) {
        tile.x.read(partition, inputs.x, from);
        tile.dy.read(partition, inputs.dy, from);
        if (inputs.ddx.data) tile.ddx.read(partition, inputs.ddx, from);
        with_constant(inputs.ddx.data, [&](bool more) {
            #pragma unroll
            for (int i = 0; i < Tile<RESIDENCY, THREADS, VECS_PER_THREAD>::batch; i++) {
                if (partition.holds(from + i)) tile.vec(from + i, more, add_means);
            }
        });
    }
    if (Partition::has_tails && partition.tail >= 0) tile.at_tail(inputs.ddx.data, add_means);
    fold(s_g, means);
    fold(s_u, means + P);
    sum_over_scope<SCOPE, THREADS>(means, partition.size, partition.channel_vecs, scratch);
    #pragma unroll
    for (int p = 0; p < P; p++) {
        m.shift_g[p] = means[p] / (Math)partition.count();
        m.shift_u[p] = means[P + p] / (Math)partition.count();
    }
    Math s[QUANTITIES][LINES] = {};
    with_constant(inputs.ddx.data, [&](bool more) {
        const auto add = [&](int v, Math x, Math g_, Math u) {
            const int p = plane_of(v), line = line_of(v);
            const Math xhat = stat.xhat(p, x), g = g_ - m.shift_g[p];
            s[OF_X][line] += xhat;
            s[OF_G][line] += g;
            s[OF_GX][line] += g * xhat;
            const Math u_ = u - m.shift_u[p], v_ = u_ * stat.rstd[p];
            s[OF_U][line] += u_;
            s[OF_VX][line] += v_ * xhat;
            s[OF_VG][line] += v_ * g;
        };
        tile.x.each(vecs_per_thread, [&](int k) { if (partition.holds(k)) tile.vec(k, more, add); });
        if (Partition::has_tails && partition.tail >= 0) tile.at_tail(more, add);
    });
    #pragma unroll
    for (int i = 0; i < QUANTITIES; i++) fold(s[i], m.sums + i * P);
    sum_over_scope<SCOPE, THREADS>(m.sums, partition.size, partition.channel_vecs, other);
    return m;
}

// The means of a whole plane, from which both results are computed.
struct Coefficients {
    Math shift_g, shift_u;          // the rounded means of g and u
    Math g, v, x;                   // the means of g, v and xhat after the shifts are subtracted
    Math a, c, s;                   // as in the formulas above
};

// sums: the plane's, about base_g and base_u. T: Math, or Accum if there are several tiles.
template <class T>
__device__ inline Coefficients coefficients_of(T count, T base_g, T base_u, T rstd, const T (&sums)[QUANTITIES]) {
    const T mean_x = sums[OF_X] / count, mean_g = sums[OF_G] / count, mean_u = sums[OF_U] / count;
    const T v = sums[OF_U] * rstd, a = (sums[OF_VX] - v * mean_x) / count;
    const T c = (sums[OF_GX] - sums[OF_G] * mean_x) / count, s = (sums[OF_VG] - v * mean_g) / count - a * c;
    Coefficients m;
    m.shift_g = (Math)(base_g + mean_g);
    m.shift_u = (Math)(base_u + mean_u);
    m.g = (Math)((base_g - m.shift_g) + mean_g);
    m.v = (Math)(((base_u - m.shift_u) + mean_u) * rstd);
    m.x = (Math)mean_x;
    m.a = (Math)a;
    m.c = (Math)c;
    m.s = (Math)s;
    return m;
}

// The numbers of a tile that are merged: its element count, the shifts and the sums.
enum { TILE_COUNT, SHIFT_G, SHIFT_U, TILE_SUMS };
static_assert(TILE_SUMS + QUANTITIES == DOUBLE_BACKWARD_PARTIALS, "ops.py");

template <class Partition>
__device__ inline Math partial_of_tile(const Partition& partition, const Products& m, int p, int i) {
    if (i == TILE_COUNT) return (Math)partition.count();
    return i == SHIFT_G ? m.shift_g[p] : i == SHIFT_U ? m.shift_u[p] : m.sums[(i - TILE_SUMS) * P + p];
}

// Add a tile, whose numbers number(i) returns, to the plane's sums s about base_g and base_u (as for squares: Chan,
// Golub, LeVeque 1983). The last tile of an unaligned plane may be empty: its shifts are NaN.
template <class F>
__device__ inline void add_products(F number, Accum base_g, Accum base_u, Accum rstd, Accum (&s)[QUANTITIES]) {
    const Accum n = number(TILE_COUNT);
    if (n == 0) return;
    const Accum far_g = number(SHIFT_G) - base_g, far_u = number(SHIFT_U) - base_u, far_v = far_u * rstd;
    const auto sum = [&](int quantity) { return number(TILE_SUMS + quantity); };
    const Accum x = sum(OF_X), g = sum(OF_G), u = sum(OF_U), v = u * rstd;
    s[OF_X] += x;
    s[OF_G] += g + n * far_g;
    s[OF_U] += u + n * far_u;
    s[OF_GX] += sum(OF_GX) + far_g * x;
    s[OF_VX] += sum(OF_VX) + far_v * x;
    s[OF_VG] += sum(OF_VG) + far_v * g + far_g * v + n * far_v * far_g;
}

// Call f(p, coefficients) for each plane p of a thread, with the coefficients from the numbers of all tiles.
template <int THREADS, class Partition, class Exchange, class F>
__device__ inline void merge_products_of_tiles(const Partition& partition, const Products& mine, int tiles, Accum count,
                                               const Stats& stat, Exchange& exchange, Accum* scratch, F f) {
    const TileNumbers<DOUBLE_BACKWARD_PARTIALS, Partition, Exchange> numbers(partition, exchange, [&](int p, int i) {
        return partial_of_tile(partition, mine, p, i);
    });
    #pragma unroll
    for (int p = 0; p < P; p++) {   // one plane at a time: all together need too many registers
        // bases: the shifts of tile 0, which has the most elements
        const Math base_g = numbers.read(0, p, SHIFT_G), base_u = numbers.read(0, p, SHIFT_U);
        Accum s[QUANTITIES] = {};
        s[OF_G] = nothing_of(base_g);
        s[OF_U] = nothing_of(base_u);
        Accum* area = scratch + p * scratch_size<THREADS>(partition.channel_vecs, QUANTITIES);
        numbers.template sum<THREADS>(tiles, s, area, [&](int tile) {
            add_products([&](int i) { return (Accum)numbers.read(tile, p, i); }, base_g, base_u, stat.rstd[p], s);
        });
        if (p == P - 1) exchange.release();
        f(p, coefficients_of<Accum>(count, base_g, base_u, stat.rstd[p], s));
    }
}

// For a thread's planes: the shifts, and the factors and offsets of both results.
struct DoubleGradient {
    Math shift_g[P], shift_u[P], weight[P], q[P], of_v[P], of_x[P], offset_ddy[P], offset_dx[P];

    __device__ void set(int p, const Coefficients& m, const ParametersOfThread& of) {
        const Math w = weight[p] = of.weight[p];
        shift_g[p] = m.shift_g;
        shift_u[p] = m.shift_u;
        q[p] = of.ddweight[p] - w * m.a;
        of_v[p] = w * m.c;
        of_x[p] = w * (m.a * m.c - m.s) - q[p] * m.c;
        offset_ddy[p] = of.ddbias[p] - w * m.v - q[p] * m.x;
        offset_dx[p] = of_v[p] * m.v - q[p] * m.g - of_x[p] * m.x;
    }
};

template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition>
__device__ inline void write_both(const Partition& partition, const Tensor& ddy, const Tensor& dx,
                                  const InputTiles<RESIDENCY, THREADS, VECS_PER_THREAD>& tile, int vecs_per_thread,
                                  bool with_ddx, const Stats& stat, const DoubleGradient& d) {
    Storage *to_ddy = partition.origin(ddy), *to_dx = partition.origin(dx);
    Storage first, second;
    const auto both = [&](int v, Math x, Math g, Math u) {
        const int p = plane_of(v);
        const Math xhat = stat.xhat(p, x), v_ = (u - d.shift_u[p]) * stat.rstd[p];
        first = narrow(d.weight[p] * v_ + (d.q[p] * xhat + d.offset_ddy[p]));
        second = narrow((d.q[p] * (g - d.shift_g[p]) + (d.of_x[p] * xhat - d.of_v[p] * v_) + d.offset_dx[p])
                        * stat.rstd[p]);
    };
    with_constant(with_ddx, [&](bool more) {
        tile.x.each(vecs_per_thread, [&](int k) {
            if (!partition.holds(k)) return;
            Vec a, b;
            tile.vec(k, more, [&](int v, Math x, Math g, Math u) {
                both(v, x, g, u);
                a.v[v] = first;
                b.v[v] = second;
            });
            partition.put(ddy, to_ddy, k, a);
            partition.put(dx, to_dx, k, b);
        });
        if (Partition::has_tails && partition.tail >= 0) {
            tile.at_tail(more, both);
            store(to_ddy + partition.tail, first);
            store(to_dx + partition.tail, second);
        }
    });
}

#endif
