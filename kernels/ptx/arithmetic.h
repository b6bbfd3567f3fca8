// Arithmetic whose rounding is fixed: each of these rounds once, and the compiler may not fuse two.
#pragma once

#include "shim.h"

namespace ptx {

#ifdef __CUDACC__

PFC_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
PFC_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
PFC_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
PFC_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
PFC_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
PFC_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
PFC_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
PFC_DEVICE double subtract(double a, double b) { return __dsub_rn(a, b); }
PFC_DEVICE double divide(double a, double b) { return __ddiv_rn(a, b); }
PFC_DEVICE double square_root(double a) { return __dsqrt_rn(a); }

// The high 32 bits of the product.
PFC_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
PFC_DEVICE uint32_t population_count(uint32_t a) { return __popc(a); }
// Number of the lowest set bit plus 1; 0 where none is.
PFC_DEVICE uint32_t find_first(uint32_t a) { return __ffs(int(a)); }

#else

// The emulator's objects are compiled with -ffp-contract=off.
PFC_DEVICE float multiply(float a, float b) { return a * b; }
PFC_DEVICE float add(float a, float b) { return a + b; }
PFC_DEVICE float subtract(float a, float b) { return a - b; }
PFC_DEVICE float divide(float a, float b) { return a / b; }
PFC_DEVICE float square_root(float a) { return sqrtf(a); }
PFC_DEVICE double multiply(double a, double b) { return a * b; }
PFC_DEVICE double add(double a, double b) { return a + b; }
PFC_DEVICE double subtract(double a, double b) { return a - b; }
PFC_DEVICE double divide(double a, double b) { return a / b; }
PFC_DEVICE double square_root(double a) { return sqrt(a); }

// The high 32 bits of the product.
PFC_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
    return uint32_t(uint64_t(a) * b >> 32);
}
PFC_DEVICE uint32_t population_count(uint32_t a) { return uint32_t(__builtin_popcount(a)); }
// Number of the lowest set bit plus 1; 0 where none is.
PFC_DEVICE uint32_t find_first(uint32_t a) { return uint32_t(__builtin_ffs(int(a))); }

#endif

}  // namespace ptx
