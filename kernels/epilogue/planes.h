// Float32 values and their bf16 planes: one rounded value (half precision), or three whose sum is
// the value to 2^-24 (float32): each is the rounded rest of those before.
#pragma once

#include "ptx/convert.h"
#include "ptx/shim.h"

namespace epilogue {

// Rounds two values to one plane, packed, and leaves their remainders in them for the next plane.
PFC_DEVICE uint32_t take_plane(float& low, float& high) {
    const uint32_t packed = ptx::pack_bfloat(low, high);
    low -= ptx::from_bfloat(uint16_t(packed));
    high -= ptx::from_bfloat(uint16_t(packed >> 16));
    return packed;
}

}  // namespace epilogue
