// The angle between two rows as they came: 2 atan2(|E^ - W^|, |E^ + W^|), src/margin.rs angle.
//
// Unlike acos of the inner product it keeps its digits for rows that nearly agree. A row without
// direction is at a right angle to everything.
//
// And the part of W^ across E^, W^ - cos E^, which keeps its digits as well: src/margin.rs tangent.
// Its cosine is that of the inner product, as an error in it lies along E^, where the backward of
// normalize takes it off.
#pragma once

#include "margin.h"
#include "rows.h"

namespace angle {

// `e` and `w` return a lane's group at a column. A whole warp calls this with the same two rows,
// and its lanes loop together, as the replay of a dense row requires. `tangent` gets the column and
// the lane's group of the part of W^ across E^, zeros for rows without direction.
template <class E, class W, class Tangent>
PFC_DEVICE double between(uint32_t dim, const E& e, const W& w, const Tangent& tangent) {
    const uint32_t lane = threadIdx.x % 32;
    double e_squares = 0.0, w_squares = 0.0, products = 0.0;
    for (uint32_t base = 0; base < dim; base += rows::kSpan) {
        const uint32_t column = base + rows::kGroup * lane;
        const ptx::Float4 center = w(column), row = e(column);
        e_squares = rows::add_squares(e_squares, row);
        w_squares = rows::add_squares(w_squares, center);
        products = rows::add_products(products, row, center);
    }
    const double e_inverse = rows::inverse_norm(warp_sum(e_squares));
    const double w_inverse = rows::center_inverse_norm(warp_sum(w_squares));
    if (e_inverse == 0.0 || w_inverse == 0.0) {
        for (uint32_t base = 0; base < dim; base += rows::kSpan) {
            tangent(base + rows::kGroup * lane, rows::zeros());
        }
        return margin::kHalfPi;
    }
    const double cosine = warp_sum(products) * e_inverse * w_inverse;
    double minus = 0.0, plus = 0.0;
    for (uint32_t base = 0; base < dim; base += rows::kSpan) {
        const uint32_t column = base + rows::kGroup * lane;
        const ptx::Float4 center = w(column), row = e(column);
        const float es[4] = {row.x, row.y, row.z, row.w};
        const float ws[4] = {center.x, center.y, center.z, center.w};
        float across[4];
        for (int i = 0; i < 4; ++i) {
            const double a = double(es[i]) * e_inverse, b = double(ws[i]) * w_inverse;
            minus += (a - b) * (a - b);
            plus += (a + b) * (a + b);
            across[i] = float(b - cosine * a);
        }
        tangent(column, ptx::Float4{across[0], across[1], across[2], across[3]});
    }
    return 2.0 * atan2(sqrt(warp_sum(minus)), sqrt(warp_sum(plus)));
}

}  // namespace angle
