// Planes: who owns one, and which of its elements each thread holds.
//
// An owner is a group of threads. It serves one stripe: the planes that lie interleaved in memory, over one tile.
//
//     PART              2^k threads of a warp    a plane, out of a chunk of planes that the warp has staged (chunk.cuh)
//     WARP, BLOCK       its threads              a stripe; in the split regime (split.cu) one tile of it
//     CLUSTER, GRID     a block                  one tile of a stripe; the blocks of its group have the others (group.cuh)
//
//   channels-first: a stripe is one plane. It is dealt out in packs at aligned addresses, whatever the alignment of the
//   plane: thread r of G holds packs r, r + G, r + 2G, ... of those that lie in it whole. What is left over at its two
//   ends, fewer than 2 V elements, goes to the first 2 V threads, one each: the edge.
//
//         | pack 0  | pack 1  | pack 2  | pack 3
//           . . p p   p p p p   p p p p   p . . .        lo = 2, hi = 13: two edge elements before, one behind
//
//   That is the alignment of what is written. Arrays that are read may lie otherwise, if the module is SKEWED: a pack of
//   theirs is put together from the two that it lies in. With 0 lanes packs begin where planes do, wherever these are:
//   the order of additions is then the same for every plane, and results are stored one by one where they must be.
//
//   channels-last: a stripe is `lanes` packs of V neighbouring channels. Row s of the tile is one spatial position:
//   thread r holds lane r % lanes of rows r / lanes, r / lanes + G / lanes, ...: each thread sees V planes. No edges.
//
// P is the number of planes one thread sees, and plane_of(v) the one that element v of a pack belongs to.

enum { PART, WARP, BLOCK, CLUSTER, GRID };  // owners
enum { REGISTERS, SHARED };         // where a tile rests between passes

constexpr int P = CHANNELS_LAST ? V : 1;
__device__ constexpr int plane_of(int v) { return CHANNELS_LAST ? v : 0; }

// Sums that a thread keeps of a quantity, and the one that element v of a pack goes to: of one plane at most four, which
// is enough for additions not to wait for each other.
constexpr int LINES = CHANNELS_LAST || V < 4 ? V : 4;
__device__ constexpr int line_of(int v) { return v % LINES; }

#if SKEWED
// The pack that begins `skew` elements into two that lie side by side. Indices are constants, so that all of it stays in
// registers: words move by the powers of two in the distance.
__device__ inline Pack skewed(const Pack& a, const Pack& b, int skew) {
    unsigned w[8];
    memcpy(w, &a, 16);
    memcpy(w + 4, &b, 16);
    const int bytes = skew * (int)sizeof(Storage);
    #pragma unroll
    for (int step = 2; step > 0; step /= 2) {
        #pragma unroll
        for (int i = 0; i + step < 8; i++) w[i] = bytes & 4 * step ? w[i + step] : w[i];
    }
    if (sizeof(Storage) == 2) {
        #pragma unroll
        for (int i = 0; i < 4; i++) w[i] = bytes & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
    }
    Pack pack;
    memcpy(&pack, w, 16);
    return pack;
}
#endif

// Quotient and rest of numbers that are not negative. 64-bit division is slow, and nearly never needed.
__device__ inline void divide(long long a, long long b, long long& quotient, long long& rest) {
    if ((a | b) >> 32 == 0) {
        quotient = (unsigned)a / (unsigned)b;
        rest = (unsigned)a % (unsigned)b;
    } else { quotient = a / b; rest = a % b; }
}

template <int OWNER, int THREADS>
struct Share {
    static constexpr int most = OWNER == PART || OWNER == WARP ? 32 : THREADS;
    static constexpr bool edges = !CHANNELS_LAST && V > 1;
    const int size;                 // threads of the owner
    long long n, c;                 // sample and first channel of this thread's planes
    int tile;                       // of the stripe
    long long start;                // spatial position of the tile's origin; below 0 where the plane starts unaligned
    int rank, lanes;                // this thread in its owner; packs side by side in a row (1 when channels-first)
    int lo, hi;                     // spatial positions in the tile that exist for this thread
    int first, last;                // of those, the packs (channels-last: the rows) that are whole
    int edge;                       // the one position this thread holds besides its packs, or -1

    // The share of this thread when its owner is number `owner`, and each stripe has `tiles` tiles of `chunks` packs a
    // thread. `x` is the array that packs are aligned to. `lanes` is the number of threads of an owner that is part of a
    // warp.
    __device__ Share(long long owner, long long tiles, int chunks, int lanes, const Tensor& x, long long channels,
                     long long spatial)
        : size(OWNER == PART ? lanes : most), rank(threadIdx.x % size), lanes(CHANNELS_LAST ? lanes : 1) {
        long long stripe = owner, group, number = 0;
        if (tiles > 1) divide(owner, tiles, stripe, number);
        tile = (int)number;
        const long long groups = CHANNELS_LAST ? (channels + lanes * V - 1) / (lanes * V) : channels;
        divide(stripe, groups, n, group);
        edge = -1;
        if (CHANNELS_LAST) {
            c = (group * lanes + rank % lanes) * V;
            const int rows = chunks * (size / lanes);
            start = (long long)tile * rows;
            first = lo = 0;
            last = hi = c < channels ? limit(spatial - start, rows) : 0;
        } else {
            c = OWNER == PART && spatial == 0 ? channels : group;   // a plane that does not exist
            const unsigned long long address = (unsigned long long)(x.data + n * x.n + c * x.c);
            const int shift = SKEWED && lanes == 0 ? 0 : (int)(address / sizeof(Storage) % V);
            const int elements = chunks * size * V;
            start = (long long)tile * elements - shift;
            lo = tile == 0 ? shift : 0;
            hi = limit(spatial - start, elements);
            first = (lo + V - 1) / V;
            last = hi / V;
            if (edges && rank < V) edge = rank >= lo && rank < first * V && rank < hi ? rank : -1;
            else if (edges && rank < 2 * V && last >= first) {
                const int position = last * V + rank - V;
                edge = position < hi ? position : -1;
            }
        }
    }

    __device__ static int limit(long long left, int most) { return left < most ? (left > 0 ? (int)left : 0) : most; }

    static __device__ long long owner_in_grid() {
        return (blockIdx.x + (long long)gridDim.x * blockIdx.y) * (THREADS / most) + threadIdx.x / most;
    }

    // Elements of one plane in this tile.
    __device__ int count() const { return hi > lo ? hi - lo : 0; }

    // The tile's origin in an array: never dereferenced outside [lo, hi).
    __device__ Storage* origin(const Tensor& t) const {
        return t.data + n * t.n + c * t.c + (CHANNELS_LAST ? start * t.s : start);
    }

    // Number of pack k of this thread in the tile (channels-last: its row), whether it is there, and where.
    __device__ int number(int k) const { return CHANNELS_LAST ? k * (size / lanes) + rank / lanes : k * size + rank; }
    __device__ bool holds(int k) const { return number(k) >= first && number(k) < last; }
    __device__ Pack* at(const Tensor& t, Storage* origin, int k) const {
        return (Pack*)(origin + (CHANNELS_LAST ? number(k) * t.s : (long long)number(k) * V));
    }

    // Pack k of an array: in global memory, or of what is staged of it.
    __device__ Pack get(const Tensor& t, Storage* origin, int k) const {
        const Pack* p = at(t, origin, k);
        if (OWNER == PART) return in_shared(p);
#if SKEWED
        const int skew = (int)((unsigned long long)p / sizeof(Storage) % V), position = number(k) * V - skew;
        if (skew != 0) {
            Storage* border = (Storage*)p - skew;
            if (position >= lo && position + 2 * V <= hi) {
                return skewed(load((Pack*)border), load((Pack*)border + 1), skew);
            }
            Pack pack;
            #pragma unroll
            for (int v = 0; v < V; v++) pack.v[v] = load((const Storage*)p + v);
            return pack;
        }
#endif
        return load(p);
    }
    __device__ void put(const Tensor& t, Storage* origin, int k, const Pack& pack) const {
        Pack* p = at(t, origin, k);
        if (OWNER == PART) {
            in_shared(p) = pack;
            return;
        }
#if SKEWED
        if ((unsigned long long)p % sizeof(Pack) != 0) {
            #pragma unroll
            for (int v = 0; v < V; v++) store((Storage*)p + v, pack.v[v]);
            return;
        }
#endif
        store(p, pack);
    }

    // Whether this thread's planes do: all P or none, as packs of channels divide them.
    __device__ bool exists(long long channels) const { return c < channels; }

    // f(p, i) for each plane that this thread answers for: plane p of its P, number i = n * C + c. One thread a plane.
    template <class F> __device__ void each_plane(long long channels, F f) const {
        if (rank >= lanes || !exists(channels)) return;
        #pragma unroll
        for (int p = 0; p < P; p++) f(p, n * channels + c + p);
    }
};

// What one thread holds of an array between passes: packs in its registers or in its own slots of shared memory (slots
// of neighbouring threads are neighbours, so there are no bank conflicts, and no thread reads another's: no barrier is
// needed), and its edge element.
template <int REST, int THREADS, int CHUNKS> struct Packs;

#if !defined(READ_AHEAD)
#define READ_AHEAD (EPILOGUE || SKEWED ? 2 : 4)     // these need registers for other things
#endif

template <int THREADS, int CHUNKS> struct Packs<REGISTERS, THREADS, CHUNKS> {
    static constexpr int batch = CHUNKS;    // packs read before the first is used
    Pack pack[CHUNKS];
    __device__ Packs(Pack*) {}
    __device__ Pack get(int k) const { return pack[k]; }
    __device__ void set(int k, const Pack& p) { pack[k] = p; }
    template <class F> static __device__ void each(int, F f) {
        #pragma unroll
        for (int k = 0; k < CHUNKS; k++) f(k);
    }
};

template <int THREADS, int CHUNKS> struct Packs<SHARED, THREADS, CHUNKS> {
    static constexpr int batch = READ_AHEAD;
    Pack* slot;
    __device__ Packs(Pack* shared) : slot(shared + threadIdx.x) {}
    __device__ Pack get(int k) const { return slot[k * THREADS]; }
    __device__ void set(int k, const Pack& p) { slot[k * THREADS] = p; }
    template <class F> static __device__ void each(int chunks, F f) {
        #pragma unroll READ_AHEAD < 2 && sizeof(Math) == 8 ? 1 : 2
        for (int k = 0; k < chunks; k++) f(k);
    }
};

template <int REST, int THREADS, int CHUNKS>
struct Rest : Packs<REST, THREADS, CHUNKS> {
    Storage edge;

    __device__ Rest(Pack* shared = 0) : Packs<REST, THREADS, CHUNKS>(shared), edge() {}

    // Read packs [from, from + batch) of a tile, all of them before the first is used; with the first batch, the edge.
    template <class Share> __device__ void read(const Share& share, const Tensor& t, int from) {
        Storage* origin = share.origin(t);
        Pack pack[Rest::batch];
        #pragma unroll
        for (int i = 0; i < Rest::batch; i++) {
            if (share.holds(from + i)) pack[i] = share.get(t, origin, from + i);
        }
        if (Share::edges && from == 0 && share.edge >= 0) edge = load(origin + share.edge);
        #pragma unroll
        for (int i = 0; i < Rest::batch; i++) if (share.holds(from + i)) this->set(from + i, pack[i]);
    }
};

// y = f(p, x, residual) for every element a thread holds of its tile, in plane p of the thread's P; the residual is 0
// where there is none.
template <int REST, int THREADS, int CHUNKS, class Share, class F>
__device__ inline void write_tile(const Share& share, const Tensor& y, const Rest<REST, THREADS, CHUNKS>& x, int chunks,
                                  const Tensor& residual, F f) {
    Storage* origin = share.origin(y);
    const bool more = EPILOGUE && residual.data;
    // From y's, in elements: one register less than two origins.
    const long long other = more ? share.origin(residual) - origin : 0;
    x.each(chunks, [&](int k) {
        if (!share.holds(k)) return;
        Pack pack = x.get(k), r = {};
        if (more) r = share.get(residual, origin + other, k);
        #pragma unroll
        for (int v = 0; v < V; v++) pack.v[v] = narrow(f(plane_of(v), widen(pack.v[v]), more ? widen(r.v[v]) : 0));
        share.put(y, origin, k, pack);
    });
    if (Share::edges && share.edge >= 0) {
        const Math r = more ? widen(load(origin + other + share.edge)) : 0;
        store(origin + share.edge, narrow(f(0, widen(x.edge), r)));
    }
}

// The same with two arrays: dx = f(p, x, dy).
template <int REST, int THREADS, int CHUNKS, class Share, class F>
__device__ inline void write_tile(const Share& share, const Tensor& dx, const Rest<REST, THREADS, CHUNKS>& x,
                                  const Rest<REST, THREADS, CHUNKS>& dy, int chunks, F f) {
    Storage* origin = share.origin(dx);
    x.each(chunks, [&](int k) {
        if (!share.holds(k)) return;
        const Pack a = x.get(k), b = dy.get(k);
        Pack out;
        #pragma unroll
        for (int v = 0; v < V; v++) out.v[v] = narrow(f(plane_of(v), widen(a.v[v]), widen(b.v[v])));
        share.put(dx, origin, k, out);
    });
    if (Share::edges && share.edge >= 0) store(origin + share.edge, narrow(f(0, widen(x.edge), widen(dy.edge))));
}
