// The wanted-th smallest of many 32-bit keys, by one CTA: radix select, by histograms of 12 bits in
// shared memory. Two of them do for a window of 24 bits, three for all keys.
#pragma once

#include "integers.h"
#include "ptx/atomic.h"
#include "ptx/shim.h"
#include "reduce.h"

constexpr uint32_t kBins = 4096;

// The keys from `low` to `last`.
struct Window {
    uint32_t low, last;
};

// What threshold_of finds.
struct Threshold {
    uint32_t key;
    uint32_t ties;   // how many of the wanted negatives have this very key; 0: there are too few
    uint32_t equal;  // how many negatives have it
};

// The wanted-th smallest key of a window. `each(add)` calls add(key, count) for the keys that this
// thread has, the same at every call; those outside the window do not matter. `bins`: kBins words
// of shared memory, `found`: three.
template <class Each>
PFC_DEVICE Threshold threshold_of(Window window, uint32_t wanted, uint32_t* bins, uint32_t* found,
                                  void* shared, Each each) {
    uint32_t low = window.low, width = window.last - window.low, shift = 0;
    while (width >> shift >= kBins) shift++;
    for (;;) {
        for (uint32_t bin = threadIdx.x; bin < kBins; bin += blockDim.x) bins[bin] = 0;
        __syncthreads();
        each([&](uint32_t key, uint32_t count) {
            if (key - low <= width) ptx::atomic_add(&bins[(key - low) >> shift], count);
        });
        __syncthreads();
        const uint32_t own = ceil_div(kBins, blockDim.x);
        const uint32_t begin = smaller(threadIdx.x * own, kBins), end = smaller(begin + own, kBins);
        uint32_t sum = 0, total;
        for (uint32_t bin = begin; bin < end; bin++) sum += bins[bin];
        uint32_t before = block_scan(sum, total, shared);
        if (total < wanted) return Threshold{0, 0, 0};
        if (before < wanted && wanted - before <= sum) {
            uint32_t bin = begin;
            for (; wanted - before > bins[bin]; bin++) before += bins[bin];
            found[0] = bin;
            found[1] = wanted - before;
            found[2] = bins[bin];
        }
        __syncthreads();
        low += found[0] << shift;
        wanted = found[1];
        if (shift == 0) return Threshold{low, wanted, found[2]};
        width = (1u << shift) - 1;
        shift = shift > 12 ? shift - 12 : 0;
    }
}
