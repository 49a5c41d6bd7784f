// Declarations shared by the parts of the fake device: settings, counts, errors, memory, kernels and streams.
//
// The parts are one library, which stands in for the driver (libcuda.so.1) and for the runtime (the functions that
// CuPy's own extension module links). Work is done at once, on the calling thread; only a capturing stream defers it.

#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace fake {

// The properties of a device: an H100, or an A100, which has no clusters.
struct Model {
    const char* name;
    int major, minor, multiprocessors;
    int shared_per_block, shared_per_multiprocessor;  // bytes: the most a kernel may opt in to
    int l2_bytes;
};
constexpr int DEFAULT_SHARED = 48 << 10, RESERVED_SHARED = 1 << 10, REGISTERS = 1 << 16, MAX_THREADS = 1024;
constexpr int PORTABLE_CLUSTER = 8;

// Set by the variable FAKEGPU ("devices=2,capability=80") or fakegpu_set. See the table in devices.cpp.
struct Settings { long devices, capability, cluster, part, memory, driver, oom, fail, code; };
extern Settings settings;

const Model& model();
int current_device();
int ready();  // 0, or the error that every call returns if no device or driver is usable
void make_context();  // calls of the runtime create the calling thread's context
int need_context();   // calls of the driver need one: an error on a thread without a context

// Counted events: in total, and while any stream captures.
enum Counted { MALLOCS, COPIES, SYNCHRONISATIONS, LAUNCHES, MODULES, COUNTED };
void count(Counted what);

// Return an error code, and set the reason with which the error's text then ends on this thread.
int refuse(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

extern std::recursive_mutex lock;  // of all tables; not held while a kernel runs

// Device memory: addresses that the host cannot access, and the host addresses of their bytes.
struct Allocation { uintptr_t low; size_t size; int device; };
const Allocation* find(const void* device_pointer);
void* host_of(const void* device_pointer);

struct Parameter { int offset = 0, size = 0; };

struct Kernel {
    std::string name;
    void* module;
    int device;
    int registers = 0, most_threads = 0, static_shared = 0, parameter_bytes = 0;
    unsigned cluster[3] = {0, 0, 0};
    int dynamic_shared = DEFAULT_SHARED;  // the most a launch may ask for
    bool non_portable = false;
    std::vector<Parameter> parameters;
};

// A launch that passed all checks, for the host's hook. Parameters are packed as in the kernel's constant bank.
struct Launch {
    Kernel* kernel;
    unsigned grid[3], block[3], shared, cluster[3];
    int cooperative, device;
    const unsigned char* parameters;
};

struct Capture;
bool capturing();
int enqueue(void* stream, const char* what, std::function<int()> work);  // do it now, or record it
int may_not_wait(const char* what);                                      // an error if a capture forbids this call
int device_of(void* stream);                                             // -1: unknown stream

}  // namespace fake
