// Devices, contexts, versions, settings, counts and the texts of errors.

#include "device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fake {

std::recursive_mutex lock;

static const Model MODELS[] = {
    {"NVIDIA H100 80GB HBM3", 9, 0, 132, 227 << 10, 228 << 10, 50 << 20},
    {"NVIDIA A100-SXM4-80GB", 8, 0, 108, 163 << 10, 164 << 10, 40 << 20},
};

Settings settings;

static const struct Setting { const char* name; long Settings::* value; long usual; } SETTINGS[] = {
    {"devices", &Settings::devices, 1},
    {"capability", &Settings::capability, 90},  // 90: an H100; 80: an A100, which has no clusters
    {"cluster", &Settings::cluster, 16},        // blocks of the largest cluster that can be placed; 1: no clusters
    {"part", &Settings::part, 16},              // multiprocessors of each part of a device; a cluster lies within one
    {"memory", &Settings::memory, 8192},        // MiB of each device
    {"driver", &Settings::driver, CUDA_VERSION},// the CUDA version that the driver supports; 0: no driver
    {"oom", &Settings::oom, 0},                 // all allocations from the n-th on fail; 0: none fails
    {"fail", &Settings::fail, 0},               // the n-th launch from now on fails, once; 0: none fails
    {"code", &Settings::code, CUDA_ERROR_LAUNCH_FAILED},  // with this error
};

static bool set(const std::string& name, long value) {
    for (const Setting& s : SETTINGS) {
        if (name == s.name) return settings.*s.value = value, true;
    }
    return false;
}

static const bool from_environment = [] {
    for (const Setting& s : SETTINGS) settings.*s.value = s.usual;
    const char* given = getenv("FAKEGPU");
    std::string text = given ? given : "";
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find(',', at), text.size()), equals = text.find('=', at);
        if (equals >= end || !set(text.substr(at, equals - at), atol(text.c_str() + equals + 1))) {
            fprintf(stderr, "FAKEGPU=%s: unknown setting\n", given);
            abort();
        }
        at = end + 1;
    }
    return true;
}();

const Model& model() { return MODELS[settings.capability < 90]; }

static thread_local int device = 0;
int current_device() { return device; }

int ready() {
    if (settings.driver < CUDA_VERSION / 1000 * 1000) {
        return refuse(cudaErrorInsufficientDriver, "the driver supports CUDA %ld", settings.driver);
    }
    return settings.devices ? 0 : refuse(cudaErrorNoDevice, "FAKEGPU has devices=0");
}

static long counts[COUNTED], captured[COUNTED];
void count(Counted what) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    counts[what]++;
    captured[what] += capturing();
}

static const struct Error { int code; const char *runtime, *driver, *text; } ERRORS[] = {
    {0, "cudaSuccess", "CUDA_SUCCESS", "no error"},
    {1, "cudaErrorInvalidValue", "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {35, "cudaErrorInsufficientDriver", "CUDA_ERROR_INSUFFICIENT_DRIVER",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {100, "cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "cudaErrorInvalidKernelImage", "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {209, "cudaErrorNoKernelImageForDevice", "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {400, "cudaErrorInvalidResourceHandle", "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "cudaErrorSymbolNotFound", "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "cudaErrorLaunchOutOfResources", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {716, "cudaErrorMisalignedAddress", "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {720, "cudaErrorCooperativeLaunchTooLarge", "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE",
     "too many blocks in cooperative launch"},
    {801, "cudaErrorNotSupported", "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {903, "cudaErrorStreamCaptureUnmatched", "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "the capture was not begun in this stream"},
    {905, "cudaErrorStreamCaptureIsolation", "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {906, "cudaErrorStreamCaptureImplicit", "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {912, "cudaErrorInvalidClusterSize", "CUDA_ERROR_INVALID_CLUSTER_SIZE",
     "a kernel launch error has occurred due to cluster misconfiguration"},
};

static const Error& error_of(int code) {
    static thread_local Error unknown = {0, "cudaErrorUnknown", "CUDA_ERROR_UNKNOWN", "unknown error"};
    for (const Error& e : ERRORS) if (e.code == code) return e;
    return unknown;
}

static thread_local int refused = 0;
static thread_local char reason[600], said[800];

int refuse(int code, const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    return refused = code;
}

static thread_local bool has_context = false;
void make_context() { has_context = true; }
int need_context() {
    return has_context ? 0 : refuse(CUDA_ERROR_INVALID_CONTEXT, "no call of the runtime has made one on this thread");
}

static const char* text_of(int code) {
    if (code == 0 || code != refused) return error_of(code).text;
    snprintf(said, sizeof said, "%s (%s)", error_of(code).text, reason);
    return said;
}

}  // namespace fake

using namespace fake;

extern "C" {

// For tests, by ctypes: change a setting, read a count (in total, or during captures), set an error's reason.
int fakegpu_set(const char* name, long value) { return set(name, value); }
long fakegpu_count(int what, int during_capture) { return during_capture ? captured[what] : counts[what]; }
int fakegpu_refuse(int code, const char* why) { return refuse(code, "%s", why); }

CUresult cuInit(unsigned) { return (CUresult)(settings.devices ? 0 : refuse(CUDA_ERROR_NO_DEVICE, "devices=0")); }
CUresult cuDriverGetVersion(int* version) { return *version = settings.driver, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* number) { return *number = settings.devices, CUDA_SUCCESS; }
// NVIDIA's own runtime, which PyTorch has with it, looks functions up here and must find no device. CuPy looks them up
// by name.
static CUresult no_device() { return CUDA_ERROR_NO_DEVICE; }
CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult*) {
    *function = std::string(name) == "cuDriverGetVersion" ? (void*)cuDriverGetVersion : (void*)no_device;
    return CUDA_SUCCESS;
}
// NVRTC asks for a table, but works without one.
CUresult cuGetExportTable(const void** table, const CUuuid*) { return *table = nullptr, CUDA_ERROR_NOT_FOUND; }
CUresult cuGetErrorName(CUresult e, const char** s) { return *s = error_of(e).driver, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char** s) { return *s = text_of(e), CUDA_SUCCESS; }

// A device has one context: its number plus one.
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = (CUcontext)(uintptr_t)(device + 1), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) {
    const long number = (long)c - 1;
    if (number < 0 || number >= settings.devices) return (CUresult)refuse(CUDA_ERROR_INVALID_DEVICE, "no such context");
    make_context();
    return device = number, CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* d) { return *d = device, CUDA_SUCCESS; }
CUresult cuStreamGetCtx(CUstream stream, CUcontext* c) {
    const int owner = device_of(stream);
    if (owner < 0) return (CUresult)refuse(CUDA_ERROR_INVALID_HANDLE, "there is no such stream");
    return *c = (CUcontext)(uintptr_t)(owner + 1), CUDA_SUCCESS;
}

const char* cudaGetErrorName(cudaError_t e) { return error_of(e).runtime; }
const char* cudaGetErrorString(cudaError_t e) { return text_of(e); }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = settings.driver, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* number) { return *number = settings.devices, (cudaError_t)ready(); }
cudaError_t cudaGetDevice(int* number) { return *number = device, (cudaError_t)ready(); }
cudaError_t cudaSetDevice(int number) {
    if (int error = ready()) return (cudaError_t)error;
    if (number < 0 || number >= settings.devices) {
        return (cudaError_t)refuse(cudaErrorInvalidDevice, "device %d of %ld", number, settings.devices);
    }
    make_context();
    return device = number, cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int number) {
    if (int error = ready()) return (cudaError_t)error;
    if (number < 0 || number >= settings.devices) return (cudaError_t)refuse(cudaErrorInvalidDevice, "%d", number);
    const Model& m = model();
    memset(p, 0, sizeof *p);
    strncpy(p->name, m.name, sizeof p->name - 1);
    p->major = m.major;
    p->minor = m.minor;
    p->multiProcessorCount = m.multiprocessors;
    p->totalGlobalMem = (size_t)settings.memory << 20;
    p->l2CacheSize = m.l2_bytes;
    p->warpSize = 32;
    p->maxThreadsPerBlock = MAX_THREADS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
    p->sharedMemPerBlock = DEFAULT_SHARED;
    p->sharedMemPerBlockOptin = m.shared_per_block;
    p->sharedMemPerMultiprocessor = m.shared_per_multiprocessor;
    p->reservedSharedMemPerBlock = RESERVED_SHARED;
    p->cooperativeLaunch = p->unifiedAddressing = p->concurrentKernels = 1;
    p->pciBusID = number + 1;
    const int block[3] = {1024, 1024, 64}, grid[3] = {2147483647, 65535, 65535};
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = block[i];
        p->maxGridSize[i] = grid[i];
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
    cudaDeviceProp p;
    if (cudaError_t error = cudaGetDeviceProperties(&p, number)) return error;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = p.reservedSharedMemPerBlock; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
        case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        case cudaDevAttrClockRate: *value = 1980000; break;
        case cudaDevAttrMemoryClockRate: *value = 2619000; break;
        case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        case cudaDevAttrUnifiedAddressing: *value = 1; break;
        case cudaDevAttrClusterLaunch: *value = p.major >= 9; break;
        // Features that it does not have, or that no caller relies on.
        case cudaDevAttrMemoryPoolsSupported: case cudaDevAttrManagedMemory: case cudaDevAttrKernelExecTimeout:
        case cudaDevAttrComputeMode: case cudaDevAttrGpuOverlap: case cudaDevAttrMaxTexture1DLinearWidth:
        case cudaDevAttrSingleToDoublePrecisionPerfRatio: case cudaDevAttrPageableMemoryAccess: *value = 0; break;
        default: return (cudaError_t)refuse(cudaErrorNotSupported, "device attribute %d", (int)attribute);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }

}
