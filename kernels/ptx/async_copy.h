// cp.async: 16 bytes from global to shared memory that arrive later.
//
// A thread's copies since its last commit are a group. copy_async_wait<N>() returns when at most
// the N youngest groups of *this thread* are still under way; other threads see the bytes only
// after a barrier that follows the wait.
#pragma once

#include "shim.h"

namespace ptx {

// What the second-level cache is told of the line that a copy reads. A hint: no result depends on it.
enum class Eviction { kNormal, kFirst, kLast };

#ifdef __CUDACC__

// Not valid: the 16 bytes become 0 and nothing is read.
PFC_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(shared))),
                   "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

template <Eviction kEviction>
PFC_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    if constexpr (kEviction == Eviction::kNormal) {
        copy_async_16(shared, global, valid);
    } else {
        uint64_t policy;
        if constexpr (kEviction == Eviction::kFirst) {
            asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        } else {
            asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
        }
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                     :
                     : "r"(uint32_t(__cvta_generic_to_shared(shared))),
                       "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0), "l"(policy)
                     : "memory");
    }
}

PFC_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

template <int N>
PFC_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#else

// Not valid: the 16 bytes become 0 and nothing is read.
PFC_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    simt::copy_async_16(shared, global, valid);
}

template <Eviction>
PFC_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    copy_async_16(shared, global, valid);
}

PFC_DEVICE void copy_async_commit() { simt::copy_async_commit(); }

template <int N>
PFC_DEVICE void copy_async_wait() {
    simt::copy_async_wait(N);
}

#endif

}  // namespace ptx
