// Allocations lie at multiples of 512 bytes with at least 512 bytes between them, and addresses are
// not given out again soon, so that an access past an end or after a free meets no other
// allocation.
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>

#include "driver.h"
#include "findings.h"
#include "simt.h"

namespace simt {

DeviceRange device_range;

namespace {

constexpr size_t kRange = size_t(16) << 30, kGranule = 512;

std::map<uintptr_t, Allocation> live;
struct Pinned {
    size_t size;
    bool registered;  // the caller's
};
std::map<uintptr_t, Pinned> pinned;
// The allocation at each granule, so that a look-up is one load.
const Allocation** at_granule;
uintptr_t cursor;
size_t limit = size_t(1) << 30, used;

void* map_lazily(size_t size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        perror("simt: address range");
        abort();
    }
    return at;
}

void map_range() {
    device_range.begin = reinterpret_cast<uintptr_t>(map_lazily(kRange));
    device_range.cells = static_cast<Cell*>(map_lazily(kRange / 4 * sizeof(Cell)));
    at_granule = static_cast<const Allocation**>(map_lazily(kRange / kGranule * sizeof(void*)));
    device_range.span = kRange;
    cursor = device_range.begin + kGranule;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

size_t granule(uintptr_t at) { return (at - device_range.begin) / kGranule; }

const std::pair<const uintptr_t, Pinned>* find_pinned(uintptr_t at) {
    auto next = pinned.upper_bound(at);
    if (next == pinned.begin()) return nullptr;
    --next;
    return at - next->first < next->second.size ? &*next : nullptr;
}

// Where `size` bytes are free, from the cursor on; 0: nowhere.
uintptr_t find_place(size_t size) {
    const uintptr_t end = device_range.begin + device_range.span;
    for (int turn = 0; turn < 2; ++turn) {
        while (cursor + size <= end) {
            auto next = live.lower_bound(cursor);
            if (next != live.begin()) {
                const Allocation& previous = std::prev(next)->second;
                const uintptr_t after = previous.base + round_up(previous.size, kGranule)
                    + kGranule;
                if (after > cursor) {
                    cursor = after;
                    continue;
                }
            }
            if (next == live.end() || cursor + size + kGranule <= next->first) return cursor;
            cursor = next->first + round_up(next->second.size, kGranule) + kGranule;
        }
        cursor = device_range.begin + kGranule;
    }
    return 0;
}

void check_bulk(uintptr_t at, size_t size, Access access) {
    if (!cells_checked) return;
    for (uintptr_t word = at & ~uintptr_t(3); word < at + size; word += 4) {
        uint8_t bytes = 15;
        if (word < at) bytes &= uint8_t(15 << (at - word));
        if (word + 4 > at + size) bytes &= uint8_t(15 >> (word + 4 - at - size));
        Cell& cell = device_cell(word);
        const uint8_t written = cell.written;
        // A copy may carry what was never written: only a kernel that computes with it is at fault.
        if (access == Access::kRead) cell.written = 15;
        const char* wrong = touch(cell, bytes, access);
        if (access == Access::kRead) cell.written = written;
        if (!wrong) continue;
        finding(format("%s between a copy or fill and operation %u of a stream, at %s", wrong,
                       stamp_operation(conflict.other), describe(word).c_str()));
        return;
    }
}

// Calls `f` with the number of each byte of [at, at + size) that was never written.
template <class F>
void for_unwritten(uintptr_t at, size_t size, F f) {
    if (!cells_checked) return;
    for (uintptr_t word = at & ~uintptr_t(3); word < at + size; word += 4) {
        const uint8_t written = device_cell(word).written;
        if (written == 15) continue;
        for (uintptr_t byte = word; byte < word + 4; ++byte)
            if (byte >= at && byte < at + size && !(written >> (byte & 3) & 1)) f(byte - at);
    }
}

}  // namespace

namespace {

uintptr_t place(size_t size, bool on_host) {
    if (device_range.begin == 0) map_range();
    const uintptr_t base = find_place(round_up(size, kGranule));
    if (base == 0) return 0;
    cursor = base + round_up(size, kGranule) + kGranule;
    if (!on_host) used += size;
    Allocation& made = live[base];
    made = {base, size, on_host};
    for (size_t g = granule(base); g <= granule(base + size - 1); ++g) at_granule[g] = &made;
    // Large ones are left to copy_out's poison: writing them would take real memory.
    if (size <= size_t(4) << 20) memset(reinterpret_cast<void*>(base), 0xff, size);
    return base;
}

}  // namespace

uintptr_t allocate(size_t size) {
    return size > limit || used + size > limit ? 0 : place(size, false);
}

bool release(uintptr_t base) {
    auto found = live.find(base);
    if (found == live.end()) return false;
    const size_t size = found->second.size;
    if (!found->second.on_host) used -= size;
    for (size_t g = granule(base); g <= granule(base + size - 1); ++g) at_granule[g] = nullptr;
    live.erase(found);
    // A granule's shadow is a page: given back, it is zero again.
    madvise(&device_cell(base), round_up(size, kGranule) / 4 * sizeof(Cell), MADV_DONTNEED);
    const uintptr_t begin = round_up(base, 4096), end = (base + size) & ~uintptr_t(4095);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    return true;
}

const Allocation* find_allocation(uintptr_t at) {
    if (!is_device(at)) return nullptr;
    const Allocation* found = at_granule[granule(at)];
    return found && at - found->base < found->size ? found : nullptr;
}

bool is_allocated(uintptr_t at, size_t size) {
    const Allocation* found = find_allocation(at);
    return found && at + size <= found->base + found->size;
}

size_t memory_total() { return limit; }
size_t memory_free() { return limit > used ? limit - used : 0; }

void* pin(size_t size) {
    void* at = nullptr;
    if (posix_memalign(&at, 4096, size) != 0) return nullptr;
    memset(at, 0xff, size);
    pinned[reinterpret_cast<uintptr_t>(at)] = {size, false};
    return at;
}

void* pin_mapped(size_t size) {
    const uintptr_t at = place(size, true);
    if (at != 0) pinned[at] = {size, false};
    return reinterpret_cast<void*>(at);
}

void unpin(void* at) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(at);
    pinned.erase(base);
    if (is_device(base)) release(base);
    else free(at);
}

size_t pinned_size(void* at) {
    auto found = pinned.find(reinterpret_cast<uintptr_t>(at));
    return found == pinned.end() || found->second.registered ? 0 : found->second.size;
}

bool is_pinned(const void* at) {
    return find_pinned(reinterpret_cast<uintptr_t>(at));
}

bool register_host(void* at, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(at);
    const auto next = pinned.lower_bound(begin);
    if (find_pinned(begin) || (next != pinned.end() && next->first - begin < size)) return false;
    pinned[begin] = {size, true};
    return true;
}

size_t registered_size(void* at) {
    auto found = pinned.find(reinterpret_cast<uintptr_t>(at));
    return found == pinned.end() || !found->second.registered ? 0 : found->second.size;
}

void unregister_host(void* at) { pinned.erase(reinterpret_cast<uintptr_t>(at)); }

bool is_registered(uintptr_t at) {
    const auto* found = find_pinned(at);
    return found && found->second.registered;
}

std::string describe(uintptr_t at) {
    const unsigned long long address = at;
    if (!is_device(at)) return format("host address 0x%llx", address);
    if (const Allocation* in = find_allocation(at))
        return format("byte %zu of the %zu of %s memory at 0x%llx", size_t(at - in->base), in->size,
                      in->on_host ? "mapped host" : "device", (unsigned long long)in->base);
    auto next = live.upper_bound(at);
    if (next == live.begin()) return format("device address 0x%llx, in no allocation", address);
    const Allocation& below = std::prev(next)->second;
    return format("device address 0x%llx, in no allocation: %zu bytes past the %zu at 0x%llx",
        address,
                  size_t(at - below.base - below.size), below.size, (unsigned long long)below.base);
}

void copy_in(uintptr_t to, const void* from, size_t size) {
    check_bulk(to, size, Access::kWrite);
    memcpy(reinterpret_cast<void*>(to), from, size);
}

void copy_out(void* to, uintptr_t from, size_t size) {
    check_bulk(from, size, Access::kRead);
    memcpy(to, reinterpret_cast<void*>(from), size);
    for_unwritten(from, size, [=](size_t i) { static_cast<unsigned char*>(to)[i] = 0xff; });
}

void copy_within(uintptr_t to, uintptr_t from, size_t size) {
    check_bulk(from, size, Access::kRead);
    check_bulk(to, size, Access::kWrite);
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
    for_unwritten(from, size, [=](size_t i) {
        device_cell(to + i).written &= uint8_t(~(1 << ((to + i) & 3)));
    });
}

void fill(uintptr_t to, const void* pattern, size_t pattern_size, size_t count) {
    check_bulk(to, pattern_size * count, Access::kWrite);
    unsigned char* bytes = reinterpret_cast<unsigned char*>(to);
    if (pattern_size == 1) memset(bytes, *static_cast<const unsigned char*>(pattern), count);
    else
        for (size_t i = 0; i < count; ++i) memcpy(bytes + i * pattern_size, pattern, pattern_size);
}

}  // namespace simt

extern "C" void simt_memory(uint64_t bytes) {
    simt::Lock lock;
    simt::limit = bytes;
}
