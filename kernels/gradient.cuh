// Backward of a plane: two sums over each of its tiles, and dx from these sums.
//
//     dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat) * slope),   xhat = ((x - mean) - mean_lo) * rstd
//
// slope is rstd_slope of scale.cuh, usually 1.

#ifndef CUPYNORM_GRADIENT
#define CUPYNORM_GRADIENT

#include "affine.cuh"
#include "epilogue.cuh"
#include "merge.cuh"
#include "scale.cuh"
#include "tile.cuh"
#include "unit.cuh"

// The saved (or running) statistics of a thread's planes, each in its plane's unit (unit.cuh), and the affine
// parameters.
struct AffineStats {
    Math unit[P], mean[P], mean_lo[P], rstd[P];
    AffineOfThread affine;

    // Running statistics have no mean_lo_, which is null; their unit is 1.
    template <class Partition>
    __device__ AffineStats(const Partition& partition, const Math* mean_, const Math* mean_lo_, const Math* rstd_,
                           const Affine& affine_, long long channels)
        : affine(partition, affine_, channels) {
        const bool exists = partition.exists(channels);
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long i = partition.n * channels + partition.c + p;
            const Math m = exists ? load(mean_ + i) : 0, r = exists ? load(rstd_ + i) : 0;
            const Unit u = mean_lo_ ? unit_of(m, r) : Unit{1, r};
            unit[p] = u.unit;
            rstd[p] = u.rstd;
            mean[p] = m * unit[p];
            mean_lo[p] = mean_lo_ && exists ? load(mean_lo_ + i) * unit[p] : 0;
        }
    }

    __device__ Math centred(int p, Math x) const { return x * unit[p] - mean[p]; }
};

// Replace dy by the gradient g = dy * activation'(z) in the batch of vecs that begins with `from`, and with the first
// batch in the tail element. Call f(v, x, g) for each element, with g before it is rounded to Storage. If there is
// a dresidual, write g to it, too.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition, class F>
__device__ inline void apply_epilogue(const Partition& partition, const Epilogue& epilogue, const Tensor& dresidual,
                                      const Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& x,
                                      Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& dy, int from,
                                      const AffineStats& stat, F f,
                                      const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD>& mask) {
    const Math slope = (Math)epilogue.slope;
    Math scale[P], offset[P];
    #pragma unroll
    for (int p = 0; p < P; p++) {
        scale[p] = stat.rstd[p] * stat.affine.weight[p];
        offset[p] = stat.affine.bias[p] - stat.mean_lo[p] * scale[p];
    }
    const auto gradient = [&](int v, Storage x_, Storage dy_, Math r) {
        const int p = plane_of(v);
        const Math affine = stat.centred(p, widen(x_)) * scale[p] + offset[p];
        const Math g = gradient_through(affine, r, widen(dy_), slope);
        f(v, widen(x_), g);
        return narrow(g);
    };
    const bool writes = dresidual.data;
    with_constant(epilogue.residual.data, [&](bool more) {
        Storage* residual = more ? partition.origin(epilogue.residual) : 0;
        Storage* to = more ? partition.origin(dresidual) : 0;
        const auto one = [&](int k) {
            if (!partition.holds(k)) return;
            const Vec a = x.get(k);
            Vec b = dy.get(k), r = {};
            if (more) r = partition.get(epilogue.residual, residual, k);
            #pragma unroll
            for (int v = 0; v < VEC_SIZE; v++) {
                if constexpr (MASKED) {
                    if (!mask.has(k, v)) {
                        b.v[v] = Storage{};
                        continue;
                    }
                }
                b.v[v] = gradient(v, a.v[v], b.v[v], more ? widen(r.v[v]) : 0);
            }
            dy.set(k, b);
            if (more && writes) partition.put(dresidual, to, k, b);
        };
        #pragma unroll
        for (int i = 0; i < Tile<RESIDENCY, THREADS, VECS_PER_THREAD>::batch; i++) one(from + i);
        if (Partition::has_tails && from == 0 && partition.tail >= 0) {
            if (mask.has_tail()) {
                dy.tail = gradient(0, x.tail, dy.tail, more ? widen(load(residual + partition.tail)) : 0);
            } else dy.tail = Storage{};
            if (more && writes) store(to + partition.tail, dy.tail);
        }
    });
}

// Sums of a plane: sum(g) and sum(g * xhat).
enum { OF_DY, OF_DY_XHAT };
static_assert(OF_DY_XHAT + 1 == BACKWARD_SUMS && OF_DY_XHAT + 1 == BACKWARD_PARTIALS, "ops.py");

// The same of whole planes, in Accum.
struct Totals {
    Accum *dy, *dy_xhat;

    __device__ void set(long long i, Accum sum_dy, Accum sum_dy_xhat) const {
        store(dy + i, sum_dy);
        store(dy_xhat + i, sum_dy_xhat);
    }
};

// sums: of the P planes, one quantity after the other.
template <int SCOPE, int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition>
__device__ inline void gradient_sums_of_tile(const Partition& partition, const Tensor& x, const Tensor& dy,
                                             const Epilogue& epilogue, const Tensor& dresidual,
                                             Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& tile_x,
                                             Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& tile_dy, int vecs_per_thread,
                                             const AffineStats& stat, Math (&sums)[BACKWARD_SUMS * P], Math* scratch,
                                             const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD>& mask) {
    // Until the sums are complete, sum(g * (x - mean)), in the plane's unit.
    Math sum_dy[LINES] = {}, sum_dy_xmu[LINES] = {};
    const auto add_one = [&](int v, Math x_, Math g) {
        sum_dy[line_of(v)] += g;
        sum_dy_xmu[line_of(v)] += g * stat.centred(plane_of(v), x_);
    };
    const auto add = [&](int from) {        // the batch of vecs just read, and with the first the tail element
        if constexpr (EPILOGUE != 0) {
            apply_epilogue(partition, epilogue, dresidual, tile_x, tile_dy, from, stat, add_one, mask);
        } else {
            #pragma unroll
            for (int i = 0; i < Tile<RESIDENCY, THREADS, VECS_PER_THREAD>::batch; i++) {
                if (!partition.holds(from + i)) continue;
                const Vec a = tile_x.get(from + i), b = tile_dy.get(from + i);
                #pragma unroll
                for (int v = 0; v < VEC_SIZE; v++) {
                    if constexpr (MASKED) if (!mask.has(from + i, v)) continue;
                    add_one(v, widen(a.v[v]), widen(b.v[v]));
                }
            }
            if (Partition::has_tails && from == 0 && partition.tail >= 0 && mask.has_tail()) {
                add_one(0, widen(tile_x.tail), widen(tile_dy.tail));
            }
        }
    };
    for (int from = 0; from < (RESIDENCY == REGISTERS ? 1 : vecs_per_thread); from += tile_x.batch) {
        tile_x.read(partition, x, from);
        tile_dy.read(partition, dy, from);
        add(from);
    }
    fold(sum_dy, sums + OF_DY * P);
    fold(sum_dy_xmu, sums + OF_DY_XHAT * P);
    sum_over_scope<SCOPE, THREADS>(sums, partition.size, partition.channel_vecs, scratch);
    #pragma unroll
    for (int p = 0; p < P; p++) {
        Math& sum = sums[OF_DY_XHAT * P + p];
        sum = (sum - stat.mean_lo[p] * sums[OF_DY * P + p]) * stat.rstd[p];
    }
}

// Add up the sums of a channel tile's tiles.
template <int THREADS, class Partition, class Exchange>
__device__ inline void merge_gradient_sums_of_tiles(const Partition& partition, Math (&sums)[BACKWARD_SUMS * P],
                                                    int tiles, Exchange& exchange, Accum* scratch) {
    const TileNumbers<BACKWARD_PARTIALS, Partition, Exchange> numbers(partition, exchange, [&](int p, int i) {
        return sums[i * P + p];
    });
    Accum s[BACKWARD_MERGED * P] = {};
    numbers.template sum<THREADS>(tiles, s, scratch, [&](int tile) {
        #pragma unroll
        for (int k = 0; k < BACKWARD_SUMS * P; k++) s[k] += numbers.read(tile, k % P, k / P);
    });
    exchange.release();
    #pragma unroll
    for (int k = 0; k < BACKWARD_SUMS * P; k++) sums[k] = (Math)s[k];
}

// The positions of a thread's plane p that count.
template <class Partition>
__device__ inline Math count_of_plane(const Partition& partition, int p, const long long* count, long long channels,
                                      long long spatial) {
    if (!MASKED) return (Math)spatial;
    return partition.exists(channels) ? (Math)load(count + partition.n * channels + partition.c + p) : 1;
}

// dx as scale * ((g - level) - (x - mean) * slope).
struct Gradient {
    Math level[P], slope[P], scale[P];

    // The means of g and of g * xhat over the plane.
    __device__ void set(int p, Math mean_dy, Math mean_dy_xhat, const AffineStats& stat) {
        slope[p] = mean_dy_xhat * stat.rstd[p];
        level[p] = mean_dy - stat.mean_lo[p] * slope[p];
        scale[p] = stat.affine.weight[p] * stat.rstd[p];
    }

    __device__ Math dx(int p, Math x, Math dy, const AffineStats& stat) const {
        return ((dy - level[p]) - stat.centred(p, x) * slope[p]) * scale[p] * stat.unit[p];
    }
};

#endif
