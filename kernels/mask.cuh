// Masks: which positions of a plane count. Modules that are not MASKED have none: everything counts, without a test.
//
// A mask has a byte for each element, 0 where it does not count, and strides of 0 where it is the same for several samples,
// channels or positions. It is read as often as x: its bits stay where the tile does, a byte of bits for each vec in
// shared memory.

#ifndef CUPYNORM_MASK
#define CUPYNORM_MASK

#include "partition.cuh"

typedef TensorOf<uint8> Mask;

// The bits of a tile's vecs: bit v of vec k.
template <int RESIDENCY, int THREADS, int VECS_PER_THREAD> struct MaskBits;

template <int THREADS, int VECS_PER_THREAD> struct MaskBits<REGISTERS, THREADS, VECS_PER_THREAD> {
    unsigned words[(VECS_PER_THREAD * VEC_SIZE + 31) / 32];
    __device__ MaskBits(unsigned char*) : words() {}
    static __device__ constexpr int place(int k, int v) { return k * VEC_SIZE + v; }
    __device__ void set(int k, unsigned vec) { words[place(k, 0) / 32] |= vec << place(k, 0) % 32; }
    __device__ bool get(int k, int v) const { return words[place(k, v) / 32] >> place(k, v) % 32 & 1; }
};

template <int THREADS, int VECS_PER_THREAD> struct MaskBits<SHARED, THREADS, VECS_PER_THREAD> {
    unsigned char* slot;            // as in TileVecs
    __device__ MaskBits(unsigned char* shared) : slot(shared + threadIdx.x) {}
    __device__ void set(int k, unsigned vec) { slot[k * THREADS] = (unsigned char)vec; }
    __device__ bool get(int k, int v) const { return slot[k * THREADS] >> v & 1; }
};

template <int RESIDENCY, int THREADS, int VECS_PER_THREAD, bool = MASKED> struct MaskOfTile {
    __device__ MaskOfTile() {}
    template <class Partition> __device__ MaskOfTile(const Partition&, const Mask&, int = 0, unsigned char* = 0) {}
    __device__ bool has(int, int) const { return true; }
    __device__ bool has_tail() const { return true; }
};

template <int RESIDENCY, int THREADS, int VECS_PER_THREAD> struct MaskOfTile<RESIDENCY, THREADS, VECS_PER_THREAD, true> {
    MaskBits<RESIDENCY, THREADS, VECS_PER_THREAD> bits;
    bool tail;

    // Of as many vecs as the thread has registers for, or of vecs_per_thread, which stay in shared memory: THREADS bytes
    // for each.
    template <class Partition>
    __device__ MaskOfTile(const Partition& partition, const Mask& mask, int vecs_per_thread = VECS_PER_THREAD,
                          unsigned char* shared = 0) : bits(shared), tail(false) {
        static_assert(VEC_SIZE <= 8, "the bits of a vec are a byte");
        const uint8* origin = mask.data + partition.n * mask.n + partition.c * mask.c + partition.start * mask.s;
        const long long step = CHANNELS_LAST ? mask.c : mask.s;      // between the elements of a vec
        const auto read = [&](int k) {
            if (!partition.holds(k)) return;
            const uint8* p = origin + (long long)partition.number(k) * (CHANNELS_LAST ? 1 : VEC_SIZE) * mask.s;
            VecOf<uint8> vec;
            if (step == 1 && (unsigned long long)p % sizeof(vec) == 0) vec = load((const VecOf<uint8>*)p);
            else {
                #pragma unroll
                for (int v = 0; v < VEC_SIZE; v++) vec.v[v] = load(p + v * step);
            }
            unsigned found = 0;
            #pragma unroll
            for (int v = 0; v < VEC_SIZE; v++) found |= (unsigned)(vec.v[v] != 0) << v;
            bits.set(k, found);
        };
        if constexpr (RESIDENCY == REGISTERS) {
            #pragma unroll
            for (int k = 0; k < VECS_PER_THREAD; k++) read(k);
        } else {
            for (int k = 0; k < vecs_per_thread; k++) read(k);
        }
        if (Partition::has_tails && partition.tail >= 0) tail = load(origin + partition.tail * mask.s) != 0;
    }
    __device__ bool has(int k, int v) const { return bits.get(k, v); }
    __device__ bool has_tail() const { return tail; }
};

// Bytes of shared memory for the bits of a tile.
template <int RESIDENCY, int THREADS> __device__ inline int mask_bytes(int vecs_per_thread) {
    return MASKED && RESIDENCY == SHARED ? vecs_per_thread * THREADS : 0;
}

// The value of a thread's tail element, 0 if it does not count.
template <class MaskOfTile> __device__ inline Storage only_in_mask(const MaskOfTile& mask, Storage value) {
    if constexpr (MASKED) if (!mask.has_tail()) return Storage{};
    return value;
}

// How many positions of each of a thread's planes count: in a tile, or in all.
template <bool = MASKED> struct Counts {
    int all;
    __device__ Counts(int positions) : all(positions) {}
    __device__ void set(int, int positions) { all = positions; }
    __device__ int positions(int) const { return all; }
    __device__ Math operator[](int) const { return (Math)all; }
    __device__ Math least(int) const { return (Math)all; }
};
template <> struct Counts<true> {
    int of[P];
    __device__ Counts(int) {}
    __device__ void set(int p, int positions) { of[p] = positions; }
    __device__ int positions(int p) const { return of[p]; }
    __device__ Math operator[](int p) const { return (Math)of[p]; }
    __device__ Math least(int p) const { return of[p] > 1 ? (Math)of[p] : 1; }  // to divide by: of none, sums are 0
};

#endif
