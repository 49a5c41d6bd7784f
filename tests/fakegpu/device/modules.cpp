// Modules: the kernels of a cubin, and the properties of each in its ELF sections: registers, launch bounds, shared
// memory, parameters, cluster.

#include "device.h"

#include <elf.h>

#include <algorithm>
#include <cstring>

namespace fake {

struct Module { std::map<std::string, std::unique_ptr<Kernel>> kernels; };

// Attributes in .nv.info: one byte for the format, one for the number, two for a value or for the length of the data
// that follows.
constexpr int INLINE_VALUE = 3, WITH_DATA = 4;
constexpr int MAX_THREADS_OF_BLOCK = 0x05, PARAMETER = 0x17, PARAMETER_BYTES = 0x19, REGISTER_COUNT = 0x2f,
              BLOCKS_OF_CLUSTER = 0x3d;

template <class F> static void each_attribute(const unsigned char* at, const unsigned char* end, F found) {
    while (at + 4 <= end) {
        const int format = at[0], number = at[1], value = at[2] | at[3] << 8;
        found(format, number, value, (const uint32_t*)(at + 4));
        at += 4 + (format == WITH_DATA ? value : 0);
    }
}

static void read_kernel(Kernel& k, const unsigned char* from, const unsigned char* to) {
    each_attribute(from, to, [&](int format, int number, int value, const uint32_t* data) {
        if (format == INLINE_VALUE && number == PARAMETER_BYTES) k.parameter_bytes = value;
        if (format != WITH_DATA) return;
        if (number == MAX_THREADS_OF_BLOCK) k.most_threads = data[0] * data[1] * data[2];
        if (number == BLOCKS_OF_CLUSTER) memcpy(k.cluster, data, sizeof k.cluster);
        if (number != PARAMETER) return;
        const unsigned ordinal = data[1] & 0xffff;
        if (k.parameters.size() <= ordinal) k.parameters.resize(ordinal + 1);
        k.parameters[ordinal] = {(int)(data[1] >> 16), (int)(data[2] >> 18)};
    });
}

static int load(Module* module, const unsigned char* image) {
    const Elf64_Ehdr& header = *(const Elf64_Ehdr*)image;
    if (memcmp(image, ELFMAG, SELFMAG) != 0 || header.e_machine != 190) return refuse(200, "it is not a cubin");
    const int capability = header.e_flags >> 8 & 0xff, own = model().major * 10 + model().minor;
    if (capability / 10 != own / 10 || capability > own) return refuse(209, "a cubin for sm_%d on sm_%d", capability, own);
    const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header.e_shoff);
    const auto name = [&](const Elf64_Shdr& s) {
        return std::string((const char*)image + sections[header.e_shstrndx].sh_offset + s.sh_name);
    };
    const auto each = [&](const std::string& prefix, auto found) {
        for (int i = 0; i < header.e_shnum; i++) {
            const std::string n = name(sections[i]);
            if (n.compare(0, prefix.size(), prefix) == 0) found(sections[i], n.substr(prefix.size()));
        }
    };
    const auto kernel = [&](const std::string& n) {
        auto found = module->kernels.find(n);
        return found == module->kernels.end() ? nullptr : found->second.get();
    };
    each(".text.", [&](const Elf64_Shdr&, const std::string& n) {
        auto& k = module->kernels[n] = std::make_unique<Kernel>();
        k->name = n;
        k->module = module;
        k->device = current_device();
        k->most_threads = MAX_THREADS;
    });
    each(".nv.info.", [&](const Elf64_Shdr& s, const std::string& n) {
        const unsigned char* from = image + s.sh_offset;
        if (Kernel* k = kernel(n)) read_kernel(*k, from, from + s.sh_size);
    });
    each(".nv.shared.", [&](const Elf64_Shdr& s, const std::string& n) {
        // From sm_90 on the section includes the memory that the system reserves.
        const int reserved = capability >= 90 ? RESERVED_SHARED : 0;
        if (Kernel* k = kernel(n)) k->static_shared = std::max((int)s.sh_size - reserved, 0);
    });
    // Registers are listed for the whole module, by symbol.
    each(".symtab", [&](const Elf64_Shdr& table, const std::string&) {
        const Elf64_Sym* symbols = (const Elf64_Sym*)(image + table.sh_offset);
        const char* strings = (const char*)image + sections[table.sh_link].sh_offset;
        each(".nv.info", [&](const Elf64_Shdr& s, const std::string& rest) {
            const unsigned char* from = image + s.sh_offset;
            if (rest.empty()) each_attribute(from, from + s.sh_size, [&](int, int number, int, const uint32_t* data) {
                if (number != REGISTER_COUNT) return;
                if (Kernel* k = kernel(strings + symbols[data[0]].st_name)) k->registers = data[1];
            });
        });
    });
    return 0;
}

}  // namespace fake

using namespace fake;

extern "C" {

// For the launch hook: the module of a kernel, its name, and the size and offset of a parameter (0: no such parameter).
void* fakegpu_module(Kernel* k) { return k->module; }
const char* fakegpu_name(Kernel* k) { return k->name.c_str(); }
int fakegpu_parameter(Kernel* k, unsigned i, int* offset) {
    if (i >= k->parameters.size()) return 0;
    *offset = k->parameters[i].offset;
    return k->parameters[i].size;
}
// The name of a module's i-th kernel; null after the last one.
const char* fakegpu_kernel(Module* module, unsigned i) {
    if (i >= module->kernels.size()) return nullptr;
    return std::next(module->kernels.begin(), i)->first.c_str();
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    count(MODULES);
    auto made = std::make_unique<Module>();
    if (int error = need_context()) return (CUresult)error;
    if (int error = may_not_wait("cuModuleLoadData")) return (CUresult)error;
    if (int error = load(made.get(), (const unsigned char*)image)) return (CUresult)error;
    *module = (CUmodule)made.release();
    return CUDA_SUCCESS;
}

// Modules are kept, since a launch hook or a graph may still refer to their kernels.
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    const auto& kernels = ((Module*)module)->kernels;
    const auto found = kernels.find(name);
    if (found == kernels.end()) return (CUresult)refuse(CUDA_ERROR_NOT_FOUND, "the module has no kernel %s", name);
    *function = (CUfunction)found->second.get();
    return CUDA_SUCCESS;
}

}
