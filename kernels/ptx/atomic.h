// Atomic operations on integers in shared or global memory. They return the value before. Floats
// have none: a sum's order is fixed by shape.
#pragma once

#include "shim.h"

namespace ptx {

#ifdef __CUDACC__

PFC_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t v) { return atomicAdd(at, v); }
PFC_DEVICE uint64_t atomic_add(uint64_t* at, uint64_t v) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(at), (unsigned long long)v);
}
PFC_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t v) { return atomicOr(at, v); }
PFC_DEVICE uint32_t atomic_min(uint32_t* at, uint32_t v) { return atomicMin(at, v); }

#else

PFC_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t v) { return simt::atomic_add(at, v); }
PFC_DEVICE uint64_t atomic_add(uint64_t* at, uint64_t v) { return simt::atomic_add(at, v); }
PFC_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t v) { return simt::atomic_or(at, v); }
PFC_DEVICE uint32_t atomic_min(uint32_t* at, uint32_t v) { return simt::atomic_min(at, v); }

#endif

}  // namespace ptx
