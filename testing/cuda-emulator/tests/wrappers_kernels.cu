// One kernel for each wrapper of kernels/ptx: inputs in, what each thread holds out.
#include "ptx/arithmetic.h"
#include "ptx/async_copy.h"
#include "ptx/atomic.h"
#include "ptx/barrier.h"
#include "ptx/convert.h"
#include "ptx/ldmatrix.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "ptx/warp.h"

PFC_KERNEL(run_mma, (int32_t half, const uint32_t* a, const uint32_t* b, const float* c,
    float* d)) {
    float sum[4];
    uint32_t left[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[threadIdx.x * 4 + i];
    for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i];
    const uint32_t b0 = b[threadIdx.x * 2], b1 = b[threadIdx.x * 2 + 1];
    if (half) ptx::mma_half(sum, left, b0, b1);
    else ptx::mma_bfloat(sum, left, b0, b1);
    for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sum[i];
}

// `source` is a 32 x 8 matrix of 16-bit values; matrix m is its rows 8 m to 8 m + 7.
PFC_KERNEL(run_ldmatrix, (int32_t transposed, const uint16_t* source, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    ptx::copy_async_16(memory + 16 * threadIdx.x, source + 8 * threadIdx.x, true);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    ptx::sync_warp();
    uint32_t r[4];
    if (transposed) ptx::ldmatrix_x4_transposed(r, memory + 16 * threadIdx.x);
    else ptx::ldmatrix_x4(r, memory + 16 * threadIdx.x);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

PFC_KERNEL(run_shuffles, (const uint64_t* in, uint64_t* out)) {
    const uint64_t v = in[threadIdx.x];
    uint64_t* mine = out + 8 * threadIdx.x;
    mine[0] = ptx::shuffle_xor(v, 5);
    mine[1] = ptx::shuffle(v, 7);
    mine[2] = ptx::shuffle_up(v, 3u);
    mine[3] = ptx::shuffle_xor(uint32_t(v), 16);
    mine[4] = uint64_t(ptx::shuffle_xor(double(v & 0xffff), 1));
    mine[5] = uint64_t(ptx::shuffle_up(float(v & 0xffff), 1u));
    mine[6] = ptx::ballot(v & 1);
    mine[7] = ptx::any((v & 0xff) == 0xff) | uint64_t(ptx::lane()) << 8
        | uint64_t(ptx::warp()) << 16;
}

PFC_KERNEL(run_convert, (const float* in, uint32_t* out, uint32_t count)) {
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        const uint16_t half = ptx::to_half(in[i]), bfloat = ptx::to_bfloat(in[i]);
        out[4 * i] = uint32_t(half) | uint32_t(bfloat) << 16;
        const float next = in[(i + 1) % count];
        out[4 * i + 1] = ptx::pack_half(ptx::from_half(half), next);
        out[4 * i + 2] = ptx::pack_bfloat(ptx::from_bfloat(bfloat), next);
        out[4 * i + 3] = ptx::multiply_high(out[4 * i], 0x10000u) + ptx::population_count(half) +
                         ptx::find_first(bfloat);
    }
}

// Three groups of copies with the hints that there are, the last not valid; every other group is read when it must be there.
PFC_KERNEL(run_copies, (const float* in, float* out)) {
    PFC_DYNAMIC_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const uint32_t t = threadIdx.x, n = blockDim.x;
    for (uint32_t group = 0; group < 3; ++group) {
        float* const to = shared + 4 * (group * n + t);
        const float* const from = in + 4 * (group * n + t);
        if (group == 0) ptx::copy_async_16<ptx::Eviction::kFirst>(to, from, true);
        else if (group == 1) ptx::copy_async_16<ptx::Eviction::kLast>(to, from, true);
        else ptx::copy_async_16<ptx::Eviction::kNormal>(to, from, false);
        ptx::copy_async_commit();
    }
    ptx::copy_async_wait<1>();
    __syncthreads();
    const uint32_t other = n - 1 - t;
    for (uint32_t i = 0; i < 4; ++i) {
        out[12 * t + i] = shared[4 * other + i];
        out[12 * t + 4 + i] = shared[4 * (n + other) + i];
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
    for (uint32_t i = 0; i < 4; ++i) out[12 * t + 8 + i] = shared[4 * (2 * n + other) + i];
}

PFC_KERNEL(run_atomics, (uint32_t* words, uint64_t* sum)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* counters = reinterpret_cast<uint32_t*>(memory);
    if (threadIdx.x < 4) counters[threadIdx.x] = 0;
    __syncthreads();
    ptx::atomic_add(&counters[threadIdx.x % 4], 1u);
    __syncthreads();
    if (threadIdx.x < 4) ptx::atomic_add(&words[threadIdx.x], counters[threadIdx.x]);
    ptx::atomic_or(&words[4], 1u << threadIdx.x % 32);
    ptx::atomic_min(&words[5], 1000 - threadIdx.x - blockIdx.x);
    ptx::atomic_add(sum, uint64_t(threadIdx.x) << 32);
}

// Warps 0 and 1 exchange by barrier 1, warps 2 and 3 by barrier 2.
PFC_KERNEL(run_barriers, (uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    const uint32_t t = threadIdx.x;
    for (uint32_t round = 0; round < 3; ++round) {
        words[t] = t + round;
        ptx::named_barrier(1 + int(t / 64), 64);
        out[t] = words[t ^ 32] - round;
        ptx::named_barrier(1 + int(t / 64), 64);
    }
}

// D[m][n] = A[m][k] B[n][k]^T in bfloat16: tiles of 128 x 128 by 8 warps of 64 x 32, 3 stages of
// 32. The main loop of the real kernels, to time the emulator.
PFC_KERNEL_OF(run_gemm, 256, 1, (const uint16_t* a, const uint16_t* b, float* d, uint32_t m,
    uint32_t n,
                                 uint32_t k)) {
    PFC_DYNAMIC_SHARED(memory);
    constexpr uint32_t kPitch = 80, kTile = 128 * kPitch, kStage = 2 * kTile;  // bytes
    const uint32_t warp = ptx::warp(), lane = ptx::lane(), rows = warp / 4 * 64,
        columns = warp % 4 * 32;
    for (uint32_t tile = blockIdx.x; tile < m / 128 * (n / 128); tile += gridDim.x) {
        const uint16_t* left = a + uint64_t(tile / (n / 128)) * 128 * k;
        const uint16_t* right = b + uint64_t(tile % (n / 128)) * 128 * k;
        float sum[4][4][4] = {};
        auto load = [&](uint32_t step) {
            unsigned char* stage = memory + step % 3 * kStage;
            for (uint32_t i = threadIdx.x; i < 512; i += 256) {
                const uint32_t row = i / 4, part = i % 4;
                ptx::copy_async_16(stage + row * kPitch + part * 16,
                                   left + uint64_t(row) * k + step * 32 + part * 8, true);
                ptx::copy_async_16(stage + kTile + row * kPitch + part * 16,
                                   right + uint64_t(row) * k + step * 32 + part * 8, true);
            }
        };
        const uint32_t steps = k / 32;
        for (uint32_t step = 0; step < 2; ++step) {
            if (step < steps) load(step);
            ptx::copy_async_commit();
        }
        for (uint32_t step = 0; step < steps; ++step) {
            ptx::copy_async_wait<1>();
            __syncthreads();
            if (step + 2 < steps) load(step + 2);
            ptx::copy_async_commit();
            const unsigned char* stage = memory + step % 3 * kStage;
            for (uint32_t kk = 0; kk < 2; ++kk) {
                uint32_t fa[4][4], fb[2][4];
                for (uint32_t i = 0; i < 4; ++i)
                    ptx::ldmatrix_x4(fa[i], stage + (rows + i * 16 + lane % 16) * kPitch + kk * 32 +
                                                lane / 16 * 16);
                for (uint32_t j = 0; j < 2; ++j)
                    ptx::ldmatrix_x4(fb[j], stage + kTile + (columns + j * 16
                        + lane % 16) * kPitch +
                                                kk * 32 + lane / 16 * 16);
                for (uint32_t i = 0; i < 4; ++i)
                    for (uint32_t j = 0; j < 4; ++j)
                        ptx::mma_bfloat(sum[i][j], fa[i], fb[j / 2][j % 2], fb[j / 2][2 + j % 2]);
            }
        }
        __syncthreads();
        for (uint32_t i = 0; i < 4; ++i)
            for (uint32_t j = 0; j < 4; ++j)
                for (uint32_t e = 0; e < 4; ++e) {
                    const uint32_t row = tile / (n / 128) * 128 + rows + i * 16 + lane / 4
                        + e / 2 * 8;
                    const uint32_t column =
                        tile % (n / 128) * 128 + columns + j * 8 + lane % 4 * 2 + e % 2;
                    d[uint64_t(row) * n + column] = sum[i][j][e];
                }
    }
}
