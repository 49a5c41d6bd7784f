// Planes: which scope serves a plane, and which of its elements each thread holds.
//
// A scope is a group of threads that serves a channel tile, whose planes are interleaved in memory, or one tile of it.
//
//     SUBWARP           2^k threads of a warp    a plane of the run of planes that the warp has staged (staging.cuh)
//     WARP, BLOCK       a warp or block          a channel tile; in the split regime (split.cu) one tile of it
//     CLUSTER, GRID     a block                  one tile of a channel tile; the other blocks of its group serve the
//                                                others (group.cuh)
//
//   channels-first: a channel tile is one plane. Its vecs begin at aligned addresses, whatever the alignment of the
//   plane: thread r of G holds vecs r, r + G, r + 2G, ..., if they lie entirely in the plane. The elements left at the
//   two ends, fewer than 2 VEC_SIZE, are the tail elements: the first 2 VEC_SIZE threads hold at most one each.
//
//         | vec 0   | vec 1   | vec 2   | vec 3
//           . . p p   p p p p   p p p p   p . . .        lo = 2, hi = 13: two tail elements before, one after
//
//   The addresses are aligned in the array that is written. If the module is MISALIGNED, arrays that are read may be
//   aligned otherwise: each of their vecs is combined from the two aligned vecs in which it lies. With subdivision 0
//   vecs begin where planes do, at any address: the order of additions is then the same for every plane, and results
//   are stored element by element where necessary.
//
//   channels-last: a channel tile is W = channel_vecs vecs of VEC_SIZE neighbouring channels. Row s of the tile is one
//   spatial position. Thread r holds vec r % W of rows r / W, r / W + G / W, ..., and so sees VEC_SIZE planes. There
//   are no tail elements.
//
// P is the number of planes that one thread sees, and plane_of(v) the plane of element v of a vec.

#ifndef CUPYNORM_PARTITION
#define CUPYNORM_PARTITION

#include "arrays.cuh"
#include "unaligned.cuh"

enum { SUBWARP, WARP, BLOCK, CLUSTER, GRID };  // scopes
enum { REGISTERS, SHARED };         // residencies: where a tile stays between passes

constexpr int P = CHANNELS_LAST ? VEC_SIZE : 1;
__device__ constexpr int plane_of(int v) { return CHANNELS_LAST ? v : 0; }

// A thread keeps LINES sums of a quantity, and adds element v of a vec to sum line_of(v). One plane has at most four of
// them, which is enough for additions not to wait for each other.
constexpr int LINES = CHANNELS_LAST || VEC_SIZE < 4 ? VEC_SIZE : 4;
__device__ constexpr int line_of(int v) { return v % LINES; }

// Quotient and remainder of nonnegative numbers. 64-bit division is slow, and rarely needed.
__device__ inline void divide(long long a, long long b, long long& quotient, long long& remainder) {
    if ((a | b) >> 32 == 0) {
        quotient = (unsigned)a / (unsigned)b;
        remainder = (unsigned)a % (unsigned)b;
    } else { quotient = a / b; remainder = a % b; }
}

constexpr int LOG2_VEC_SIZE = log2_of_constant(VEC_SIZE);

template <int SCOPE, int THREADS>
struct Partition {
    static constexpr int most = SCOPE == SUBWARP || SCOPE == WARP ? 32 : THREADS;
    static constexpr int log2_most = log2_of_constant(most);
    static constexpr bool has_tails = !CHANNELS_LAST && VEC_SIZE > 1;
    const int size;                 // threads of the scope
    long long n, c;                 // sample and first channel of this thread's planes
    int tile;                       // the tile's number in its channel tile
    long long start;                // spatial position of the tile's origin; below 0 if the plane starts unaligned
    int rank, channel_vecs;         // thread's number in its scope; vecs side by side in a row (1 if channels-first)
    int row, step;                  // vec k of this thread has the number row + k * step (channels-last: its row)
    int lo, hi;                     // spatial positions [lo, hi) of the tile exist for this thread
    int held;                       // vecs k < held of this thread are whole,
    bool cut;                       // but not vec 0, if it is cut
    int tail;                       // the position of this thread's tail element, or -1

    // The partition for this thread of scope scope_index, if each channel tile has `tiles` tiles of vecs_per_thread
    // vecs per thread. Vecs are aligned in the array `x`. subdivision: channels-last the vecs side by side in a row;
    // for a SUBWARP its number of threads; otherwise 1, or 0 if vecs begin where planes do.
    template <class T>
    __device__ Partition(long long scope_index, long long tiles, int vecs_per_thread, int subdivision,
                         const TensorOf<T>& x, long long channels, long long spatial)
        : size(SCOPE == SUBWARP ? subdivision : most), rank(threadIdx.x & (size - 1)),
          channel_vecs(CHANNELS_LAST ? subdivision : 1) {
        const int log_width = CHANNELS_LAST ? log2_of(channel_vecs) : 0;
        const int log_step = (SCOPE == SUBWARP ? log2_of(size) : log2_most) - log_width;
        row = rank >> log_width;
        step = 1 << log_step;
        int first, last;            // vecs [first, last) of the tile are whole
        long long channel_tile = scope_index, group, number = 0;
        if (tiles > 1) divide(scope_index, tiles, channel_tile, number);
        tile = (int)number;
        const int width = channel_vecs * VEC_SIZE;
        const long long groups = CHANNELS_LAST ? (channels + width - 1) >> (log_width + LOG2_VEC_SIZE) : channels;
        divide(channel_tile, groups, n, group);
        tail = -1;
        if (CHANNELS_LAST) {
            c = ((group << log_width) + (rank & (channel_vecs - 1))) * VEC_SIZE;
            const int rows = vecs_per_thread << log_step;
            start = (long long)tile * rows;
            first = lo = 0;
            last = hi = c < channels ? limit(spatial - start, rows) : 0;
        } else {
            c = SCOPE == SUBWARP && spatial == 0 ? channels : group;   // a plane that does not exist
            const unsigned long long address = (unsigned long long)(x.data + n * x.n + c * x.c);
            const int misalignment = MISALIGNED && subdivision == 0 ? 0 : (int)(address / sizeof(T) % VEC_SIZE);
            const int elements = vecs_per_thread * size * VEC_SIZE;
            start = (long long)tile * elements - misalignment;
            lo = tile == 0 ? misalignment : 0;
            hi = limit(spatial - start, elements);
            first = (lo + VEC_SIZE - 1) / VEC_SIZE;
            last = hi / VEC_SIZE;
            if (has_tails && rank < VEC_SIZE) tail = rank >= lo && rank < first * VEC_SIZE && rank < hi ? rank : -1;
            else if (has_tails && rank < 2 * VEC_SIZE && last >= first) {
                const int position = last * VEC_SIZE + rank - VEC_SIZE;
                tail = position < hi ? position : -1;
            }
        }
        cut = row < first;          // first is 0 or 1
        held = (last - row + step - 1) >> log_step;
    }

    __device__ static int limit(long long left, int most) { return left < most ? (left > 0 ? (int)left : 0) : most; }

    static __device__ long long scope_in_grid() {
        return (blockIdx.x + (long long)gridDim.x * blockIdx.y) * (THREADS / most) + threadIdx.x / most;
    }

    // Elements of one plane in this tile.
    __device__ int count() const { return hi > lo ? hi - lo : 0; }

    // The tile's origin in an array, channels-last with this thread's row: never dereferenced outside [lo, hi).
    template <class T> __device__ T* origin(const TensorOf<T>& t) const {
        return t.data + n * t.n + c * t.c + (CHANNELS_LAST ? (start + row) * t.s : start);
    }

    // Vec k of this thread: its number in the tile (channels-last: its row), whether the thread holds it, its address.
    __device__ int number(int k) const { return row + k * step; }
    __device__ bool holds(int k) const { return k < held && !(k == 0 && cut); }
    template <class T> __device__ VecOf<T>* at(const TensorOf<T>& t, T* origin, int k) const {
        if (CHANNELS_LAST) return (VecOf<T>*)((unsigned char*)origin + k * opaque(step * (t.s * (long long)sizeof(T))));
        return (VecOf<T>*)(origin + (long long)number(k) * VEC_SIZE);
    }

    // Vec k of an array, in global memory or in its staging buffer.
    template <class T> __device__ VecOf<T> get(const TensorOf<T>& t, T* origin, int k) const {
        const VecOf<T>* p = at(t, origin, k);
        if (SCOPE == SUBWARP) return in_shared(p);
        if constexpr (MISALIGNED) return load_unaligned(p, number(k) * VEC_SIZE, lo, hi);
        return load(p);
    }
    __device__ void put(const Tensor& t, Storage* origin, int k, const Vec& vec) const {
        Vec* p = at(t, origin, k);
        if (SCOPE == SUBWARP) in_shared(p) = vec;
        else if constexpr (MISALIGNED) store_unaligned(p, vec);
        else store(p, vec);
    }

    // True if this thread's channels are in range: all P or none, since VEC_SIZE divides the number of channels.
    __device__ bool exists(long long channels) const { return c < channels; }

    // Call f(p, i) in one thread for each plane, which is plane p of that thread's P and has number i = n * C + c.
    template <class F> __device__ void each_plane(long long channels, F f) const {
        if (rank >= channel_vecs || !exists(channels)) return;
        #pragma unroll
        for (int p = 0; p < P; p++) f(p, n * channels + c + p);
    }
};

#endif
