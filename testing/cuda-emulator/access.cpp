// Device memory: bounds, alignment and cells; shared memory: likewise; other addresses are refused
// where they are not of a module with kernels, because a GPU has no host memory there.
#include "access.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "findings.h"

namespace simt {

uint64_t access_count;

namespace {

struct Module {
    uintptr_t begin, end;
};

// A function's static, so that it is there when the first registration comes.
std::vector<Module>& modules() {
    static std::vector<Module> all;
    return all;
}

const char* const kVerbs[] = {"read", "write", "atomic operation"};

// Where in the sources that is, innermost first, by binutils' addr2line: "" where there is none.
// Not when a test provokes findings by the hundred.
std::string source_lines(const char* file, size_t offset) {
    if (is_quiet()) return "";
    FILE* pipe = popen(format("addr2line -s -i -e '%s' 0x%zx 2>/dev/null", file, offset).c_str(),
        "r");
    if (!pipe) return "";
    std::string text;
    char line[256];
    while (fgets(line, sizeof line, pipe)) {
        if (line[0] == '?') continue;
        line[strcspn(line, " \n")] = 0;
        text += (text.empty() ? "" : " in ") + std::string(line);
    }
    pclose(pipe);
    return text;
}

std::string call_site(const void* caller) {
    Dl_info info;
    if (!dladdr(caller, &info) || !info.dli_fbase) return "";
    const size_t offset = reinterpret_cast<uintptr_t>(caller) -
                          reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
    const std::string lines = source_lines(info.dli_fname, offset);
    if (!lines.empty()) return " (" + lines + ")";
    const char* file = info.dli_fname;
    for (const char* c = info.dli_fname; *c; ++c)
        if (*c == '/') file = c + 1;
    return format(" (at %s+0x%zx)", file, offset);
}

std::string name_memory(uintptr_t at) {
    if (is_shared(at))
        return format("byte %zd of the %zu of shared memory", ssize_t(at - shared_memory.begin),
                      shared_memory.size);
    return describe(at);
}

[[noreturn]] void refuse(const char* what, uintptr_t at, size_t size, Access access,
                         const void* caller) {
    fault(format("%s: %zu-byte %s of %s%s", what, size, kVerbs[int(access)],
        name_memory(at).c_str(),
                 call_site(caller).c_str()));
}

std::string other_access() {
    const Stamp s = conflict.other;
    const char* verb = conflict.other_writes ? "written" : "read";
    if ((s ^ accessor.stamp) >> 42 != 0)
        return format("%s by operation %u of a stream that this one need not come after", verb,
                      stamp_operation(s));
    return format("%s by thread %u of block %u with no barrier between", verb, stamp_thread(s),
                  stamp_block(s));
}

void check_cells(Cell* cell, uintptr_t at, size_t size, Access access, const void* caller) {
    if (!cells_checked) return;
    const uintptr_t end = at + size;
    for (uintptr_t word = at & ~uintptr_t(3); word < end; word += 4, ++cell) {
        uint8_t bytes = 15;
        if (word < at) bytes &= uint8_t(15 << (at - word));
        if (word + 4 > end) bytes &= uint8_t(15 >> (word + 4 - end));
        conflict = {};
        const char* wrong = touch(*cell, bytes, access);
        if (!wrong) continue;
        std::string text = wrong;
        if (conflict.other) text += ", " + other_access();
        refuse(text.c_str(), word, size, access, caller);
    }
}

bool is_module(uintptr_t at) {
    for (const Module& m : modules())
        if (at - m.begin < m.end - m.begin) return true;
    return false;
}

}  // namespace

void check_memory(uintptr_t at, size_t size, Access access, bool aligned, const void* caller) {
    if (!current_thread()) return;  // a registration, when the library is loaded
    if (is_device(at)) {
        if (!is_allocated(at, size)) refuse("out of bounds", at, size, access, caller);
        if (aligned && at % size != 0) refuse("misaligned", at, size, access, caller);
        check_cells(&device_cell(at), at, size, access, caller);
    } else if (is_shared(at)) {
        const SharedMemory& s = shared_memory;
        if (at < s.begin || at + size > s.begin + s.size)
            refuse("out of bounds", at, size, access, caller);
        if (aligned && at % size != 0) refuse("misaligned", at, size, access, caller);
        check_cells(s.cells + (at - s.range_begin) / 4, at, size, access, caller);
    } else if (current_thread() && !is_module(at)) {
        refuse("host memory in a kernel", at, size, access, caller);
    }
}

void note_module(const void* function) {
    if (is_module(reinterpret_cast<uintptr_t>(function))) return;
    auto visit = [](dl_phdr_info* info, size_t, void* data) {
        const uintptr_t function = reinterpret_cast<uintptr_t>(data);
        Module found{~uintptr_t(0), 0};
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            if (begin < found.begin) found.begin = begin;
            if (begin + header.p_memsz > found.end) found.end = begin + header.p_memsz;
        }
        if (function - found.begin >= found.end - found.begin) return 0;
        modules().push_back(found);
        return 1;
    };
    dl_iterate_phdr(visit, const_cast<void*>(function));
    // The emulator's own variables (threadIdx) are in another module where a test brings kernels.
    Dl_info info;
    static bool own = false;
    if (own || !dladdr(reinterpret_cast<void*>(&note_module), &info)) return;
    own = true;
    note_module(reinterpret_cast<void*>(&note_module));
}

}  // namespace simt
