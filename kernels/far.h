// Rows whose negatives are all so far away that numerators relative to exp(c) would leave float32:
// they are taken again relative to the row's largest negative. src/margin.rs Margin::row_offset,
// src/protocol.rs far_sum and whole_sum.
//
// A row's offset is kept as the shift of its exponents of 2, which is -log2(e) times it. Without an
// array of shifts all rows have offset c: the host gives a head one where the scale is above 75.
#pragma once

#include "ptx/shim.h"
#include "shared_structs.h"

namespace far {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLeastExponent = -60.0;  // of a row's largest numerator, relative to exp(c)
constexpr double kTravelExponent = 120.0;  // with which the sum of such a row travels

PFC_DEVICE float common_shift(const MarginSettings& margin) {
    return float(-margin.offset * kLog2E);
}

// The offset of a row with this largest negative cosine. A negative above the filter counts as
// cosine 0, which is near enough.
PFC_DEVICE float row_offset(const MarginSettings& margin, float best) {
    const double logit = margin.scale * double(best);
    const bool filtered = margin.filter > 0.0 && double(best) > margin.filter;
    const bool is_far =
        best > kElsewhere && !filtered && logit - margin.offset < kLeastExponent;
    return float(is_far ? logit : margin.offset);
}

// src/device/stateless.rs given_offset: a row without negatives gets the least there is.
PFC_DEVICE float given_offset(const MarginSettings& margin, float best) {
    return best == kElsewhere ? float(-margin.scale) : row_offset(margin, best);
}

PFC_DEVICE float shift_of(const MarginSettings& margin, float offset) {
    return offset == float(margin.offset) ? common_shift(margin) : float(-double(offset) * kLog2E);
}

PFC_DEVICE bool has_own_offset(const HeadArrays& head, uint32_t row) {
    return head.shifts != nullptr && head.shifts[row] != common_shift(head.margin);
}

// What takes numerators relative to the row's offset to those relative to exp(c).
PFC_DEVICE double from_own_offset(const HeadArrays& head, uint32_t row) {
    return has_own_offset(head, row)
               ? exp(-double(head.shifts[row]) / kLog2E - head.margin.offset)
               : 1.0;
}

// The sums of such rows in the sums message.
PFC_DEVICE float* far_sums(const HeadArrays& head) {
    return head.sums + 2 * uint64_t(head.label_capacity) + kTotals;
}

}  // namespace far
