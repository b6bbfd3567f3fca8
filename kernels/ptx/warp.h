// Communication among the 32 threads of a warp: shuffles, votes, and the warp's own barrier.
//
// All take the full mask: every thread of a warp calls them together. Only sync_warp() orders
// memory; a shuffle or a vote does not, although all threads meet there.
#pragma once

#include "shim.h"

namespace ptx {

constexpr uint32_t kFullMask = 0xffffffffu;

PFC_DEVICE uint32_t lane() { return threadIdx.x % 32; }
PFC_DEVICE uint32_t warp() { return threadIdx.x / 32; }

#ifdef __CUDACC__

#define PFC_SHUFFLES(T)                                                             \
    PFC_DEVICE T shuffle_xor(T v, int mask) {                                       \
        return __shfl_xor_sync(kFullMask, v, mask);                                 \
    }                                                                               \
    PFC_DEVICE T shuffle(T v, int lane) { return __shfl_sync(kFullMask, v, lane); } \
    PFC_DEVICE T shuffle_up(T v, unsigned delta) { return __shfl_up_sync(kFullMask, v, delta); }
PFC_SHUFFLES(float)
PFC_SHUFFLES(double)
PFC_SHUFFLES(uint32_t)
PFC_SHUFFLES(int32_t)
#undef PFC_SHUFFLES
// uint64_t is unsigned long under nvcc; the shuffles take unsigned long long.
PFC_DEVICE uint64_t shuffle_xor(uint64_t v, int mask) {
    return __shfl_xor_sync(kFullMask, (unsigned long long)v, mask);
}
PFC_DEVICE uint64_t shuffle(uint64_t v, int lane) {
    return __shfl_sync(kFullMask, (unsigned long long)v, lane);
}
PFC_DEVICE uint64_t shuffle_up(uint64_t v, unsigned delta) {
    return __shfl_up_sync(kFullMask, (unsigned long long)v, delta);
}

// Bit i: the value of lane i.
PFC_DEVICE uint32_t ballot(bool value) { return __ballot_sync(kFullMask, value); }
PFC_DEVICE bool any(bool value) { return __any_sync(kFullMask, value) != 0; }
PFC_DEVICE void sync_warp() { __syncwarp(); }

#else

template <class T>
PFC_DEVICE T shuffle_of(simt::Shuffle kind, T v, uint32_t amount) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &v, sizeof v);
    bits = simt::shuffle(kind, bits, amount);
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}

#define PFC_SHUFFLES(T)                                                                          \
    PFC_DEVICE T shuffle_xor(T v, int mask) { return shuffle_of(simt::Shuffle::kXor, v, mask); } \
    PFC_DEVICE T shuffle(T v, int lane) { return shuffle_of(simt::Shuffle::kIndex, v, lane); }   \
    PFC_DEVICE T shuffle_up(T v, unsigned delta) {                                               \
        return shuffle_of(simt::Shuffle::kUp, v, delta);                                         \
    }
PFC_SHUFFLES(float)
PFC_SHUFFLES(double)
PFC_SHUFFLES(uint32_t)
PFC_SHUFFLES(int32_t)
PFC_SHUFFLES(uint64_t)
#undef PFC_SHUFFLES

// Bit i: the value of lane i.
PFC_DEVICE uint32_t ballot(bool value) { return simt::ballot(value); }
PFC_DEVICE bool any(bool value) { return simt::ballot(value) != 0; }
PFC_DEVICE void sync_warp() { simt::sync_warp(); }

#endif

}  // namespace ptx
