// Masks: which positions of a plane count. Modules that are not MASKED have none: everything counts, without a test.
//
// A mask has a byte for each element, 0 where it does not count, and strides of 0 where it is the same for several samples, channels or
// positions. Its bits for a tile stay in registers, so it is read once in a step.

#ifndef CUPYNORM_MASK
#define CUPYNORM_MASK

#include "partition.cuh"

typedef TensorOf<uint8> Mask;

template <int VECS_PER_THREAD, bool = MASKED> struct MaskOfTile {
    __device__ MaskOfTile() {}
    template <class Partition> __device__ MaskOfTile(const Partition&, const Mask&) {}
    __device__ bool has(int, int) const { return true; }
    __device__ bool has_tail() const { return true; }
};

template <int VECS_PER_THREAD> struct MaskOfTile<VECS_PER_THREAD, true> {
    unsigned bits[(VECS_PER_THREAD * VEC_SIZE + 31) / 32];
    bool tail;

    template <class Partition>
    __device__ MaskOfTile(const Partition& partition, const Mask& mask) : bits(), tail(false) {
        const uint8* origin = mask.data + partition.n * mask.n + partition.c * mask.c + partition.start * mask.s;
        const long long step = CHANNELS_LAST ? mask.c : mask.s;      // between the elements of a vec
        #pragma unroll
        for (int k = 0; k < VECS_PER_THREAD; k++) {
            if (!partition.holds(k)) continue;
            const uint8* p = origin + (long long)partition.number(k) * (CHANNELS_LAST ? 1 : VEC_SIZE) * mask.s;
            VecOf<uint8> vec;
            if (step == 1 && (unsigned long long)p % sizeof(vec) == 0) vec = load((const VecOf<uint8>*)p);
            else {
                #pragma unroll
                for (int v = 0; v < VEC_SIZE; v++) vec.v[v] = load(p + v * step);
            }
            #pragma unroll
            for (int v = 0; v < VEC_SIZE; v++) bits[place(k, v) / 32] |= (unsigned)(vec.v[v] != 0) << place(k, v) % 32;
        }
        if (Partition::has_tails && partition.tail >= 0) tail = load(origin + partition.tail * mask.s) != 0;
    }
    static __device__ constexpr int place(int k, int v) { return k * VEC_SIZE + v; }
    __device__ bool has(int k, int v) const { return bits[place(k, v) / 32] >> place(k, v) % 32 & 1; }
    __device__ bool has_tail() const { return tail; }
};

// The value of a thread's tail element, 0 if it does not count.
template <int VECS_PER_THREAD>
__device__ inline Storage only_in_mask(const MaskOfTile<VECS_PER_THREAD>& mask, Storage value) {
    if constexpr (MASKED) if (!mask.has_tail()) return Storage{};
    return value;
}

// How many positions of each of a thread's planes count in a tile.
template <bool = MASKED> struct CountOfTile {
    const Math all;
    __device__ CountOfTile(int positions = 0) : all((Math)positions) {}
    __device__ void set(int, Math) {}
    __device__ Math operator[](int) const { return all; }
    __device__ Math divisor(int) const { return all; }
};
template <> struct CountOfTile<true> {
    Math of[P];
    __device__ CountOfTile(int = 0) {}
    __device__ void set(int p, Math count) { of[p] = count; }
    __device__ Math operator[](int p) const { return of[p]; }
    __device__ Math divisor(int p) const { return of[p] > 1 ? of[p] : 1; }      // of none, sums are 0
};

#endif
