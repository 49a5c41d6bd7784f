// The emulator: what the CUDA sources need to compile and run as C++.
//
// All runs on one OS thread, each CUDA thread on a fiber of its own. A fiber runs until it meets the others at a
// barrier or a shuffle; which fiber goes first is the order under test. Between two meetings one warp goes as far as
// it can before the next starts, so that a missing barrier shows. Blocks run one after the other, except those that
// may wait for each other, a cluster or a cooperative grid: they run together, and likewise one goes as far as it can
// before the next; but a thread that did what others may wait for stops there, and the first block that can goes on.
// Checked on the way:
//   global memory   every access lies in an array the launch was given, is aligned, and is counted
//   shared memory   poisoned with NaN before each block; nothing is written behind its end
//   barriers        all threads of a block (of a warp, of a cluster) meet at the same one
//   waiting         somebody can always go on, or the launch is refused with a line that waits
//   peers           a block's shared memory is reached only while it runs
//   denormals       are flushed (on x86), as by a GPU with what CuPy compiles; but in modules of float64
//   arguments       number, size and kind are those of the kernel's parameters
//
// What the machine (machine.cpp) and kernels (simt.h) both need. emulator.py compiles this and the machine once.

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
    unsigned cluster, cooperative;  // blocks of a cluster, along x; whether all blocks of the grid run together
    int order;
    unsigned seed;
    Range* ranges;                  // memory that may be touched; how many bytes of it were, is a result
    int range_count;
    void** args;
    const unsigned char *sizes, *kinds;
    int arg_count;
    char error[256];
    char* stacks;                   // of the fibers, STACK bytes each, one behind the other
    size_t stacks_size;
};

enum State { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_COUNTER, DONE };

struct Fiber {
    jmp_buf context;
    bool started;
    State state;
    int site;                       // source line of what it waits for
    bool arrived;                   // at the cluster's barrier, in its round `round`, and has not waited for it yet
    unsigned round;
    const unsigned* counter;        // AT_COUNTER: waits until it is at least `target`
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
    std::vector<uint64_t> slots;    // what lanes show each other: two generations a warp
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
    Block* block;                   // who runs: this block's
    unsigned current;               // thread
    bool released;                  // it did what others may wait for
    bool failed;
};
extern Machine m;

void report(const char* format, ...);
void wait(State state, int site);
void release(int site);
void cluster_arrive(int site);
void cluster_wait(int site);
int run(Launch* launch, void (*kernel)(void**), const std::vector<std::pair<int, char>>& parameters, bool flush);

// The same from a kernel, which stops here: the fibers are dropped as they are, nothing in them needs destroying.
[[noreturn]] void fail(const char* format, ...);

// Check an access to global memory; the range it lies in.
Range& check(const void* p, size_t size, size_t alignment);
// Where in the block's shared memory it lies.
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
// Rounded to nearest even.
uint16_t narrow_float16(float f);
uint16_t narrow_bfloat16(float f);

}  // namespace simt
