// The machine: fibers, warps, blocks and clusters, and the order in which they run.

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

Machine m;

// Keep the first error; the launch stops when `failed` is next checked.
static void complain(const char* format, va_list values) {
    if (!m.failed) vsnprintf(m.launch->error, sizeof m.launch->error, format, values);
    m.failed = true;
}

void report(const char* format, ...) {
    va_list values;
    va_start(values, format);
    complain(format, values);
    va_end(values);
}

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    complain(format, values);
    va_end(values);
    _longjmp(m.scheduler, 1);
}

Range& check(const void* p, size_t size, size_t alignment) {
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

size_t place_in_shared(const void* p, size_t size) {
    const uintptr_t low = (uintptr_t)m.block->shared.get(), a = (uintptr_t)p;
    if (a < low || a + size > low + m.launch->shared) fail("%zu bytes are not in shared memory", size);
    return a - low;
}

float widen_bfloat16(uint16_t bits) { return of_bits((uint32_t)bits << 16); }

uint16_t narrow_bfloat16(float f) {
    const uint32_t u = bits_of(f);
    return f != f ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float widen_float16(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp((float)fraction, -24);
    return of_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

uint16_t narrow_float16(float f) {
    const uint32_t u = bits_of(f);
    const uint16_t sign = u >> 16 & 0x8000;
    if (f != f) return 0x7fff;
    const double size = std::fabs((double)f);
    if (size >= 65520) return sign | 0x7c00;
    if (size < 0x1p-14) return sign | (uint16_t)std::nearbyint(size * 0x1p24);
    const uint32_t rounded = (u & 0x7fffffff) - (112u << 23) + 0xfff + (u >> 13 & 1);
    return sign | (uint16_t)(rounded >> 13);
}

void wait(State state, int site) {
    Fiber& f = m.block->fibers[m.current];
    f.state = state;
    f.site = site;
    if (_setjmp(f.context) == 0) _longjmp(m.scheduler, 1);
}

void wait_until(const unsigned* counter, unsigned target, int site) {
    check(counter, sizeof *counter, alignof(unsigned)).read += sizeof *counter;
    if (*counter >= target) return;
    Fiber& f = m.block->fibers[m.current];
    f.counter = counter;
    f.target = target;
    wait(AT_COUNTER, site);
}

// Let the threads that waited for this continue.
void release(int site) {
    m.released = true;
    wait(READY, site);
}

void cluster_arrive(int site) {
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

void cluster_wait(int site) {
    Fiber& f = m.block->fibers[m.current];
    if (!f.arrived) fail("a cluster_wait without cluster_arrive at line %d", site);
    if (f.round == m.block->cluster->round) wait(AT_CLUSTER, site);
    m.block->fibers[m.current].arrived = false;
}

// End a thread, and with the last thread its block.
static void end() {
    Block& block = *m.block;
    Fiber& f = block.fibers[m.current];
    if (f.arrived) fail("thread %u ends without cluster_wait after its cluster_arrive", m.current);
    f.state = DONE;
    if (--block.running) return;
    for (unsigned i = 0; i < 16; i++) {
        if (block.shared[m.launch->shared + i] != 0x5a) fail("a write behind the end of shared memory");
    }
    if (m.blocks.size() > 1) memset(block.shared.get(), 0xff, m.launch->shared);  // peers may still point into it
}

static void body() {
    m.kernel(m.launch->args);
    end();
    _longjmp(m.scheduler, 1);
}

// Start a thread on the stack of a fiber.
static void start(size_t fiber) {
    char* stack = m.launch->stacks + fiber * STACK;
    // Stacks start at different offsets in their pages, since otherwise they would share a few cache lines.
    const size_t size = STACK - fiber % 31 * 128;
#if defined(__x86_64__)
    asm volatile("mov %0, %%rsp\n\txor %%ebp, %%ebp\n\tcall *%1" : : "r"(stack + size), "r"(body) : "memory");
#else
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    setcontext(&context);
#endif
    __builtin_unreachable();
}

static void resume(unsigned i) {
    Fiber& f = m.block->fibers[i];
    m.current = i;
    threadIdx = {i, 0, 0};
    if (_setjmp(m.scheduler) != 0) return;
    if (f.started) _longjmp(f.context, 1);
    f.started = true;
    start(&f - m.fibers.data());
}

// Whether a thread may continue without a meeting of its warp or block.
static bool pending(const Fiber& f) { return f.state == READY || f.state == AT_CLUSTER || f.state == AT_COUNTER; }

static bool ready(Fiber& f) {
    if (f.state == AT_CLUSTER && f.round != m.block->cluster->round) f.state = READY;
    if (f.state == AT_COUNTER && *f.counter >= f.target) f.state = READY;
    return f.state == READY;
}

// A number from 0 to count - 1, by Knuth's generator for MMIX. (<random> would be a third of the compile time.)
static unsigned random(unsigned count) {
    m.random = m.random * 6364136223846793005u + 1442695040888963407u;
    return (m.random >> 33) % count;
}

// Put items into the order under test.
static void arrange(unsigned* items, unsigned count) {
    if (m.launch->order == REVERSE) for (unsigned i = 0; i < count / 2; i++) std::swap(items[i], items[count - 1 - i]);
    if (m.launch->order == SHUFFLED) for (unsigned i = count; i > 1; i--) std::swap(items[i - 1], items[random(i)]);
}
static void arrange(std::vector<unsigned>& numbers) {
    for (unsigned i = 0; i < numbers.size(); i++) numbers[i] = i;
    arrange(numbers.data(), numbers.size());
}

// How many steps to run: a few if shuffled, otherwise any number (-1).
static int some_steps() { return m.launch->order == SHUFFLED ? 1 + random(4) : -1; }

// Run one warp until all its lanes are done or wait for the block or other blocks, or for at most `steps` meetings.
// Return whether any lane ran.
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

// Run a block until it has ended, waits for others or has released some, or for at most `steps` runs of its warps.
// Return whether any thread ran.
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

// No thread can continue: report which one waits for what.
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

// Run the blocks of m.blocks, which are the blocks of the grid from number `first` on, until all have ended.
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

// If `on`, flush denormal operands and results to 0.
struct Flush {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();
    explicit Flush(bool on) { if (on) _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#else
    explicit Flush(bool) {}
#endif
};

int run(Launch* launch, void (*kernel)(void**), const std::vector<std::pair<int, char>>& parameters, bool flush) {
    const Flush flushing(flush);
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
    if (together * threads * STACK > launch->stacks_size) {
        report("%u threads run together, more than there are stacks for", together * threads);
        return 1;
    }
    m.fibers.resize(together * threads);
    m.clusters.resize(together / cluster);
    m.blocks.resize(together);
    for (unsigned b = 0; b < together; b++) {
        const unsigned warps = (threads + 31) / 32;
        // Exactly as large as requested, and a canary; AddressSanitizer watches the memory after it.
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
    return m.failed;
}

}  // namespace simt
