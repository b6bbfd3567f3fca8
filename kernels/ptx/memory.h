// Values that move as one access of 16 or 8 bytes, and a hint that fetches a line into L2.
#pragma once

#include "shim.h"

namespace ptx {

struct alignas(16) Float4 {
    float x, y, z, w;
};

struct alignas(16) Word4 {
    uint32_t x, y, z, w;
};

struct alignas(8) Float2 {
    float x, y;
};

struct alignas(8) Word2 {
    uint32_t x, y;
};

#ifdef __CUDACC__

PFC_DEVICE void prefetch_l2(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(at)));
}

#else

PFC_DEVICE void prefetch_l2(const void* at) { simt::prefetch(at); }

#endif

}  // namespace ptx
