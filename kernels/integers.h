// Arithmetic on sizes and indices.
#pragma once

#include "ptx/shim.h"

PFC_DEVICE constexpr uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

PFC_DEVICE constexpr uint32_t ceil_div(uint32_t value, uint32_t divisor) {
    return (value + divisor - 1) / divisor;
}

PFC_DEVICE constexpr uint32_t round_up(uint32_t value, uint32_t multiple) {
    return ceil_div(value, multiple) * multiple;
}
