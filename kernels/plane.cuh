// Planes: the scope that serves one, and which of its elements each thread holds.
//
// A scope is a group of threads. It serves one channel tile: the planes that lie interleaved in memory, over one tile.
//
//     SUBWARP           2^k threads of a warp    a plane, out of a run of planes that the warp has staged (staging.cuh)
//     WARP, BLOCK       its threads              a channel tile; in the split regime (split.cu) one tile of it
//     CLUSTER, GRID     a block                  one tile of a channel tile; the blocks of its group have the others
//                                                (group.cuh)
//
//   channels-first: a channel tile is one plane. It is dealt out in vecs at aligned addresses, whatever the alignment
//   of the plane: thread r of G holds vecs r, r + G, r + 2G, ... of those that lie in it whole. What is left over at
//   its two ends, fewer than 2 VEC_SIZE elements, goes to the first 2 VEC_SIZE threads, one each: the tail elements.
//
//         | vec 0   | vec 1   | vec 2   | vec 3
//           . . p p   p p p p   p p p p   p . . .        lo = 2, hi = 13: two tail elements before, one behind
//
//   That is the alignment of what is written. Arrays that are read may lie otherwise, if the module is MISALIGNED: a
//   vec of theirs is put together from the two that it lies in. With subdivision 0 vecs begin where planes do, wherever
//   these are: the order of additions is then the same for every plane, and results are stored one by one where they
//   must be.
//
//   channels-last: a channel tile is W = channel_vecs vecs of VEC_SIZE neighbouring channels. Row s of the tile is one
//   spatial position: thread r holds vec r % W of rows r / W, r / W + G / W, ...: each thread sees VEC_SIZE planes. No
//   tail elements.
//
// P is the number of planes one thread sees, and plane_of(v) the one that element v of a vec belongs to.

enum { SUBWARP, WARP, BLOCK, CLUSTER, GRID };  // scopes
enum { REGISTERS, SHARED };         // residencies: where a tile stays between passes

constexpr int P = CHANNELS_LAST ? VEC_SIZE : 1;
__device__ constexpr int plane_of(int v) { return CHANNELS_LAST ? v : 0; }

// Sums that a thread keeps of a quantity, and the one that element v of a vec goes to: of one plane at most four, which
// is enough for additions not to wait for each other.
constexpr int LINES = CHANNELS_LAST || VEC_SIZE < 4 ? VEC_SIZE : 4;
__device__ constexpr int line_of(int v) { return v % LINES; }

#if MISALIGNED
// The vec that begins `offset` elements into two that lie side by side. Indices are constants, so that all of it stays
// in registers: words move by the powers of two in the distance.
__device__ inline Vec realigned(const Vec& a, const Vec& b, int offset) {
    unsigned w[8];
    memcpy(w, &a, 16);
    memcpy(w + 4, &b, 16);
    const int bytes = offset * (int)sizeof(Storage);
    #pragma unroll
    for (int step = 2; step > 0; step /= 2) {
        #pragma unroll
        for (int i = 0; i + step < 8; i++) w[i] = bytes & 4 * step ? w[i + step] : w[i];
    }
    if (sizeof(Storage) == 2) {
        #pragma unroll
        for (int i = 0; i < 4; i++) w[i] = bytes & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
    }
    Vec vec;
    memcpy(&vec, w, 16);
    return vec;
}
#endif

// Quotient and remainder of numbers that are not negative. 64-bit division is slow, and nearly never needed.
__device__ inline void divide(long long a, long long b, long long& quotient, long long& remainder) {
    if ((a | b) >> 32 == 0) {
        quotient = (unsigned)a / (unsigned)b;
        remainder = (unsigned)a % (unsigned)b;
    } else { quotient = a / b; remainder = a % b; }
}

template <int SCOPE, int THREADS>
struct Partition {
    static constexpr int most = SCOPE == SUBWARP || SCOPE == WARP ? 32 : THREADS;
    static constexpr bool has_tails = !CHANNELS_LAST && VEC_SIZE > 1;
    const int size;                 // threads of the scope
    long long n, c;                 // sample and first channel of this thread's planes
    int tile;                       // of the channel tile
    long long start;                // spatial position of the tile's origin; below 0 where the plane starts unaligned
    int rank, channel_vecs;         // this thread in its scope; vecs side by side in a row (1 when channels-first)
    int lo, hi;                     // spatial positions in the tile that exist for this thread
    int first, last;                // of those, the vecs (channels-last: the rows) that are whole
    int tail;                       // the one position this thread holds besides its vecs, or -1

    // The share of this thread when its scope is number scope_index, and each channel tile has `tiles` tiles of
    // vecs_per_thread vecs a thread. `x` is the array that vecs are aligned to. subdivision: channels-last the vecs
    // side by side in a row; of a SUBWARP its threads; else 1, or 0 where vecs begin where planes do.
    __device__ Partition(long long scope_index, long long tiles, int vecs_per_thread, int subdivision, const Tensor& x,
                         long long channels, long long spatial)
        : size(SCOPE == SUBWARP ? subdivision : most), rank(threadIdx.x % size),
          channel_vecs(CHANNELS_LAST ? subdivision : 1) {
        long long channel_tile = scope_index, group, number = 0;
        if (tiles > 1) divide(scope_index, tiles, channel_tile, number);
        tile = (int)number;
        const int width = channel_vecs * VEC_SIZE;
        const long long groups = CHANNELS_LAST ? (channels + width - 1) / width : channels;
        divide(channel_tile, groups, n, group);
        tail = -1;
        if (CHANNELS_LAST) {
            c = (group * channel_vecs + rank % channel_vecs) * VEC_SIZE;
            const int rows = vecs_per_thread * (size / channel_vecs);
            start = (long long)tile * rows;
            first = lo = 0;
            last = hi = c < channels ? limit(spatial - start, rows) : 0;
        } else {
            c = SCOPE == SUBWARP && spatial == 0 ? channels : group;   // a plane that does not exist
            const unsigned long long address = (unsigned long long)(x.data + n * x.n + c * x.c);
            const int misalignment = MISALIGNED && subdivision == 0 ? 0 : (int)(address / sizeof(Storage) % VEC_SIZE);
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
    }

    __device__ static int limit(long long left, int most) { return left < most ? (left > 0 ? (int)left : 0) : most; }

    static __device__ long long scope_in_grid() {
        return (blockIdx.x + (long long)gridDim.x * blockIdx.y) * (THREADS / most) + threadIdx.x / most;
    }

    // Elements of one plane in this tile.
    __device__ int count() const { return hi > lo ? hi - lo : 0; }

    // The tile's origin in an array: never dereferenced outside [lo, hi).
    __device__ Storage* origin(const Tensor& t) const {
        return t.data + n * t.n + c * t.c + (CHANNELS_LAST ? start * t.s : start);
    }

    // Number of vec k of this thread in the tile (channels-last: its row), whether it is there, and where.
    __device__ int number(int k) const {
        return CHANNELS_LAST ? k * (size / channel_vecs) + rank / channel_vecs : k * size + rank;
    }
    __device__ bool holds(int k) const { return number(k) >= first && number(k) < last; }
    __device__ Vec* at(const Tensor& t, Storage* origin, int k) const {
        return (Vec*)(origin + (CHANNELS_LAST ? number(k) * t.s : (long long)number(k) * VEC_SIZE));
    }

    // Vec k of an array: in global memory, or of what is staged of it.
    __device__ Vec get(const Tensor& t, Storage* origin, int k) const {
        const Vec* p = at(t, origin, k);
        if (SCOPE == SUBWARP) return in_shared(p);
#if MISALIGNED
        const int offset = (int)((unsigned long long)p / sizeof(Storage) % VEC_SIZE),
        position = number(k) * VEC_SIZE - offset;
        if (offset != 0) {
            Storage* border = (Storage*)p - offset;
            if (position >= lo && position + 2 * VEC_SIZE <= hi) {
                return realigned(load((Vec*)border), load((Vec*)border + 1), offset);
            }
            Vec vec;
            #pragma unroll
            for (int v = 0; v < VEC_SIZE; v++) vec.v[v] = load((const Storage*)p + v);
            return vec;
        }
#endif
        return load(p);
    }
    __device__ void put(const Tensor& t, Storage* origin, int k, const Vec& vec) const {
        Vec* p = at(t, origin, k);
        if (SCOPE == SUBWARP) {
            in_shared(p) = vec;
            return;
        }
#if MISALIGNED
        if ((unsigned long long)p % sizeof(Vec) != 0) {
            #pragma unroll
            for (int v = 0; v < VEC_SIZE; v++) store((Storage*)p + v, vec.v[v]);
            return;
        }
#endif
        store(p, vec);
    }

    // Whether this thread's planes do: all P or none, as vecs of channels divide them.
    __device__ bool exists(long long channels) const { return c < channels; }

    // f(p, i) for each plane that this thread answers for: plane p of its P, number i = n * C + c. One thread a plane.
    template <class F> __device__ void each_plane(long long channels, F f) const {
        if (rank >= channel_vecs || !exists(channels)) return;
        #pragma unroll
        for (int p = 0; p < P; p++) f(p, n * channels + c + p);
    }
};

// What one thread holds of an array between passes: vecs in its registers or in its own slots of shared memory (slots
// of neighbouring threads are neighbours, so there are no bank conflicts, and no thread reads another's: no barrier is
// needed), and its tail element.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD> struct TileVecs;

#if !defined(READ_AHEAD)
#define READ_AHEAD (EPILOGUE || MISALIGNED ? 2 : 4)     // these need registers for other things
#endif

template <int THREADS, int VECS_PER_THREAD> struct TileVecs<REGISTERS, THREADS, VECS_PER_THREAD> {
    static constexpr int batch = VECS_PER_THREAD;    // vecs read before the first is used
    Vec vec[VECS_PER_THREAD];
    __device__ TileVecs(Vec*) {}
    __device__ Vec get(int k) const { return vec[k]; }
    __device__ void set(int k, const Vec& p) { vec[k] = p; }
    template <class F> static __device__ void each(int, F f) {
        #pragma unroll
        for (int k = 0; k < VECS_PER_THREAD; k++) f(k);
    }
};

template <int THREADS, int VECS_PER_THREAD> struct TileVecs<SHARED, THREADS, VECS_PER_THREAD> {
    static constexpr int batch = READ_AHEAD;
    Vec* slot;
    __device__ TileVecs(Vec* shared) : slot(shared + threadIdx.x) {}
    __device__ Vec get(int k) const { return slot[k * THREADS]; }
    __device__ void set(int k, const Vec& p) { slot[k * THREADS] = p; }
    template <class F> static __device__ void each(int vecs_per_thread, F f) {
        #pragma unroll READ_AHEAD < 2 && sizeof(Math) == 8 ? 1 : 2
        for (int k = 0; k < vecs_per_thread; k++) f(k);
    }
};

template <int RESIDENCY, int THREADS, int VECS_PER_THREAD>
struct Tile : TileVecs<RESIDENCY, THREADS, VECS_PER_THREAD> {
    Storage tail;

    __device__ Tile(Vec* shared = 0) : TileVecs<RESIDENCY, THREADS, VECS_PER_THREAD>(shared), tail() {}

    // Read vecs [from, from + batch) of a tile, all of them before the first is used; with the first batch, the tail
    // element.
    template <class Partition> __device__ void read(const Partition& partition, const Tensor& t, int from) {
        Storage* origin = partition.origin(t);
        Vec vec[Tile::batch];
        #pragma unroll
        for (int i = 0; i < Tile::batch; i++) {
            if (partition.holds(from + i)) vec[i] = partition.get(t, origin, from + i);
        }
        if (Partition::has_tails && from == 0 && partition.tail >= 0) tail = load(origin + partition.tail);
        #pragma unroll
        for (int i = 0; i < Tile::batch; i++) if (partition.holds(from + i)) this->set(from + i, vec[i]);
    }
};

// y = f(p, x, residual) for every element a thread holds of its tile, in plane p of the thread's P; the residual is 0
// where there is none.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition, class F>
__device__ inline void write_tile(const Partition& partition, const Tensor& y,
                                  const Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& x, int vecs_per_thread,
                                  const Tensor& residual, F f) {
    Storage* origin = partition.origin(y);
    const bool more = EPILOGUE && residual.data;
    // From y's, in elements: one register less than two origins.
    const long long other = more ? partition.origin(residual) - origin : 0;
    x.each(vecs_per_thread, [&](int k) {
        if (!partition.holds(k)) return;
        Vec vec = x.get(k), r = {};
        if (more) r = partition.get(residual, origin + other, k);
        #pragma unroll
        for (int v = 0; v < VEC_SIZE; v++) vec.v[v] = narrow(f(plane_of(v), widen(vec.v[v]), more ? widen(r.v[v]) : 0));
        partition.put(y, origin, k, vec);
    });
    if (Partition::has_tails && partition.tail >= 0) {
        const Math r = more ? widen(load(origin + other + partition.tail)) : 0;
        store(origin + partition.tail, narrow(f(0, widen(x.tail), r)));
    }
}

// The same with two arrays: dx = f(p, x, dy).
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, class Partition, class F>
__device__ inline void write_tile(const Partition& partition, const Tensor& dx,
                                  const Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& x,
                                  const Tile<RESIDENCY, THREADS, VECS_PER_THREAD>& dy, int vecs_per_thread, F f) {
    Storage* origin = partition.origin(dx);
    x.each(vecs_per_thread, [&](int k) {
        if (!partition.holds(k)) return;
        const Vec a = x.get(k), b = dy.get(k);
        Vec out;
        #pragma unroll
        for (int v = 0; v < VEC_SIZE; v++) out.v[v] = narrow(f(plane_of(v), widen(a.v[v]), widen(b.v[v])));
        partition.put(dx, origin, k, out);
    });
    if (Partition::has_tails && partition.tail >= 0) {
        store(origin + partition.tail, narrow(f(0, widen(x.tail), widen(dy.tail))));
    }
}
