// d += a b on the tensor cores: 16 x 16 times 16 x 8, 16-bit operands, float32 accumulators.
//
// With g = lane / 4 and t = lane % 4, a thread holds (two 16-bit values a register, the lower
// column first; of B the lower row)
//   a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//   b0 = B[2t..][g], b1 = B[2t + 8..][g]
//   d[0], d[1] = D[g][2t], D[g][2t + 1]; d[2], d[3] = the same of row g + 8
#pragma once

#include "shim.h"

namespace ptx {

#ifdef __CUDACC__

PFC_DEVICE void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

PFC_DEVICE void mma_bfloat(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

PFC_DEVICE void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma_half(d, a[0], a[1], a[2], a[3], b0, b1);
}

PFC_DEVICE void mma_bfloat(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma_bfloat(d, a[0], a[1], a[2], a[3], b0, b1);
}

#endif

}  // namespace ptx
