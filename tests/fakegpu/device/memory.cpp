// Device memory. Its addresses are reserved without access: a host access to one ends the process with SIGSEGV. The
// bytes are in a second range, at a fixed distance, which only copies and kernels access. No address is used twice, and
// unused pages lie between allocations, so accesses to freed memory and beyond an allocation's end are detected.

#include "device.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fake {

constexpr size_t SPACE = (size_t)1 << 40, PAGE = 4096;
constexpr size_t POISONED = 64 << 20;  // larger allocations stay zeros, which cost no memory until written

static char* reserve(int protection) {
    void* p = mmap(nullptr, SPACE, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("the fake GPU cannot reserve its address space");
        abort();
    }
    return (char*)p;
}
static char* const device_base = reserve(PROT_NONE);
static char* const host_base = reserve(PROT_READ | PROT_WRITE);
static size_t next = PAGE;
static std::map<uintptr_t, Allocation> allocations;
static std::map<int, size_t> used;  // bytes, by device

static bool in_space(const void* p) { return p >= device_base && p < device_base + SPACE; }

void* host_of(const void* p) { return host_base + ((const char*)p - device_base); }

const Allocation* find(const void* p) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto after = allocations.upper_bound((uintptr_t)p);
    if (after == allocations.begin()) return nullptr;
    const Allocation& a = std::prev(after)->second;
    return (uintptr_t)p < a.low + a.size ? &a : nullptr;
}

static int allocate(void** p, size_t size) {
    count(MALLOCS);
    if (int error = ready()) return error;
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (settings.oom == 1) return refuse(cudaErrorMemoryAllocation, "FAKEGPU's oom");
    if (settings.oom) settings.oom--;
    const int device = current_device();
    const size_t pages = (size + PAGE - 1) / PAGE * PAGE;
    if (used[device] + size > (size_t)settings.memory << 20 || pages > SPACE - 2 * PAGE - next) {
        return refuse(cudaErrorMemoryAllocation, "%zu bytes, of %ld MiB are %zu in use", size, settings.memory,
                      used[device]);
    }
    *p = nullptr;
    if (size == 0) return 0;
    *p = device_base + next;
    next += pages + PAGE;
    if (size <= POISONED) memset(host_of(*p), 0xff, size);  // NaN
    allocations[(uintptr_t)*p] = {(uintptr_t)*p, size, device};
    used[device] += size;
    return 0;
}

static int release(void* p) {
    if (p == nullptr) return ready();
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto found = allocations.find((uintptr_t)p);
    if (found == allocations.end()) return refuse(cudaErrorInvalidValue, "%p was not allocated, or has been freed", p);
    const Allocation& a = found->second;
    used[a.device] -= a.size;
    madvise(host_of(p), (a.size + PAGE - 1) / PAGE * PAGE, MADV_DONTNEED);
    allocations.erase(found);
    return 0;
}

// Return the address of the bytes of one side of a copy; null, and an error, if they are not on the side given.
enum Side { HOST, DEVICE, EITHER };
static char* reach(const void* p, size_t size, Side side, const char* what) {
    if (!in_space(p)) {
        if (side != DEVICE) return (char*)p;
        refuse(cudaErrorInvalidValue, "%s: %p is not device memory", what, p);
        return nullptr;
    }
    const Allocation* a = find(p);
    if (side == HOST || a == nullptr || (uintptr_t)p + size > a->low + a->size) {
        refuse(cudaErrorInvalidValue, side == HOST ? "%s: %p is device memory" : "%s: %p is in no allocation, or too near "
               "its end", what, p);
        return nullptr;
    }
    return (char*)host_of(p);
}

static int copy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    if (size == 0) return 0;
    const Side source = kind == cudaMemcpyDefault ? EITHER
        : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyHostToHost ? HOST : DEVICE;
    const Side target = kind == cudaMemcpyDefault ? EITHER
        : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost ? HOST : DEVICE;
    char* t = reach(to, size, target, "target of a copy");
    char* s = t ? reach(from, size, source, "source of a copy") : nullptr;
    if (s == nullptr) return cudaErrorInvalidValue;
    memmove(t, s, size);
    return 0;
}

static int fill(void* p, int value, size_t size) {
    if (size == 0) return 0;
    char* t = reach(p, size, DEVICE, "memset");
    return t ? memset(t, value, size), 0 : (int)cudaErrorInvalidValue;
}

static cudaError_t copy_now(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    count(COPIES);
    if (int error = may_not_wait("a copy that is waited for")) return (cudaError_t)error;
    return (cudaError_t)enqueue(nullptr, "a copy", [=] { return copy(to, from, size, kind); });
}

static cudaError_t copy_later(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    count(COPIES);
    return (cudaError_t)enqueue(stream, "a copy", [=] { return copy(to, from, size, kind); });
}

}  // namespace fake

using namespace fake;

extern "C" {

// For the launch hook: the host addresses of a device pointer and of its allocation's start and end. 0: not allocated.
int fakegpu_find(const void* p, int device, uintptr_t* at, uintptr_t* low, uintptr_t* high) {
    const Allocation* a = find(p);
    if (a == nullptr || a->device != device) return 0;
    *at = (uintptr_t)host_of(p);
    *low = (uintptr_t)host_of((void*)a->low);
    *high = *low + a->size;
    return 1;
}
int fakegpu_is_device(const void* p) { return in_space(p); }

cudaError_t cudaMalloc(void** p, size_t size) {
    make_context();
    if (int error = may_not_wait("cudaMalloc")) return (cudaError_t)error;
    return (cudaError_t)allocate(p, size);
}
cudaError_t cudaFree(void* p) {
    make_context();
    if (int error = may_not_wait("cudaFree")) return (cudaError_t)error;
    return (cudaError_t)release(p);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    make_context();
    *total = (size_t)settings.memory << 20;
    *free = *total - used[current_device()];
    return (cudaError_t)ready();
}
cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
    *p = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* p) { return free(p), cudaSuccess; }

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
    return copy_now(to, from, size, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    return copy_later(to, from, size, kind, stream);
}
cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t size) {
    return copy_now(to, from, size, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
    return copy_later(to, from, size, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemset(void* p, int value, size_t size) {
    return (cudaError_t)enqueue(nullptr, "cudaMemset", [=] { return fill(p, value, size); });
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t stream) {
    return (cudaError_t)enqueue(stream, "cudaMemsetAsync", [=] { return fill(p, value, size); });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
    const Allocation* a = find(p);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = a ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    attributes->device = a ? a->device : -1;
    attributes->devicePointer = a ? (void*)p : nullptr;
    return cudaSuccess;
}

}
