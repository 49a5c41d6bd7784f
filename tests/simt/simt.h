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

#define SIMT 1
#define __device__
#define __host__

struct Index3 { unsigned x, y, z; };
static Index3 threadIdx, blockIdx, blockDim, gridDim;

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
};

enum State { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_COUNTER, DONE };

struct Fiber {
    jmp_buf context;
    char* stack;
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

constexpr size_t STACK = 128 * 1024, KEPT = 1024;

struct Machine {
    Launch* launch;
    void (*kernel)(void**);
    std::vector<Fiber> fibers;      // of all blocks that run together; their stacks are kept for the next launch
    std::vector<Block> blocks;
    std::vector<Cluster> clusters;
    uint64_t random;
    jmp_buf scheduler;
    Block* block;                   // who runs: this block's
    unsigned current;               // thread
    bool released;                  // it did what others may wait for
    bool failed;
};
static Machine m;

// The first complaint is kept; the launch stops at the next look at `failed`.
static void report(const char* format, ...) {
    if (m.failed) return;
    m.failed = true;
    va_list values;
    va_start(values, format);
    vsnprintf(m.launch->error, sizeof m.launch->error, format, values);
    va_end(values);
}

// The same from a kernel, which stops here: the fibers are dropped as they are, nothing in them needs destroying.
template <class... A> [[noreturn]] void fail(const char* format, A... values) {
    report(format, values...);
    _longjmp(m.scheduler, 1);
}

static void wait(State state, int site) {
    Fiber& f = m.block->fibers[m.current];
    f.state = state;
    f.site = site;
    if (_setjmp(f.context) == 0) _longjmp(m.scheduler, 1);
}

// Let those go on who waited for this.
static void release(int site) {
    m.released = true;
    wait(READY, site);
}

static void cluster_arrive(int site) {
    Fiber& f = m.block->fibers[m.current];
    Cluster& c = *m.block->cluster;
    if (f.arrived) fail("a second cluster_arrive without cluster_wait at line %d", site);
    if (c.arrived == 0) c.site = site;
    if (c.site != site) fail("divergence: a cluster_arrive at line %d, others at line %d", site, c.site);
    f.arrived = true;
    f.round = c.round;
    if (++c.arrived < m.launch->threads * m.launch->cluster) return wait(READY, site);
    c.round++;
    c.arrived = 0;
    release(site);
}

static void cluster_wait(int site) {
    Fiber& f = m.block->fibers[m.current];
    if (!f.arrived) fail("a cluster_wait without cluster_arrive at line %d", site);
    if (f.round == m.block->cluster->round) wait(AT_CLUSTER, site);
    m.block->fibers[m.current].arrived = false;
}

// The end of a thread, and of its block with the last one.
static void end() {
    Block& block = *m.block;
    Fiber& f = block.fibers[m.current];
    if (f.arrived) fail("thread %u ends without cluster_wait after its cluster_arrive", m.current);
    f.state = DONE;
    if (--block.running) return;
    for (unsigned i = 0; i < 16; i++) {
        if (block.shared[m.launch->shared + i] != 0x5a) fail("a write behind the end of shared memory");
    }
    if (m.blocks.size() > 1) memset(block.shared.get(), 0xff, m.launch->shared);  // whoever still has a pointer to it
}

static void body() {
    m.kernel(m.launch->args);
    end();
    _longjmp(m.scheduler, 1);
}

static void resume(unsigned i) {
    Fiber& f = m.block->fibers[i];
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

// Whether it may go on without a meeting of its warp or block.
static bool pending(const Fiber& f) { return f.state == READY || f.state == AT_CLUSTER || f.state == AT_COUNTER; }

static bool ready(Fiber& f) {
    if (f.state == AT_CLUSTER && f.round != m.block->cluster->round) f.state = READY;
    if (f.state == AT_COUNTER && *f.counter >= f.target) f.state = READY;
    return f.state == READY;
}

// One of 0 .. count - 1: Knuth's generator for MMIX. (<random> would be a third of the compile time.)
static unsigned random(unsigned count) {
    m.random = m.random * 6364136223846793005u + 1442695040888963407u;
    return (m.random >> 33) % count;
}

// Turn items into the order under test.
static void arrange(unsigned* items, unsigned count) {
    if (m.launch->order == REVERSE) for (unsigned i = 0; i < count / 2; i++) std::swap(items[i], items[count - 1 - i]);
    if (m.launch->order == SHUFFLED) for (unsigned i = count; i > 1; i--) std::swap(items[i - 1], items[random(i)]);
}
static void arrange(std::vector<unsigned>& numbers) {
    for (unsigned i = 0; i < numbers.size(); i++) numbers[i] = i;
    arrange(numbers.data(), numbers.size());
}

// As far as it can; but shuffled, a few steps.
static int some_steps() { return m.launch->order == SHUFFLED ? 1 + random(4) : -1; }

// Run one warp until all its lanes wait for the block or for more, or are done; or, for `steps` meetings at most.
static bool run_warp(unsigned warp, int steps) {
    const unsigned first = warp * 32, count = std::min(32u, m.launch->threads - first);
    Fiber* fibers = m.block->fibers + first;
    bool progress = false;
    while (steps-- != 0) {
        unsigned lanes[32], able = 0;
        for (unsigned l = 0; l < count; l++) if (ready(fibers[l])) lanes[able++] = l;
        if (able == 0) break;
        arrange(lanes, able);
        for (unsigned l = 0; l < able; l++) {
            resume(first + lanes[l]);
            if (m.failed || m.released) return true;
        }
        progress = true;
        unsigned waiting = 0, absent = 0;
        int site = 0;
        for (unsigned l = 0; l < count; l++) {
            if (fibers[l].state == AT_WARP) { waiting++; site = fibers[l].site; }
            absent += pending(fibers[l]);
        }
        if (waiting == 0 || absent) continue;
        for (unsigned l = 0; l < count; l++) {
            if (fibers[l].state != AT_WARP || fibers[l].site != site) {
                report("divergence: lanes of warp %u wait at line %d, lane %u does not", warp, site, l);
                return true;
            }
        }
        for (unsigned l = 0; l < count; l++) fibers[l].state = READY;
        m.block->generation[warp]++;
    }
    return progress;
}

// Let a block go on until it has ended, waits for others or has released some; or, for `steps` warps. Whether it did.
static bool run_block(Block& block, int steps) {
    const unsigned threads = m.launch->threads;
    m.block = &block;
    blockIdx = block.index;
    block.begun = true;
    std::vector<unsigned> warps((threads + 31) / 32);
    bool progress = false;
    while (block.running) {
        arrange(warps);
        bool moved = false;
        for (unsigned w : warps) {
            if (!run_warp(w, some_steps())) continue;
            if (m.failed || m.released || --steps == 0) return true;
            moved = true;
        }
        progress |= moved;
        if (moved) continue;
        unsigned absent = 0;
        for (unsigned i = 0; i < threads; i++) absent += pending(block.fibers[i]);
        if (absent) break;
        for (unsigned i = 0; i < threads; i++) {
            const Fiber& f = block.fibers[i];
            if (f.state != AT_BLOCK || f.site != block.fibers[0].site) {
                report("divergence: thread %u does not wait at the __syncthreads of line %d as others do", i,
                       block.fibers[f.state == AT_BLOCK ? i : 0].site);
                return true;
            }
        }
        for (unsigned i = 0; i < threads; i++) block.fibers[i].state = READY;
        block.meetings++;
        progress = true;
    }
    return progress;
}

// Nobody can go on: who waits for what.
static void report_deadlock() {
    const unsigned threads = m.launch->threads;
    for (Block& block : m.blocks) for (unsigned i = 0; i < threads; i++) {
        const Fiber& f = block.fibers[i];
        if (f.state == AT_COUNTER) {
            report("deadlock: thread %u of block %u,%u waits for a counter at line %d to reach %u, it stands at %u",
                   i, block.index.x, block.index.y, f.site, f.target, *f.counter);
        }
    }
    for (Block& block : m.blocks) for (unsigned i = 0; i < threads; i++) {
        const Fiber& f = block.fibers[i];
        if (f.state != AT_CLUSTER) continue;
        for (Block& other : m.blocks) for (unsigned j = 0; j < threads; j++) {
            const Fiber& g = other.fibers[j];
            if (other.cluster != block.cluster || (g.arrived && g.round == f.round)) continue;
            report("divergence: thread %u of block %u,%u waits for its cluster at line %d, "
                   "thread %u of block %u,%u has %s",
                   i, block.index.x, block.index.y, f.site, j, other.index.x, other.index.y,
                   g.state == DONE ? "ended" : "not arrived");
        }
    }
}

// Run the blocks of m.blocks, which are those of the grid from number `first` on, until all have ended.
static void run_together(unsigned first) {
    const unsigned threads = m.launch->threads, count = m.blocks.size();
    for (Cluster& c : m.clusters) c = {};
    for (unsigned b = 0; b < count; b++) {
        Block& block = m.blocks[b];
        block.index = {(first + b) % m.launch->grid_x, (first + b) / m.launch->grid_x, 0};
        block.begun = false;
        block.running = threads;
        for (unsigned i = 0; i < threads; i++) {
            block.fibers[i].started = block.fibers[i].arrived = false;
            block.fibers[i].state = READY;
        }
        memset(block.shared.get(), 0xff, m.launch->shared);
        memset(block.shared.get() + m.launch->shared, 0x5a, 16);
    }
    std::vector<unsigned> order(count);
    for (unsigned running = count; running && !m.failed;) {
        arrange(order);
        m.released = false;
        bool progress = false;
        running = 0;
        for (unsigned b : order) {
            if (m.blocks[b].running) progress |= run_block(m.blocks[b], count > 1 ? some_steps() : -1);
            if (m.failed) return;
            running += m.blocks[b].running;
            if (m.released) break;
        }
        if (!progress && running) report_deadlock();
    }
}

// Operands and results that are denormal become 0. A GPU does so with floats alone; doubles as small do not occur.
struct Flush {
#if defined(__SSE__) && !defined(STORAGE_FLOAT64)
    const unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#endif
};

static int run(Launch* launch, void (*kernel)(void**), const std::vector<std::pair<int, char>>& parameters) {
    const Flush flush;
    m.launch = launch;
    m.kernel = kernel;
    m.failed = false;
    launch->error[0] = 0;
    const unsigned threads = launch->threads, cluster = launch->cluster, grid = launch->grid_x * launch->grid_y;
    if ((int)parameters.size() != launch->arg_count) {
        report("%d arguments for %zu parameters", launch->arg_count, parameters.size());
    }
    for (int i = 0; !m.failed && i < launch->arg_count; i++) {
        if (parameters[i].first != launch->sizes[i] || parameters[i].second != (char)launch->kinds[i]) {
            report("argument %d has %d bytes of kind %c, the parameter %d of kind %c",
                   i, launch->sizes[i], launch->kinds[i], parameters[i].first, parameters[i].second);
        }
    }
    if (cluster < 1 || cluster > 16 || launch->grid_x % cluster) {
        report("a cluster of %u blocks in a grid of %u along x: clusters have 1 to 16 and divide it",
               cluster, launch->grid_x);
    }
    if (m.failed) return 1;
    const unsigned together = launch->cooperative ? grid : cluster;
    while (m.fibers.size() < together * threads) {
        m.fibers.push_back(Fiber{});
        m.fibers.back().stack = (char*)malloc(STACK);
    }
    m.clusters.resize(together / cluster);
    m.blocks.resize(together);
    for (unsigned b = 0; b < together; b++) {
        const unsigned warps = (threads + 31) / 32;
        // Exactly as large as asked for, and a canary; AddressSanitizer watches what is behind.
        m.blocks[b] = Block{{}, b % cluster, &m.clusters[b / cluster], &m.fibers[b * threads], false, 0,
                            std::unique_ptr<unsigned char[]>(new unsigned char[launch->shared + 16]),
                            std::vector<uint64_t>(warps * 64), std::vector<unsigned>(warps)};
    }
    gridDim = {launch->grid_x, launch->grid_y, 1};
    blockDim = {threads, 1, 1};
    m.random = launch->seed;
    random(1);
    std::vector<unsigned> firsts(grid / std::max(1u, together));
    arrange(firsts);
    for (unsigned i = 0; i < firsts.size() && !m.failed; i++) run_together(firsts[i] * together);
    m.blocks.clear();
    // Each library has stacks of its own: those of a large group would add up.
    for (; m.fibers.size() > KEPT; m.fibers.pop_back()) free(m.fibers.back().stack);
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
template <class... A> const char* kinds(void (*)(A...)) {
    static const char letters[] = {kind<A>()..., 0};
    return letters;
}

// Check an access to global memory; the range it lies in.
static Range& check(const void* p, size_t size, size_t alignment) {
    const uintptr_t a = (uintptr_t)p;
    if (a % alignment) fail("an access of %zu bytes is not aligned", size);
    for (int i = 0; i < m.launch->range_count; i++) {
        Range& range = m.launch->ranges[i];
        if (a >= range.low && a + size <= range.high) {
            range.accesses++;
            return range;
        }
    }
    fail("an access of %zu bytes lies outside of every array of the launch", size);
}

// Where in the block's shared memory it lies.
static size_t place_in_shared(const void* p, size_t size) {
    const uintptr_t low = (uintptr_t)m.block->shared.get(), a = (uintptr_t)p;
    if (a < low || a + size > low + m.launch->shared) fail("%zu bytes are not in shared memory", size);
    return a - low;
}

static void wait_until(const unsigned* counter, unsigned target, int site) {
    check(counter, sizeof *counter, alignof(unsigned)).read += sizeof *counter;
    if (*counter >= target) return;
    Fiber& f = m.block->fibers[m.current];
    f.counter = counter;
    f.target = target;
    wait(AT_COUNTER, site);
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
#define CLUSTER_KERNEL(THREADS, BLOCKS, SIZE) extern "C" void
inline unsigned char* shared_memory() { return simt::m.block->shared.get(); }
#define SIMT_EXPORT(name) \
    extern "C" int simt_run_##name(simt::Launch* launch) { \
        return simt::run(launch, [](void** args) { simt::call(&name, args); }, simt::parameters(&name)); \
    } \
    extern "C" const char* simt_kinds_##name() { return simt::kinds(&name); }

template <class T> inline T load(const T* p) {
    simt::check(p, sizeof(T), alignof(T)).read += sizeof(T);
    return *p;
}
template <class T> inline void store(T* p, T value) {
    simt::check(p, sizeof(T), alignof(T)).written += sizeof(T);
    *p = value;
}
template <class T> inline T& in_shared(T* p) {
    if (simt::place_in_shared(p, sizeof(T)) % sizeof(T)) simt::fail("%zu bytes in shared memory are not aligned", sizeof(T));
    return *p;
}
template <class T> inline T load_fresh(const T* p) { return load(p); }
inline float reciprocal_sqrt(float f) { return (float)(1 / std::sqrt((double)f)); }
inline double reciprocal_sqrt(double d) { return 1 / std::sqrt(d); }
inline float reciprocal(float f) { return 1 / f; }
// The C library has none. Behind 26, where erfc is denormal, the first term of the asymptotic series is exact enough.
inline double erfcx(double x) { return x < 26 ? std::exp(x * x) * std::erfc(x) : 0.56418958354775629 / x; }
inline float erfcxf(float x) { return (float)erfcx((double)x); }

#define __syncthreads() simt::wait(simt::AT_BLOCK, __LINE__)
#define __syncwarp() simt::wait(simt::AT_WARP, __LINE__)
#define cluster_arrive() simt::cluster_arrive(__LINE__)
#define cluster_fence()
#define cluster_wait() simt::cluster_wait(__LINE__)
#define wait_until(counter, target) simt::wait_until(counter, target, __LINE__)

inline unsigned block_in_cluster() { return simt::m.block->rank; }

template <class T> inline T* peer(T* p, unsigned rank) {
    const simt::Block& block = *simt::m.block;
    const size_t place = simt::place_in_shared(p, sizeof(T));
    if (rank >= simt::m.launch->cluster) simt::fail("peer() of block %u, which is not in the cluster", rank);
    const simt::Block& other = *(&block - block.rank + rank);
    if (!other.begun) simt::fail("peer() of a block that has not begun");
    if (!other.running) simt::fail("peer() of a block that has ended");
    return (T*)(other.shared.get() + place);
}

#define add_release(counter) simt_add_release(counter, __LINE__)
inline void simt_add_release(unsigned* counter, int line) {
    store(counter, load(counter) + 1);
    simt::release(line);
}

// Each lane shows its value, all meet, each takes its partner's. A lane can be one shuffle ahead: two generations.
template <class T> inline T simt_shuffle_xor(T value, int distance, int line) {
    const unsigned i = threadIdx.x, warp = i / 32;
    uint64_t* slots = &simt::m.block->slots[warp * 64 + simt::m.block->generation[warp] % 2 * 32];
    memcpy(&slots[i % 32], &value, sizeof(T));
    simt::wait(simt::AT_WARP, line);
    T other;
    memcpy(&other, &slots[(i % 32) ^ distance], sizeof(T));
    return other;
}
#define __shfl_xor_sync(mask, value, distance) simt_shuffle_xor(value, distance, __LINE__)

inline int simt_any(bool vote, int line) {
    const unsigned i = threadIdx.x, warp = i / 32;
    uint64_t* slots = &simt::m.block->slots[warp * 64 + simt::m.block->generation[warp] % 2 * 32];
    slots[i % 32] = vote;
    simt::wait(simt::AT_WARP, line);
    for (int lane = 0; lane < 32; lane++) if (slots[lane]) return 1;
    return 0;
}
#define __any_sync(mask, vote) simt_any(vote, __LINE__)

// A thread can be one meeting ahead, not two.
inline int simt_any_of_block(bool vote, int line) {
    simt::Block& block = *simt::m.block;
    const unsigned turn = block.meetings % 2;
    block.fibers[threadIdx.x].votes[turn] = vote;
    simt::wait(simt::AT_BLOCK, line);
    for (unsigned i = 0; i < simt::m.launch->threads; i++) if (block.fibers[i].votes[turn]) return 1;
    return 0;
}
#define __syncthreads_or(vote) simt_any_of_block(vote, __LINE__)
