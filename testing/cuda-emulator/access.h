// A kernel's access to memory: where it goes, whether it may, and the shadow's word on it.
#pragma once

#include "block.h"
#include "fiber.h"
#include "memory.h"

namespace simt {

// The rules for device and shared memory; for the rest, which is a finding unless it is the
// program's own. `caller` is an address in the kernel, for the text.
void check_memory(uintptr_t at, size_t size, Access access, bool aligned, const void* caller);

// How many accesses there were so far, those to locals aside.
extern uint64_t access_count;

// Locals are by far the most frequent: they are on the threads' stacks.
inline void check_access(uintptr_t at, size_t size, Access access, bool aligned,
    const void* caller) {
    if (at - stacks.begin < stacks.span) return;
    ++access_count;
    check_memory(at, size, access, aligned, caller);
}

inline bool is_shared(uintptr_t at) {
    return at - shared_memory.range_begin < shared_memory.range_span;
}

// The program's own constants and globals: all that is loaded of the modules that register kernels.
void note_module(const void* function);

}  // namespace simt
