// Tiles: the part of an array that one thread holds between passes.

#ifndef CUPYNORM_TILE
#define CUPYNORM_TILE

#include "mask.cuh"

// Vecs in the thread's registers or in its own slots of shared memory. Slots of neighbouring threads are adjacent, so
// there are no bank conflicts, and no thread reads another's slots, so no barrier is needed.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class T> struct TileVecs;

template <int THREADS, int VECS_PER_THREAD, class T> struct TileVecs<REGISTERS, THREADS, VECS_PER_THREAD, T> {
    static constexpr int batch = VECS_PER_THREAD;    // vecs read before the first is used
    VecOf<T> vec[VECS_PER_THREAD];
    __device__ TileVecs(VecOf<T>*) {}
    __device__ VecOf<T> get(int k) const { return vec[k]; }
    __device__ void set(int k, const VecOf<T>& p) { vec[k] = p; }
    template <class F> static __device__ void each(int, F f) {
        #pragma unroll
        for (int k = 0; k < VECS_PER_THREAD; k++) f(k);
    }
};

template <int THREADS, int VECS_PER_THREAD, class T> struct TileVecs<SHARED, THREADS, VECS_PER_THREAD, T> {
    static constexpr int batch = READ_AHEAD;         // of the module (cupynorm/cuda/source.py)
    VecOf<T>* slot;
    __device__ TileVecs(VecOf<T>* shared) : slot(shared + threadIdx.x) {}
    __device__ VecOf<T> get(int k) const { return slot[k * THREADS]; }
    __device__ void set(int k, const VecOf<T>& p) { slot[k * THREADS] = p; }
    template <class F> static __device__ void each(int vecs_per_thread, F f) {
        #pragma unroll READ_AHEAD < 2 && sizeof(Math) == 8 ? 1 : 2
        for (int k = 0; k < vecs_per_thread; k++) f(k);
    }
};

template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class T = Storage>
struct Tile : TileVecs<RESIDENCY, THREADS, VECS_PER_THREAD, T> {
    T tail;

    __device__ Tile(VecOf<T>* shared = 0) : TileVecs<RESIDENCY, THREADS, VECS_PER_THREAD, T>(shared), tail() {}

    // Read vecs [from, from + batch) of a tile, all of them before the first is used, and with the first batch the tail
    // element.
    template <class Partition> __device__ void read(const Partition& partition, const TensorOf<T>& t, int from) {
        T* origin = partition.origin(t);
        VecOf<T> vec[Tile::batch];
        #pragma unroll
        for (int i = 0; i < Tile::batch; i++) {
            if (partition.holds(from + i)) vec[i] = partition.get(t, origin, from + i);
        }
        if (Partition::has_tails && from == 0 && partition.tail >= 0) tail = load(origin + partition.tail);
        #pragma unroll
        for (int i = 0; i < Tile::batch; i++) if (partition.holds(from + i)) this->set(from + i, vec[i]);
    }
};

// Write y = f(p, x, residual) for every element that a thread holds of its tile, in plane p of the thread's P. The
// residual is 0 if there is none. Where the mask is 0, y is.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class T, class Partition, class F>
__device__ inline void write_tile(const Partition& partition, const Tensor& y,
                                  const Tile<RESIDENCY, THREADS, VECS_PER_THREAD, T>& x, int vecs_per_thread,
                                  const Tensor& residual, F f,
                                  const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD>& mask = {}) {
    Storage* origin = partition.origin(y);
    with_constant(EPILOGUE && residual.data, [&](bool more) {
        // The residual's distance from y's origin, in elements: takes one register less than two origins.
        const long long other = more ? partition.origin(residual) - origin : 0;
        x.each(vecs_per_thread, [&](int k) {
            if (!partition.holds(k)) return;
            const VecOf<T> vec = x.get(k);
            Vec out, r = {};
            if (more) r = partition.get(residual, origin + other, k);
            #pragma unroll
            for (int v = 0; v < VEC_SIZE; v++) {
                out.v[v] = narrow(f(plane_of(v), widen(vec.v[v]), more ? widen(r.v[v]) : 0));
                if constexpr (MASKED) if (!mask.has(k, v)) out.v[v] = Storage{};
            }
            partition.put(y, origin, k, out);
        });
        if (Partition::has_tails && partition.tail >= 0) {
            const Math r = more ? widen(load(origin + other + partition.tail)) : 0;
            store(origin + partition.tail, only_in_mask(mask, narrow(f(0, widen(x.tail), r))));
        }
    });
}

// The same for two arrays: dx = f(p, x, dy).
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition, class F>
__device__ inline void write_tile(const Partition& partition, const Tensor& dx,
                                  const Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& x,
                                  const Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& dy, int vecs_per_thread, F f,
                                  const MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD>& mask = {}) {
    Storage* origin = partition.origin(dx);
    x.each(vecs_per_thread, [&](int k) {
        if (!partition.holds(k)) return;
        const Vec a = x.get(k), b = dy.get(k);
        Vec out;
        #pragma unroll
        for (int v = 0; v < VEC_SIZE; v++) {
            out.v[v] = narrow(f(plane_of(v), widen(a.v[v]), widen(b.v[v])));
            if constexpr (MASKED) if (!mask.has(k, v)) out.v[v] = Storage{};
        }
        partition.put(dx, origin, k, out);
    });
    if (Partition::has_tails && partition.tail >= 0) {
        store(origin + partition.tail, only_in_mask(mask, narrow(f(0, widen(x.tail), widen(dy.tail)))));
    }
}

#endif
