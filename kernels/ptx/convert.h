// 16-bit floats as integers: IEEE half and bfloat16, rounded to nearest even; and the fast exp2.
//
// A NaN becomes 0x7fff, as the hardware's conversions give it.
#pragma once

#include "shim.h"

namespace ptx {

#ifdef __CUDACC__

PFC_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }
PFC_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

PFC_DEVICE uint16_t to_half(float v) {
    uint16_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}

PFC_DEVICE float from_half(uint16_t v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
}

PFC_DEVICE uint16_t to_bfloat(float v) {
    uint16_t r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}

PFC_DEVICE float from_bfloat(uint16_t v) { return bits_float(uint32_t(v) << 16); }

// `low` in bits 0 to 15.
PFC_DEVICE uint32_t pack_half(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

PFC_DEVICE uint32_t pack_bfloat(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// 2^v to 2 units in the last place; 0 where 2^v is below 2^-126.
PFC_DEVICE float exp2_approximate(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

#else

PFC_DEVICE uint32_t float_bits(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
}

PFC_DEVICE float bits_float(uint32_t bits) {
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
}

PFC_DEVICE uint16_t to_half(float v) {
    const uint32_t bits = float_bits(v), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above
    if (magnitude < 0x38800000u) {
        // Below 2^-14 a half counts in steps of 2^-24: adding 0.5 makes float32 round to them.
        const float shifted = bits_float(magnitude) + 0.5f;
        return uint16_t(sign | (float_bits(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

PFC_DEVICE float from_half(uint16_t v) {
    const uint32_t sign = uint32_t(v & 0x8000u) << 16, magnitude = uint32_t(v & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) return bits_float(sign | 0x7f800000u | magnitude);
    // As a float32 of the same bits it is too small by 2^112, subnormals included.
    return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
}

PFC_DEVICE uint16_t to_bfloat(float v) {
    const uint32_t bits = float_bits(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

PFC_DEVICE float from_bfloat(uint16_t v) { return bits_float(uint32_t(v) << 16); }

// `low` in bits 0 to 15.
PFC_DEVICE uint32_t pack_half(float low, float high) {
    return uint32_t(to_half(low)) | uint32_t(to_half(high)) << 16;
}

PFC_DEVICE uint32_t pack_bfloat(float low, float high) {
    return uint32_t(to_bfloat(low)) | uint32_t(to_bfloat(high)) << 16;
}

// 2^v to 2 units in the last place; 0 where 2^v is below 2^-126.
PFC_DEVICE float exp2_approximate(float v) { return v < -126.0f ? 0.0f : exp2f(v); }

#endif

}  // namespace ptx
