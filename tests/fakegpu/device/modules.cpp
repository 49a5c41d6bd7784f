// Modules: the kernels of a cubin or of a PTX text, and the properties of each: registers, launch bounds, shared memory,
// parameters, cluster. A cubin has them in its ELF sections.

#include "device.h"

#include <elf.h>

#include <algorithm>
#include <cstring>
#include <sstream>

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

static Kernel& add_kernel(Module* module, const std::string& name) {
    auto& k = module->kernels[name] = std::make_unique<Kernel>();
    k->name = name;
    k->module = module;
    k->device = current_device();
    k->most_threads = MAX_THREADS;
    return *k;
}

// Read the numbers that follow a directive: "256, 1, 1". Without it they stay as they are.
static void read_numbers(const std::string& text, const char* directive, std::vector<int>& numbers) {
    const size_t at = text.find(directive);
    if (at == std::string::npos) return;
    std::istringstream rest(text.substr(at + strlen(directive)));
    char comma;
    for (int& number : numbers) if (!(rest >> number >> comma)) break;
}

// Return the size of a variable such as ".align 8 .b8 name[280]" or ".u64 name", and where it begins after `offset`.
static Parameter read_variable(const std::string& text, int offset) {
    std::vector<int> alignment = {1}, elements = {0};
    read_numbers(text, ".align ", alignment);
    read_numbers(text, "[", elements);
    size_t type = text.find('.');  // a letter and the number of bits
    while (!isdigit(text[type + 2])) type = text.find('.', type + 1);
    const int width = atoi(text.c_str() + type + 2) / 8;
    if (elements[0] == 0) alignment[0] = width, elements[0] = 1;
    return {(offset + alignment[0] - 1) / alignment[0] * alignment[0], width * elements[0]};
}

// A driver compiles PTX to machine code. Here a kernel has as many registers as its launch bounds allow, and the static
// shared memory of its whole module.
static int load_ptx(Module* module, const std::string& text) {
    std::vector<int> capability = {0};
    read_numbers(text, ".target sm_", capability);
    const int own = model().major * 10 + model().minor;
    if (capability[0] > own) return refuse(209, "PTX for sm_%d on sm_%d", capability[0], own);
    int static_shared = 0;
    for (size_t at = 0; (at = text.find(".shared .align", at)) != std::string::npos; at++) {
        const bool external = text.compare(at - std::min<size_t>(at, 8), 8, ".extern ") == 0;
        const size_t from = at + strlen(".shared ");
        if (external) continue;
        const Parameter variable = read_variable(text.substr(from, text.find(';', from) - from), static_shared);
        static_shared = variable.offset + variable.size;
    }
    for (size_t at = 0; (at = text.find(".entry ", at)) != std::string::npos; at++) {
        const size_t open = text.find('(', at), close = text.find(')', open), body = text.find('{', close);
        Kernel& k = add_kernel(module, text.substr(at + 7, open - at - 7));
        for (size_t from = open; (from = text.find(".param ", from)) < close; from++) {
            const std::string variable = text.substr(from + 7, std::min(text.find(',', from), close) - from - 7);
            k.parameters.push_back(read_variable(variable, k.parameter_bytes));
            k.parameter_bytes = k.parameters.back().offset + k.parameters.back().size;
        }
        const std::string bounds = text.substr(close, body - close);
        std::vector<int> threads = {MAX_THREADS, 1, 1}, blocks = {1}, cluster = {0, 0, 0};
        read_numbers(bounds, ".maxntid ", threads);
        read_numbers(bounds, ".minnctapersm ", blocks);
        read_numbers(bounds, ".reqnctapercluster ", cluster);
        k.most_threads = threads[0] * threads[1] * threads[2];
        std::copy(cluster.begin(), cluster.end(), k.cluster);
        k.registers = std::min(255, REGISTERS / (k.most_threads * blocks[0]) / 8 * 8);
        k.static_shared = static_shared;
    }
    return 0;
}

static int load(Module* module, const unsigned char* image) {
    const std::string text((const char*)image, strnlen((const char*)image, 1000));
    if (text.find(".version ") != std::string::npos) return load_ptx(module, (const char*)image);
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
    each(".text.", [&](const Elf64_Shdr&, const std::string& n) { add_kernel(module, n); });
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
