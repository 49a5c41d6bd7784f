// Launches: the checks of a driver before a kernel runs, occupancy, and function attributes. A launch that passes goes
// to the hook that the host has set, at once or whenever its graph is launched.

#include "device.h"

#include <cuda_occupancy.h>

#include <algorithm>
#include <cstring>

namespace fake {

static int (*hook)(const Launch*) = nullptr;

static unsigned volume(const unsigned n[3]) { return n[0] * n[1] * n[2]; }

// Blocks that fit on a multiprocessor, by NVIDIA's own calculator.
static int resident(const Kernel& k, int threads, size_t dynamic_shared) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, k.device)) return 0;
    const cudaOccDeviceProp device(p);
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = k.most_threads;
    kernel.numRegs = k.registers;
    kernel.sharedSizeBytes = k.static_shared;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = k.dynamic_shared;
    kernel.numBlockBarriers = 1;
    const cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic_shared)) return 0;
    return result.activeBlocksPerMultiprocessor;
}

// Clusters that fit on the device: each lies within one part of it.
static int clusters(const Kernel& k, int blocks, int threads, size_t shared) {
    const int most = std::min<long>(settings.cluster, k.non_portable ? 16 : PORTABLE_CLUSTER);
    if (model().major < 9 || blocks > most) return 0;
    return model().multiprocessors / settings.part * (resident(k, threads, shared) * settings.part / blocks);
}

static int check(const Launch& l, void* stream) {
    const Kernel& k = *l.kernel;
    const char* name = k.name.c_str();
    const unsigned threads = volume(l.block), blocks = volume(l.cluster);
    const unsigned most[3] = {2147483647, 65535, 65535};
    for (int i = 0; i < 3; i++) {
        if (l.grid[i] < 1 || l.grid[i] > most[i]) return refuse(1, "%s: a grid of %u blocks", name, l.grid[i]);
    }
    if (threads < 1 || threads > MAX_THREADS || l.block[2] > 64) return refuse(1, "%s: %u threads", name, threads);
    if (k.device != l.device) return refuse(400, "%s is loaded on device %d, not on %d", name, k.device, l.device);
    if (device_of(stream) != l.device) return refuse(400, "%s: the stream is not of device %d", name, l.device);
    if (threads > (unsigned)k.most_threads) {
        return refuse(701, "%s: %u threads, its launch bounds allow %d", name, threads, k.most_threads);
    }
    // Above the default, cuFuncSetAttribute has checked that there is room for the static memory.
    if (l.shared > (unsigned)k.dynamic_shared
        || (k.dynamic_shared <= DEFAULT_SHARED && l.shared + k.static_shared > DEFAULT_SHARED)) {
        return refuse(1, "%s: %u bytes of dynamic and %d of static shared memory; at most %d dynamic ones are allowed",
                      name, l.shared, k.static_shared, k.dynamic_shared);
    }
    const int fitting = resident(k, threads, l.shared);
    if (fitting == 0) return refuse(701, "%s: %u threads of %d registers", name, threads, k.registers);
    for (int i = 0; i < 3; i++) {
        if (l.grid[i] % l.cluster[i]) {
            return refuse(1, "%s: a grid of %u blocks in clusters of %u", name, l.grid[i], l.cluster[i]);
        }
    }
    if (blocks > 1 && clusters(k, blocks, threads, l.shared) == 0) {
        return refuse(912, "%s: clusters of %u blocks: %s", name, blocks,
                      blocks > PORTABLE_CLUSTER && !k.non_portable ? "the kernel does not allow a size that is not portable"
                                                                   : "the device cannot place one");
    }
    const unsigned at_once = blocks > 1 ? clusters(k, blocks, threads, l.shared) * blocks
                                        : fitting * model().multiprocessors;
    if (l.cooperative && volume(l.grid) > at_once) {
        return refuse(720, "%s: %u blocks, %u fit on the device at once", name, volume(l.grid), at_once);
    }
    return 0;
}

// Pack the arguments as in the kernel's constant bank: from pointers to each, or from a buffer of exactly that size.
static int pack(const Kernel& k, void** pointers, void** extra, std::vector<unsigned char>& packed) {
    packed.assign(std::max(k.parameter_bytes, 1), 0);
    if (pointers && extra) return refuse(1, "%s: arguments are given in both ways", k.name.c_str());
    if (extra) {
        const void* buffer = nullptr;
        size_t size = 0;
        for (void** e = extra; *e != CU_LAUNCH_PARAM_END; e += 2) {
            if (*e == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = e[1];
            else if (*e == CU_LAUNCH_PARAM_BUFFER_SIZE) size = *(size_t*)e[1];
            else return refuse(1, "%s: an unknown item among the extra ones", k.name.c_str());
        }
        if (buffer == nullptr || size != (size_t)k.parameter_bytes) {
            return refuse(1, "%s: %zu bytes of arguments for %d of parameters", k.name.c_str(), size, k.parameter_bytes);
        }
        memcpy(packed.data(), buffer, size);
        return 0;
    }
    for (size_t i = 0; i < k.parameters.size(); i++) {
        if (!pointers || !pointers[i]) return refuse(1, "%s: argument %zu is missing", k.name.c_str(), i);
        memcpy(&packed[k.parameters[i].offset], pointers[i], k.parameters[i].size);
    }
    return 0;
}

static int launch(Launch l, void* stream, void** pointers, void** extra) {
    count(LAUNCHES);
    if (int error = need_context()) return error;
    l.device = current_device();
    std::vector<unsigned char> packed;
    {
        std::lock_guard<std::recursive_mutex> guard(lock);
        if (settings.fail && --settings.fail == 0) return refuse(settings.code, "FAKEGPU's fail");
    }
    if (int error = check(l, stream)) return error;
    if (int error = pack(*l.kernel, pointers, extra, packed)) return error;
    if (hook == nullptr) return refuse(801, "no launch hook is set: start Python with tests/fakegpu/run.py");
    return enqueue(stream, "a launch", [l, packed]() mutable {
        l.parameters = packed.data();
        return hook(&l);
    });
}

static Launch describe(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared) {
    Kernel* k = (Kernel*)f;
    Launch l{k, {gx, gy, gz}, {bx, by, bz}, shared, {1, 1, 1}, 0, 0, nullptr};
    if (k->cluster[0]) memcpy(l.cluster, k->cluster, sizeof l.cluster);
    return l;
}

static int describe(const CUlaunchConfig& c, CUfunction f, Launch& l) {
    l = describe(f, c.gridDimX, c.gridDimY, c.gridDimZ, c.blockDimX, c.blockDimY, c.blockDimZ, c.sharedMemBytes);
    for (unsigned i = 0; i < c.numAttrs; i++) {
        const CUlaunchAttributeValue& v = c.attrs[i].value;
        if (c.attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) l.cooperative = v.cooperative;
        else if (c.attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
            const unsigned wanted[3] = {v.clusterDim.x, v.clusterDim.y, v.clusterDim.z};
            if (!volume(wanted)) return refuse(1, "%s: an empty cluster", l.kernel->name.c_str());
            if (l.kernel->cluster[0] && memcmp(wanted, l.kernel->cluster, sizeof wanted)) {
                return refuse(912, "%s is compiled for clusters of another size", l.kernel->name.c_str());
            }
            memcpy(l.cluster, wanted, sizeof wanted);
        } else if (c.attrs[i].id != CU_LAUNCH_ATTRIBUTE_IGNORE) return refuse(801, "launch attribute %d", (int)c.attrs[i].id);
    }
    return 0;
}

}  // namespace fake

using namespace fake;

extern "C" {

// For Python: set the hook that runs kernels. It returns 0 or an error, and sets the reason with fakegpu_refuse.
void fakegpu_hook(int (*f)(const Launch*)) { hook = f; }

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** pointers, void** extra) {
    return (CUresult)launch(describe(f, gx, gy, gz, bx, by, bz, shared), stream, pointers, extra);
}

CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void** pointers) {
    Launch l = describe(f, gx, gy, gz, bx, by, bz, shared);
    l.cooperative = 1;
    return (CUresult)launch(l, stream, pointers, nullptr);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** pointers, void** extra) {
    Launch l;
    if (int error = describe(*c, f, l)) return (CUresult)error;
    return (CUresult)launch(l, c->hStream, pointers, extra);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction f, int threads, size_t shared) {
    return *blocks = resident(*(Kernel*)f, threads, shared), CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* number, CUfunction f, const CUlaunchConfig* c) {
    Launch l;
    if (int error = describe(*c, f, l)) return (CUresult)error;
    *number = clusters(*l.kernel, volume(l.cluster), volume(l.block), l.shared);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
    const Kernel& k = *(Kernel*)f;
    const int by_registers = REGISTERS / std::max(k.registers, 1) / 128 * 128;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = std::min(k.most_threads, by_registers); break;
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = k.static_shared; break;
        case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES: *value = 0; break;
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = k.registers; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = k.dynamic_shared; break;
        case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH: *value = k.cluster[0]; break;
        case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: *value = k.non_portable; break;
        default: return (CUresult)refuse(801, "function attribute %d", (int)attribute);
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
    Kernel& k = *(Kernel*)f;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            if (value < 0 || value + k.static_shared > model().shared_per_block) {
                return (CUresult)refuse(1, "%s: %d bytes of dynamic shared memory", k.name.c_str(), value);
            }
            k.dynamic_shared = value;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: return k.non_portable = value, CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: return CUDA_SUCCESS;
        default: return (CUresult)refuse(801, "function attribute %d", (int)attribute);
    }
}

}
