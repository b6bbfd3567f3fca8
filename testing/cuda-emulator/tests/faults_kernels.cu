// Kernels with one planted fault each, and the same without it where `right` is not 0.
#include "ptx/async_copy.h"
#include "ptx/atomic.h"
#include "ptx/barrier.h"
#include "ptx/ldmatrix.h"
#include "ptx/memory.h"
#include "ptx/warp.h"

PFC_KERNEL(past_the_end, (int32_t right, uint32_t* words, uint32_t count)) {
    const uint32_t i = threadIdx.x;
    if (i < count + (right ? 0 : 1)) words[i] = i;
}

PFC_KERNEL(past_shared, (int32_t right, uint32_t count)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    if (threadIdx.x < count + (right ? 0 : 1)) words[threadIdx.x] = 1;
}

PFC_KERNEL(add_one, (uint32_t* words)) { words[threadIdx.x] += 1; }

PFC_KERNEL(set_words, (uint32_t* words, uint32_t value)) { words[threadIdx.x] = value; }

PFC_KERNEL(wide_read, (int32_t right, const float* in, float* out)) {
    const ptx::Float4 v = *reinterpret_cast<const ptx::Float4*>(in + (right ? 4 : 2));
    if (threadIdx.x == 0) out[0] = v.x + v.w;
}

PFC_KERNEL(wide_shared, (int32_t right, float* out)) {
    PFC_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    for (uint32_t i = 0; i < 8; ++i) shared[8 * threadIdx.x + i] = 1;
    float* at = shared + 8 * threadIdx.x + (right ? 4 : 1);
    *reinterpret_cast<ptx::Float4*>(at) = ptx::Float4{1, 2, 3, 4};
    out[threadIdx.x] = at[2];
}

// Each thread reads its neighbor's word.
PFC_KERNEL(no_barrier, (int32_t right, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = 0;
    __syncthreads();
    words[threadIdx.x] = threadIdx.x;
    if (right) __syncthreads();
    out[threadIdx.x] = words[(threadIdx.x + 1) % blockDim.x];
}

// A buffer that is used again while others may still read it.
PFC_KERNEL(no_second_barrier, (int32_t right, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    for (uint32_t round = 0; round < 2; ++round) {
        words[threadIdx.x] = threadIdx.x + round;
        __syncthreads();
        out[threadIdx.x] = words[(threadIdx.x + 1) % blockDim.x];
        if (right) __syncthreads();
    }
}

// A shuffle does not order memory; sync_warp does.
PFC_KERNEL(shuffle_is_no_barrier, (int32_t right, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = 0;
    ptx::sync_warp();
    words[threadIdx.x] = threadIdx.x;
    ptx::shuffle_xor(1u, 1);
    if (right) ptx::sync_warp();
    out[threadIdx.x] = words[threadIdx.x ^ 1];
}

// Barrier 1 is one of the first two warps; the third reads what they wrote.
PFC_KERNEL(barrier_of_others, (int32_t right, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = 0;
    __syncthreads();
    words[threadIdx.x] = threadIdx.x;
    if (threadIdx.x < 64) ptx::named_barrier(1, 64);
    if (right) ptx::named_barrier(2, int(blockDim.x));
    out[threadIdx.x] = words[threadIdx.x < 64 ? threadIdx.x ^ 32 : threadIdx.x - 64];
}

PFC_KERNEL(blocks_meet, (int32_t right, uint32_t* words)) {
    if (threadIdx.x == 0) words[right ? blockIdx.x : 0] = blockIdx.x;
}

// 16-bit values of one word by two threads are no race; one thread's value read by the other is.
PFC_KERNEL(half_words, (int32_t right, uint16_t* values, uint32_t* out)) {
    values[threadIdx.x] = uint16_t(threadIdx.x);
    if (threadIdx.x % 2 == 0) out[threadIdx.x] = values[threadIdx.x + (right ? 0 : 1)];
}

PFC_KERNEL(atomic_and_plain, (int32_t right, uint32_t* counter, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* count = reinterpret_cast<uint32_t*>(memory);
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    ptx::atomic_add(count, 1u);
    ptx::atomic_add(counter, 1u);
    if (right) __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = *count;
}

PFC_KERNEL(never_written, (int32_t right, uint32_t* words, uint32_t* out)) {
    if (right) words[threadIdx.x] = 1;
    out[threadIdx.x] = words[threadIdx.x];
}

PFC_KERNEL(shared_never_written, (int32_t right, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    if (right || threadIdx.x > 0) words[threadIdx.x] = 1;
    out[threadIdx.x] = words[threadIdx.x];
}

PFC_KERNEL(early_exit, (int32_t right)) {
    if (!right && threadIdx.x == 5) return;
    __syncthreads();
}

PFC_KERNEL(lane_exits, (int32_t right, uint32_t* out)) {
    if (!right && threadIdx.x == 7) return;
    out[threadIdx.x] = ptx::shuffle_xor(threadIdx.x, 1);
}

PFC_KERNEL(lanes_part, (int32_t right, uint32_t* out)) {
    if (right || threadIdx.x % 2) out[threadIdx.x] = ptx::shuffle_xor(threadIdx.x, 1);
    else out[threadIdx.x] = ptx::ballot(true);
}

PFC_KERNEL(barrier_in_branch, (int32_t right)) {
    if (right || threadIdx.x < 32) __syncthreads();
    ptx::sync_warp();
    if (!right && threadIdx.x >= 32) ptx::named_barrier(3, 64);
}

PFC_KERNEL(barrier_counts, (int32_t right)) {
    ptx::named_barrier(1, threadIdx.x < 32 && !right ? 64 : int(blockDim.x));
}

// Half of warp 0 and half of warp 1 are 32 threads, but two warps.
PFC_KERNEL(barrier_of_halves, (int32_t right)) {
    if (right || threadIdx.x % 32 < 16) ptx::named_barrier(1, right ? 64 : 32);
    else ptx::named_barrier(2, 32);
}

// what: 0 right, 1 read before the wait, 2 no barrier after the wait, 3 another thread never waits,
// 4 a wait that leaves the group under way, 5 the place is written while the copy is under way
PFC_KERNEL(copy_ahead, (int32_t what, const uint32_t* in, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    const uint32_t t = threadIdx.x, n = blockDim.x;
    ptx::copy_async_16(words + 4 * t, in + 4 * t, true);
    ptx::copy_async_commit();
    if (what == 1) out[t] = words[4 * t];
    if (what == 5) words[4 * t] = 1;
    if (what == 4) ptx::copy_async_wait<1>();
    else if (what != 3 || t > 0) ptx::copy_async_wait<0>();
    if (what != 2) __syncthreads();
    out[t] = words[4 * ((t + 1) % n)];
    __syncthreads();
    ptx::copy_async_wait<0>();
}

// The next stage is loaded into a place that other threads still read.
PFC_KERNEL(copy_over, (int32_t right, const uint32_t* in, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    const uint32_t t = threadIdx.x;
    uint32_t sum = 0;
    for (uint32_t round = 0; round < 2; ++round) {
        ptx::copy_async_16(words + 4 * t, in + 4 * t, true);
        ptx::copy_async_commit();
        ptx::copy_async_wait<0>();
        __syncthreads();
        uint32_t r[4];
        ptx::ldmatrix_x4(r, words + 4 * (t ^ 32));
        sum += r[0];
        if (right) __syncthreads();
    }
    out[t] = sum;
}

// An address that is not read has to be aligned all the same.
PFC_KERNEL(copy_of_nothing, (int32_t right, const uint32_t* in, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    ptx::copy_async_16(words + 4 * threadIdx.x, in + (right ? 4 : 1), false);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    out[threadIdx.x] = words[4 * threadIdx.x];
}

PFC_KERNEL(matrix_of_global, (int32_t right, const uint32_t* in, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    for (uint32_t i = 0; i < 4; ++i) words[4 * threadIdx.x + i] = in[4 * threadIdx.x + i];
    uint32_t r[4];
    ptx::sync_warp();
    ptx::ldmatrix_x4(r, (right ? words : in) + 4 * threadIdx.x);
    out[threadIdx.x] = r[0];
}

PFC_KERNEL_OF(of_64_threads, 64, 1, (uint32_t* out)) { out[threadIdx.x] = 1; }
