// Device memory, in an address range of its own, and pinned host memory.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

#include "shadow.h"

namespace simt {

struct Allocation {
    uintptr_t base;
    size_t size;
    bool on_host = false;  // pinned memory that kernels reach
};

// The range of all device addresses, whether allocated or not.
struct DeviceRange {
    uintptr_t begin = 0;
    size_t span = 0;
    Cell* cells = nullptr;  // of each 4 bytes
};
extern DeviceRange device_range;

inline bool is_device(uintptr_t at) { return at - device_range.begin < device_range.span; }
inline Cell& device_cell(uintptr_t at) {
    return device_range.cells[(at - device_range.begin) / 4];
}

// 0 where there is not so much left.
uintptr_t allocate(size_t size);
bool release(uintptr_t base);
// The allocation that holds `at`, in the device's memory or mapped, or null.
const Allocation* find_allocation(uintptr_t at);
size_t memory_total();
size_t memory_free();

void* pin(size_t size);
// The same where kernels reach it too, at the same address.
void* pin_mapped(size_t size);
void unpin(void* at);
// Of the pinned allocation that begins at `at`; 0: there is none.
size_t pinned_size(void* at);
bool is_pinned(const void* at);
// The caller's own memory, pinned as long as it is registered. False: some of it is pinned already.
bool register_host(void* at, size_t size);
// The size of what was registered at `at`; 0: nothing was.
size_t registered_size(void* at);
void unregister_host(void* at);
// Whether `at` is in registered memory, which another process may have too.
bool is_registered(uintptr_t at);

// Whether all of [at, at + size) is in one allocation.
bool is_allocated(uintptr_t at, size_t size);
// What an address is, for the text of a finding.
std::string describe(uintptr_t at);

// Copies and fills, as operations of a stream: with their effect on the shadow. What was never
// written comes to the host as bytes 0xff.
void copy_in(uintptr_t to, const void* from, size_t size);
void copy_out(void* to, uintptr_t from, size_t size);
void copy_within(uintptr_t to, uintptr_t from, size_t size);
void fill(uintptr_t to, const void* pattern, size_t pattern_size, size_t count);

}  // namespace simt
