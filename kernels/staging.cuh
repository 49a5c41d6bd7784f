// Staging of planes that are far smaller than a warp can hold: several for each warp. They are adjacent in memory (the
// arrays are dense), so the warp moves them as one run of 16-byte accesses through shared memory, whatever their size:
//
//     global   . . p p p p p | p p q q | q q q r | r r r r . .      one run, 16 bytes per thread
//     shared       p p p p p   q q q q q   r r r r r                G threads per plane, one element each at a time
//
// Each array has its own buffer, in which it lies between 16-byte borders as it does in global memory.

#ifndef CUPYNORM_STAGING
#define CUPYNORM_STAGING

#include "arrays.cuh"

template <int VECS_PER_THREAD> struct Staging {
    static_assert(VECS_PER_THREAD % WIDEST == 0,
                  "a run of 32 * VECS_PER_THREAD elements has VECS_PER_THREAD / WIDEST vecs a thread, anywhere");
    long long first, plane;         // the warp's first plane, this thread's plane
    long long dense;                // elements of a plane
    int elements, buffer_size;      // elements of the run; elements of one array's buffer
    const int lane;

    __device__ Staging(int warps, int subwarp_size, long long spatial, long long planes)
        : dense(spatial), lane(threadIdx.x % 32) {
        const int log_size = log2_of(subwarp_size), most = 32 >> log_size;
        const long long warp = (blockIdx.x + (long long)gridDim.x * blockIdx.y) * warps + threadIdx.x / 32;
        first = warp * most;
        plane = first + (lane >> log_size);
        const long long left = planes - first;
        elements = (int)spatial * (left < most ? (left > 0 ? (int)left : 0) : most);
        buffer_size = (most * (int)spatial + 2 * WIDEST - 2) / WIDEST * WIDEST;
    }

    // The first of this warp's buffers.
    __device__ Storage* buffers(unsigned char* shared, int count) const {
        return (Storage*)shared + (int)(threadIdx.x / 32) * count * buffer_size;
    }
    __device__ Storage* run(const Tensor& t) const { return t.data + first * dense; }
    __device__ int misalignment(const Tensor& t) const {
        return (int)((unsigned long long)run(t) / sizeof(Storage) % WIDEST);
    }

    // This thread's plane of an array, as staged in a buffer: every sample and channel of the result is this plane.
    __device__ Tensor staged(const Tensor& t, Storage* to) const {
        return {to + (misalignment(t) + (int)(plane - first) * (int)dense), 0, 0, 1};
    }

    // Call wide(i, number) for each whole 16-byte vec of the run, and one(position) for each other element; numbers and
    // positions count from the 16-byte border before the run.
    template <class F, class G> __device__ void each(int misalignment, F wide, G one) const {
        const int begin = (misalignment + WIDEST - 1) / WIDEST, end = (misalignment + elements) / WIDEST;
        #pragma unroll
        for (int i = 0; i < VECS_PER_THREAD / WIDEST; i++) {
            const int number = lane + 32 * i;
            if (number >= begin && number < end) wide(i, number);
        }
        const int position = lane < WIDEST ? lane : (end - 1) * WIDEST + lane;
        const bool head = lane < WIDEST && lane >= misalignment && lane < begin * WIDEST;
        const bool tail = lane >= WIDEST && lane < 2 * WIDEST && end >= begin;
        if ((head || tail) && position < misalignment + elements) one(position);
    }

    __device__ void fetch(const Tensor& t, Storage* to) const {
        const int at = misalignment(t);
        Storage* border = run(t) - at;
        Wide vecs[VECS_PER_THREAD / WIDEST];
        each(at, [&](int i, int number) { vecs[i] = load((Wide*)border + number); },
             [&](int position) { in_shared(to + position) = load(border + position); });
        each(at, [&](int i, int number) { in_shared((Wide*)to + number) = vecs[i]; }, [](int) {});
    }

    __device__ void put(const Tensor& t, const Storage* from) const {
        const int at = misalignment(t);
        Storage* border = run(t) - at;
        each(at, [&](int, int number) { store((Wide*)border + number, in_shared((const Wide*)from + number)); },
             [&](int position) { store(border + position, in_shared(from + position)); });
    }
};

#endif
