// Four 8 x 8 matrices of 16-bit values from shared memory into the registers that mma takes.
//
// In each lane l, `row` is row l % 8 (16 bytes, 16-byte aligned) of matrix l / 8, and r[m] gets the
// two values at row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1 of matrix m; transposed: rows and
// columns exchanged.
#pragma once

#include "shim.h"

namespace ptx {

#ifdef __CUDACC__

PFC_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

PFC_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

#else

PFC_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    simt::ldmatrix_x4(r, row, false);
}

PFC_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    simt::ldmatrix_x4(r, row, true);
}

#endif

}  // namespace ptx
