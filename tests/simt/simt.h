// The emulator: what the CUDA sources need to compile and run as C++.
//
// A block runs on one OS thread, each CUDA thread on a fiber of its own. A fiber runs until it meets the others at a
// barrier or a shuffle; which fiber goes first is the order under test. Between two meetings one warp goes as far as
// it can before the next starts, so that a missing barrier shows. Checked on the way:
//   global memory   every access lies in an array the launch was given, is aligned, and is counted
//   shared memory   poisoned with NaN before each block; nothing is written behind its end
//   barriers        all threads of a block (of a warp) meet at the same one, or the launch is refused as a deadlock
//   arguments       number, size and kind are those of the kernel's parameters

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define SIMT 1
#define __device__
#define __host__

struct Index3 { unsigned x, y, z; };
static Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum Order { FORWARD, REVERSE, SHUFFLED };

struct Range { uintptr_t low, high; uint64_t read, written; };

struct Launch {
    unsigned grid_x, grid_y, threads, shared;
    int order;
    unsigned seed;
    Range* ranges;                  // memory that may be touched; how many bytes of it were, is a result
    int range_count;
    void** args;
    const unsigned char *sizes, *kinds;
    int arg_count;
    char error[256];
};

enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    jmp_buf context;
    bool started;
    State state;
    int site;                       // source line of the meeting it waits at
    char* stack;
};

constexpr size_t STACK = 128 * 1024;

struct Machine {
    Launch* launch;
    void (*kernel)(void**);
    std::vector<Fiber> fibers;
    std::vector<uint64_t> slots;    // what lanes show each other: two generations a warp
    std::vector<unsigned> generation;
    unsigned char* shared;
    ucontext_t start;
    jmp_buf scheduler;
    unsigned current;
    bool failed;
};
static Machine m;

static void fail(const std::string& message) {
    if (!m.failed) snprintf(m.launch->error, sizeof m.launch->error, "%s", message.c_str());
    m.failed = true;
    _longjmp(m.scheduler, 1);       // the fibers are dropped as they are: nothing in them needs destroying
}

static void wait(State state, int site) {
    Fiber& f = m.fibers[m.current];
    f.state = state;
    f.site = site;
    if (_setjmp(f.context) == 0) _longjmp(m.scheduler, 1);
}

static void body() {
    m.kernel(m.launch->args);
    m.fibers[m.current].state = DONE;
    _longjmp(m.scheduler, 1);
}

static void resume(unsigned i) {
    Fiber& f = m.fibers[i];
    m.current = i;
    threadIdx = {i, 0, 0};
    if (_setjmp(m.scheduler) != 0) return;
    if (f.started) _longjmp(f.context, 1);
    f.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = f.stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    setcontext(&context);
}

static std::string at(const char* what, int site) { return std::string(what) + " at line " + std::to_string(site); }

// Run one warp until all its lanes wait for the block or are done; or, for `steps` meetings at most.
static bool run_warp(unsigned warp, std::mt19937& random, int steps) {
    const unsigned first = warp * 32, count = std::min(32u, m.launch->threads - first);
    bool progress = false;
    while (steps-- != 0) {
        unsigned lanes[32], ready = 0;
        for (unsigned l = 0; l < count; l++) if (m.fibers[first + l].state == READY) lanes[ready++] = first + l;
        if (ready == 0) break;
        if (m.launch->order == REVERSE) for (unsigned l = 0; l < ready / 2; l++) std::swap(lanes[l], lanes[ready - 1 - l]);
        if (m.launch->order == SHUFFLED) for (unsigned l = ready; l > 1; l--) std::swap(lanes[l - 1], lanes[random() % l]);
        for (unsigned l = 0; l < ready; l++) {
            resume(lanes[l]);
            if (m.failed) return true;
        }
        progress = true;
        unsigned waiting = 0, site = 0;
        for (unsigned l = 0; l < count; l++) {
            const Fiber& f = m.fibers[first + l];
            if (f.state == AT_WARP) { waiting++; site = f.site; }
        }
        if (waiting == 0) continue;
        for (unsigned l = 0; l < count; l++) {
            Fiber& f = m.fibers[first + l];
            if (f.state != AT_WARP || f.site != (int)site) {
                snprintf(m.launch->error, sizeof m.launch->error,
                         "divergence: lanes of warp %u wait at line %d, lane %u does not", warp, (int)site, l);
                m.failed = true;
                return true;
            }
        }
        for (unsigned l = 0; l < count; l++) m.fibers[first + l].state = READY;
        m.generation[warp]++;
    }
    return progress;
}

static void run_block(std::mt19937& random) {
    const unsigned threads = m.launch->threads, warps = (threads + 31) / 32;
    for (Fiber& f : m.fibers) { f.started = false; f.state = READY; }
    memset(m.shared, 0xff, m.launch->shared);
    for (unsigned i = 0; i < 16; i++) m.shared[m.launch->shared + i] = 0x5a;
    std::vector<unsigned> order(warps);
    while (!m.failed) {
        for (unsigned w = 0; w < warps; w++) order[w] = m.launch->order == REVERSE ? warps - 1 - w : w;
        if (m.launch->order == SHUFFLED) for (unsigned w = warps; w > 1; w--) std::swap(order[w - 1], order[random() % w]);
        bool progress = false;
        for (unsigned w : order) {
            progress |= run_warp(w, random, m.launch->order == SHUFFLED ? 1 + random() % 4 : -1);
            if (m.failed) return;
        }
        if (progress) continue;
        unsigned done = 0;
        for (unsigned i = 0; i < threads; i++) done += m.fibers[i].state == DONE;
        if (done == threads) break;
        for (unsigned i = 0; i < threads; i++) {
            const Fiber& f = m.fibers[i];
            if (f.state != AT_BLOCK || f.site != m.fibers[0].site) {
                snprintf(m.launch->error, sizeof m.launch->error,
                         "divergence: thread %u does not wait at the __syncthreads of line %d as others do", i,
                         m.fibers[f.state == AT_BLOCK ? i : 0].site);
                m.failed = true;
                return;
            }
        }
        for (unsigned i = 0; i < threads; i++) m.fibers[i].state = READY;
    }
    for (unsigned i = 0; i < 16; i++) if (m.shared[m.launch->shared + i] != 0x5a) {
        snprintf(m.launch->error, sizeof m.launch->error, "a write behind the end of shared memory");
        m.failed = true;
    }
}

static int run(Launch* launch, void (*kernel)(void**), const std::vector<std::pair<int, char>>& parameters) {
    m.launch = launch;
    m.kernel = kernel;
    m.failed = false;
    launch->error[0] = 0;
    if ((int)parameters.size() != launch->arg_count) {
        snprintf(launch->error, sizeof launch->error, "%d arguments for %zu parameters", launch->arg_count, parameters.size());
        return 1;
    }
    for (int i = 0; i < launch->arg_count; i++) {
        if (parameters[i].first != launch->sizes[i] || parameters[i].second != (char)launch->kinds[i]) {
            snprintf(launch->error, sizeof launch->error, "argument %d has %d bytes of kind %c, the parameter %d of kind %c",
                     i, launch->sizes[i], launch->kinds[i], parameters[i].first, parameters[i].second);
            return 1;
        }
    }
    while (m.fibers.size() < launch->threads) {
        m.fibers.push_back(Fiber{});
        m.fibers.back().stack = (char*)malloc(STACK);
    }
    const unsigned warps = (launch->threads + 31) / 32;
    m.slots.assign(warps * 64, 0);
    m.generation.assign(warps, 0);
    // Exactly as large as asked for, and a canary; AddressSanitizer watches what is behind.
    std::unique_ptr<unsigned char[]> shared(new unsigned char[launch->shared + 16]);
    m.shared = shared.get();
    gridDim = {launch->grid_x, launch->grid_y, 1};
    blockDim = {launch->threads, 1, 1};
    std::mt19937 random(launch->seed);
    for (unsigned y = 0; y < launch->grid_y && !m.failed; y++) {
        for (unsigned x = 0; x < launch->grid_x && !m.failed; x++) {
            blockIdx = {x, y, 0};
            run_block(random);
        }
    }
    return m.failed;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(A*)args[I]...);
}
template <class A> constexpr char kind() {
    return std::is_pointer<A>::value ? 'u' : std::is_floating_point<A>::value ? 'f' : 'i';
}
template <class... A> std::vector<std::pair<int, char>> parameters(void (*)(A...)) {
    return {{(int)sizeof(A), kind<A>()}...};
}
template <class... A> void call(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>());
}

// Check an access to global memory; the range it lies in.
static Range& check(const void* p, size_t size, size_t alignment) {
    const uintptr_t a = (uintptr_t)p;
    if (a % alignment) fail("an access of " + std::to_string(size) + " bytes is not aligned");
    for (int i = 0; i < m.launch->range_count; i++) {
        Range& range = m.launch->ranges[i];
        if (a >= range.low && a + size <= range.high) return range;
    }
    fail("an access of " + std::to_string(size) + " bytes lies outside of every array of the launch");
    return m.launch->ranges[0];
}

static float widen16(uint16_t bits) {
#if defined(STORAGE_BFLOAT16)
    const uint32_t u = (uint32_t)bits << 16;
#else
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp((float)fraction, -24);
    const uint32_t u = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
#endif
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Round to nearest even.
static uint16_t narrow16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
#if defined(STORAGE_BFLOAT16)
    return f != f ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
#else
    const uint16_t sign = u >> 16 & 0x8000;
    if (f != f) return 0x7fff;
    const double size = std::fabs((double)f);
    if (size >= 65520) return sign | 0x7c00;
    if (size < 0x1p-14) return sign | (uint16_t)std::nearbyint(size * 0x1p24);
    const uint32_t rounded = (u & 0x7fffffff) - (112u << 23) + 0xfff + (u >> 13 & 1);
    return sign | (uint16_t)(rounded >> 13);
#endif
}

}  // namespace simt

#define KERNEL(THREADS, BLOCKS) extern "C" void
inline unsigned char* shared_memory() { return simt::m.shared; }
#define SIMT_EXPORT(name) \
    extern "C" int simt_run_##name(simt::Launch* launch) { \
        return simt::run(launch, [](void** args) { simt::call(&name, args); }, simt::parameters(&name)); \
    }

template <class T> inline T load(const T* p) {
    simt::check(p, sizeof(T), alignof(T)).read += sizeof(T);
    return *p;
}
template <class T> inline void store(T* p, T value) {
    simt::check(p, sizeof(T), alignof(T)).written += sizeof(T);
    *p = value;
}
inline float reciprocal_sqrt(float f) { return (float)(1 / std::sqrt((double)f)); }
inline double reciprocal_sqrt(double d) { return 1 / std::sqrt(d); }

#define __syncthreads() simt::wait(simt::AT_BLOCK, __LINE__)
#define __syncwarp() simt::wait(simt::AT_WARP, __LINE__)

// Each lane shows its value, all meet, each takes its partner's. A lane can be one shuffle ahead: two generations.
template <class T> inline T simt_shuffle_xor(T value, int distance, int line) {
    const unsigned i = threadIdx.x, warp = i / 32;
    uint64_t* slots = &simt::m.slots[warp * 64 + simt::m.generation[warp] % 2 * 32];
    memcpy(&slots[i % 32], &value, sizeof(T));
    simt::wait(simt::AT_WARP, line);
    T other;
    memcpy(&other, &slots[(i % 32) ^ distance], sizeof(T));
    return other;
}
#define __shfl_xor_sync(mask, value, distance) simt_shuffle_xor(value, distance, __LINE__)
