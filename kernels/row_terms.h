// A row's own margins and weight: src/row_terms.rs, src/device/cpu/row_terms.rs.
//
//     loss_i = weight_i * log1p(exp(x_i)),  x_i = ln N_i + c - zt_i
//     zt_i = scale * (cos(max(m1 * theta_i + m2_i, 0)) - m3_i)
//
// The rank that a row comes from has its terms and the rank that owns its class has its angle; the
// sums message takes both to all ranks. Without row terms head.terms, head.angles and
// head.margin_gradients are null.
#pragma once

#include "margin.h"
#include "ptx/shim.h"
#include "shared_structs.h"

namespace row_terms {

enum Term : uint32_t { kM2, kM3, kWeight, kCount };

// The terms of the rows computed here: [kCount][stride]; null values: there are none.
struct Terms {
    const float* values;
    uint64_t stride;

    PFC_DEVICE float of(uint32_t term, uint32_t row) const { return values[term * stride + row]; }
};

// The end of the sums message.
PFC_DEVICE float* message(const HeadArrays& head) {
    const uint64_t before = head.shifts == nullptr ? 2 : 3;
    return head.sums + before * head.label_capacity + kTotals;
}

PFC_DEVICE Terms terms(const HeadArrays& head, bool all_ranks) {
    if (head.terms == nullptr) {
        return Terms{nullptr, 0};
    }
    return all_ranks ? Terms{message(head), head.label_capacity}
                     : Terms{head.terms, head.row_capacity};
}

// src/row_terms.rs RowTerm::default and admits. A NaN is in no range.
PFC_DEVICE float default_term(const MarginSettings& margin, uint32_t term) {
    return float(term == kM2 ? margin.m2 : term == kM3 ? margin.m3 : 1.0);
}

PFC_DEVICE bool admits(uint32_t term, float value) {
    const double most = term == kM2 ? margin::kPi + 1e-6 : term == kM3 ? 2.0 : 3.4028235e38;
    return double(value) >= (term == kM2 ? -most : 0.0) && double(value) <= most;
}

// The first of a row's terms that is out of its range, or kCount.
PFC_DEVICE uint32_t bad_term(const Terms& terms, uint32_t row) {
    uint32_t term = 0;
    while (term < kCount && admits(term, terms.of(term, row))) {
        ++term;
    }
    return term;
}

// src/row_terms.rs travelled_angle
PFC_DEVICE double travelled_angle(float angle) {
    if (angle == float(margin::kHalfPi)) {
        return margin::kHalfPi;
    }
    return double(angle) < margin::kPi ? double(angle) : margin::kPi;
}

struct Target {
    double logit;
    double derivative;  // psi' on the rank with the class, at the angle before it was rounded
    double by_m2;       // the derivative of psi by m2
    double weight;
};

// The target of a row whose angle travelled as `sent`.
PFC_DEVICE Target target(const HeadArrays& head, const Terms& terms, uint32_t row, float sent) {
    MarginSettings own = head.margin;
    own.m2 = double(terms.of(kM2, row));
    own.m3 = double(terms.of(kM3, row));
    const double angle = travelled_angle(sent);
    double derivative = 0.0;
    if (head.target_cosines[row] != kElsewhere) {
        derivative = margin::target(own, head.angles[row]).derivative;
    }
    return Target{margin::target(own, angle).logit, derivative,
                  margin::derivative_by_m2(own, angle), double(terms.of(kWeight, row))};
}

// `steepness`: of the row's loss by the target's logit over the scale, times -1.
PFC_DEVICE void keep_gradients(const HeadArrays& head, uint32_t row, double steepness,
                               double by_m2) {
    head.margin_gradients[row] = float(-steepness * by_m2);
    head.margin_gradients[head.row_capacity + row] = float(steepness);
}

}  // namespace row_terms
