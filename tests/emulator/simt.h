// The kernels' side of the emulator: with machine.h before it, the CUDA sources compile as C++.

#define SIMT 1
#define __device__
#define __host__

namespace simt {

template <class... A, size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(A*)args[I]...);
}
template <class A> constexpr char kind() {
    return std::is_class<A>::value ? 'V' : std::is_pointer<A>::value ? 'u' : std::is_floating_point<A>::value ? 'f' : 'i';
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

}  // namespace simt

#define KERNEL(THREADS, BLOCKS) extern "C" void
#define CLUSTER_OF(SIZE)
inline unsigned char* shared_memory() { return simt::m.block->shared.get(); }
// A GPU flushes only floats; in their modules, denormal doubles do not occur.
#define SIMT_EXPORT(name, flush) \
    extern "C" int simt_run_##name(simt::Launch* launch) { \
        return simt::run(launch, [](void** args) { simt::call(&name, args); }, simt::parameters(&name), flush); \
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
inline unsigned __float_as_uint(float f) { return simt::bits_of(f); }
inline float __uint_as_float(unsigned bits) { return simt::of_bits(bits); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
// Not in the C library. From 26 on, where erfc is denormal, the first term of the asymptotic series is exact enough.
inline double erfcx(double x) { return x < 26 ? std::exp(x * x) * std::erfc(x) : 0.56418958354775629 / x; }
inline float erfcxf(float x) { return (float)erfcx((double)x); }

inline int __clz(int n) { return __builtin_clz(n); }
inline long long opaque(long long n) { return n; }
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

// Each lane stores its value, all meet, each loads its partner's. A lane can be one shuffle ahead: two generations.
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

// A thread can be one meeting ahead of others, not two.
inline int simt_any_of_block(bool vote, int line) {
    simt::Block& block = *simt::m.block;
    const unsigned turn = block.meetings % 2;
    block.fibers[threadIdx.x].votes[turn] = vote;
    simt::wait(simt::AT_BLOCK, line);
    for (unsigned i = 0; i < simt::m.launch->threads; i++) if (block.fibers[i].votes[turn]) return 1;
    return 0;
}
#define __syncthreads_or(vote) simt_any_of_block(vote, __LINE__)
