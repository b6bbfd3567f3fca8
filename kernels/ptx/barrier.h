// A barrier of some warps of a block: `threads` threads (a multiple of 32) of the same id (1 to 15)
// meet and see each other's writes. Id 0 is __syncthreads().
#pragma once

#include "shim.h"

namespace ptx {

#ifdef __CUDACC__

PFC_DEVICE void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

#else

PFC_DEVICE void named_barrier(int id, int threads) { simt::named_barrier(id, threads); }

#endif

}  // namespace ptx
