// The angle between two rows as they came: 2 atan2(|E^ - W^|, |E^ + W^|), src/margin.rs angle.
//
// Unlike acos of the inner product it keeps its digits for rows that nearly agree. A row without
// direction is at a right angle to everything.
#pragma once

#include "margin.h"
#include "rows.h"

namespace angle {

// `e` and `w` return a lane's group at a column. A whole warp calls this with the same two rows,
// and its lanes loop together, as the replay of a dense row requires.
template <class E, class W>
PFC_DEVICE double between(uint32_t dim, const E& e, const W& w) {
    const uint32_t lane = threadIdx.x % 32;
    double e_squares = 0.0, w_squares = 0.0;
    for (uint32_t base = 0; base < dim; base += rows::kSpan) {
        const uint32_t column = base + rows::kGroup * lane;
        const ptx::Float4 center = w(column);
        e_squares = rows::add_squares(e_squares, e(column));
        w_squares = rows::add_squares(w_squares, center);
    }
    const double e_inverse = rows::inverse_norm(warp_sum(e_squares));
    const double w_inverse = rows::inverse_norm(warp_sum(w_squares));
    if (e_inverse == 0.0 || w_inverse == 0.0) {
        return margin::kHalfPi;
    }
    double minus = 0.0, plus = 0.0;
    for (uint32_t base = 0; base < dim; base += rows::kSpan) {
        const uint32_t column = base + rows::kGroup * lane;
        const ptx::Float4 center = w(column), row = e(column);
        const float es[4] = {row.x, row.y, row.z, row.w};
        const float ws[4] = {center.x, center.y, center.z, center.w};
        for (int i = 0; i < 4; ++i) {
            const double a = double(es[i]) * e_inverse, b = double(ws[i]) * w_inverse;
            minus += (a - b) * (a - b);
            plus += (a + b) * (a + b);
        }
    }
    return 2.0 * atan2(sqrt(warp_sum(minus)), sqrt(warp_sum(plus)));
}

}  // namespace angle
