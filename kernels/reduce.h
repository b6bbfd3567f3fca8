// Sums, minima and running sums over the threads of a warp and of a CTA.
//
// `shared` is scratch of kReduceBytes. All threads of the warp or the CTA take part; a CTA has a
// multiple of 32 threads, up to 1024. Integers add up to the same bits in any order. Doubles do
// not: their order depends on the number of threads alone.
#pragma once

#include "ptx/shim.h"
#include "ptx/warp.h"

constexpr uint32_t kReduceBytes = 256;  // 32 warps of 8 bytes

template <class T>
PFC_DEVICE T warp_sum(T value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
    return value;
}

PFC_DEVICE uint32_t warp_min(uint32_t value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = ptx::shuffle_xor(value, mask);
        value = other < value ? other : value;
    }
    return value;
}

// Sum of the values of lanes 0 to this one.
PFC_DEVICE uint32_t warp_scan(uint32_t value) {
#pragma unroll
    for (uint32_t delta = 1; delta < 32; delta *= 2) {
        const uint32_t below = ptx::shuffle_up(value, delta);
        if ((uint32_t)ptx::lane() >= delta) value += below;
    }
    return value;
}

// Sum of an integer over the CTA, in all threads.
template <class T>
PFC_DEVICE T block_sum(T value, void* shared) {
    T* const partial = (T*)shared;
    value = warp_sum(value);
    if (ptx::lane() == 0) partial[ptx::warp()] = value;
    __syncthreads();
    value = warp_sum((uint32_t)ptx::lane() < blockDim.x / 32 ? partial[ptx::lane()] : T(0));
    __syncthreads();
    return value;
}

// Sum of a double over the CTA, in all threads: the warps' sums are added in warp order.
PFC_DEVICE double block_sum(double value, void* shared) {
    double* const partial = (double*)shared;
    value = warp_sum(value);
    __syncthreads();  // threads may still be reading the previous sum
    if (ptx::lane() == 0) partial[ptx::warp()] = value;
    __syncthreads();
    double total = 0;
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
    return total;
}

// Least value of the CTA, in all threads.
PFC_DEVICE uint32_t block_min(uint32_t value, void* shared) {
    uint32_t* const partial = (uint32_t*)shared;
    value = warp_min(value);
    if (ptx::lane() == 0) partial[ptx::warp()] = value;
    __syncthreads();
    value =
        warp_min((uint32_t)ptx::lane() < blockDim.x / 32 ? partial[ptx::lane()] : 0xffffffffu);
    __syncthreads();
    return value;
}

// Sum of the values of the threads before this one; `total`: of all.
PFC_DEVICE uint32_t block_scan(uint32_t value, uint32_t& total, void* shared) {
    uint32_t* const partial = (uint32_t*)shared;
    const uint32_t inclusive = warp_scan(value);
    if (ptx::lane() == 31) partial[ptx::warp()] = inclusive;
    __syncthreads();
    // Every warp adds up the warps' sums for itself: cheaper than another barrier.
    const uint32_t warps =
        warp_scan((uint32_t)ptx::lane() < blockDim.x / 32 ? partial[ptx::lane()] : 0u);
    total = ptx::shuffle(warps, 31);
    const uint32_t before = ptx::shuffle(warps, (int)((ptx::warp() + 31) % 32));
    __syncthreads();
    return inclusive - value + (ptx::warp() == 0 ? 0u : before);
}

// Replaces values[0 .. count] with the sums of those before each, by one CTA; returns the sum of
// all. Other threads may read the results after the next barrier or in the next kernel.
PFC_DEVICE uint32_t scan_in_place(uint32_t* values, uint32_t count, void* shared) {
    constexpr uint32_t kEach = 4;
    uint32_t carry = 0;
    for (uint32_t base = 0; base < count; base += kEach * blockDim.x) {
        const uint32_t mine = base + kEach * threadIdx.x;
        uint32_t loaded[kEach], sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < kEach; i++) {
            loaded[i] = mine + i < count ? values[mine + i] : 0u;
            sum += loaded[i];
        }
        uint32_t total;
        uint32_t running = carry + block_scan(sum, total, shared);
#pragma unroll
        for (uint32_t i = 0; i < kEach; i++) {
            if (mine + i < count) values[mine + i] = running;
            running += loaded[i];
        }
        carry += total;
    }
    return carry;
}
