// The emulator, with which the CUDA sources compile and run as C++.
//
// Everything runs on one OS thread, and each CUDA thread on its own fiber. A fiber runs until it meets the others at a
// barrier or a shuffle; the order in which fibers run is under test. Between two meetings one warp runs as far as it
// can before the next starts, so that a missing barrier shows. Blocks run one after the other, except the blocks of a
// cluster or of a cooperative grid, which may wait for each other: they run together. Of these too, one runs as far as
// it can before the next; but a thread that has done something that others may wait for stops there, and the first
// block that can continue runs. The emulator checks:
//   global memory   every access lies in an array that the launch was given, is aligned, and is counted
//   shared memory   poisoned with NaN before each block; nothing is written after its end
//   barriers        all threads of a block (of a warp, of a cluster) meet at the same one
//   waiting         some thread can always continue; otherwise the launch fails and names a line at which one waits
//   peers           a block's shared memory is accessed only while the block runs
//   denormals       are flushed (on x86), as by a GPU with CuPy's compiler options, except in float64 modules
//   arguments       have the number, sizes and kinds of the kernel's parameters
//
// The machine (machine.cpp) and kernels (simt.h) both need this header. emulator.py compiles it and the machine once.

#include <cstdarg>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include <utility>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

struct Index3 { unsigned x, y, z; };
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum Order { FORWARD, REVERSE, SHUFFLED };

struct Range { uintptr_t low, high; uint64_t read, written, accesses; };

struct Launch {
    unsigned grid_x, grid_y, threads, shared;
    unsigned cluster, cooperative;  // blocks per cluster, along x; whether all blocks of the grid run together
    int order;
    unsigned seed;
    Range* ranges;                  // memory that may be accessed; the accesses are counted in it
    int range_count;
    void** args;
    const int* sizes;
    const unsigned char* kinds;
    int arg_count;
    char error[256];
    char* stacks;                   // of the fibers, STACK bytes each, one after the other
    size_t stacks_size;
};

enum State { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_COUNTER, DONE };

struct Fiber {
    jmp_buf context;
    bool started;
    State state;
    int site;                       // source line at which it waits
    bool arrived;                   // at the cluster's barrier, in round `round`, without having waited there yet
    unsigned round;
    const unsigned* counter;        // AT_COUNTER: waits until the counter is at least `target`
    unsigned target;
    bool votes[2];                  // of __syncthreads_or, in even and odd meetings of the block
};

// The barrier of a cluster: a round is over when all threads have arrived.
struct Cluster { unsigned round, arrived; int site; };

struct Block {
    Index3 index;
    unsigned rank;                  // in its cluster
    Cluster* cluster;
    Fiber* fibers;
    bool begun;
    unsigned running;               // threads that have not ended
    std::unique_ptr<unsigned char[]> shared;
    std::vector<uint64_t> slots;    // values that lanes exchange: two generations per warp
    std::vector<unsigned> generation;
    unsigned meetings = 0;          // how often all threads have met
};

constexpr size_t STACK = 128 * 1024;

struct Machine {
    Launch* launch;
    void (*kernel)(void**);
    std::vector<Fiber> fibers;      // of all blocks that run together
    std::vector<Block> blocks;
    std::vector<Cluster> clusters;
    uint64_t random;
    jmp_buf scheduler;
    Block* block;                   // the running thread's block
    unsigned current;               // the running thread
    bool released;                  // it has done something that others may wait for
    bool failed;
};
extern Machine m;

void report(const char* format, ...);
void wait(State state, int site);
void release(int site);
void cluster_arrive(int site);
void cluster_wait(int site);
int run(Launch* launch, void (*kernel)(void**), const std::vector<std::pair<int, char>>& parameters, bool flush);

// Report from a kernel and stop it: the fibers are dropped as they are, since nothing in them needs destroying.
[[noreturn]] void fail(const char* format, ...);

// Check an access to global memory, and return the range in which it lies.
Range& check(const void* p, size_t size, size_t alignment);
// Return the offset of p in the block's shared memory.
size_t place_in_shared(const void* p, size_t size);
void wait_until(const unsigned* counter, unsigned target, int site);

inline float of_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

float widen_float16(uint16_t bits);
float widen_bfloat16(uint16_t bits);
// Round to nearest even.
uint16_t narrow_float16(float f);
uint16_t narrow_bfloat16(float f);

}  // namespace simt
