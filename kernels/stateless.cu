// Row-wise kernels over a caller's memory, without a head: pfc_normalize_rows, the margin by
// itself, the softmax's numerators, an optimizer's update of given rows, and the operands of the
// products.
//
//     E^_i = E_i / |E_i|,  z = scale * psi(acos cos),  p = exp(scale cos - c),  (w, m, v) by a rule
//
// A caller's rows have any type and any stride; nothing is known of their alignment, so that they
// are read an element at a time, side by side over a warp. Each kernel reads its input once (a row
// to be normalised a second time, from the cache) and writes its output once: the floor is those
// bytes. Of the view they take the margin, the optimizer and the operands' places. Agrees with
// src/device/cpu/kernels.rs and src/optimizer.rs StepRule.
#include "epilogue/numerators.h"
#include "margin.h"
#include "rows.h"
#include "rule.h"

namespace {

// 1 / norm of a row, in every lane of a warp. A NaN stays one.
PFC_DEVICE float inverse_of_row(const MatrixView& source, uint64_t row) {
    const uint32_t end = uint32_t(source.columns);
    double squares = 0.0;
    for (uint32_t column = rows::kGroup * (threadIdx.x % 32); column < end;
         column += rows::kSpan) {
        squares = rows::add_squares(
            squares, rows::read_typed(source.data, row * source.stride, source.dtype, column, end));
    }
    return float(rows::inverse_norm(rows::sum_of_warp(squares)));
}

PFC_DEVICE double angle_of(float cosine) {
    // A cosine that rounding took beyond 1; a NaN passes both comparisons by.
    const double c = double(cosine);
    return acos(c > 1.0 ? 1.0 : c < -1.0 ? -1.0 : c);
}

PFC_DEVICE uint64_t first_element() { return uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
PFC_DEVICE uint64_t element_stride() { return uint64_t(gridDim.x) * blockDim.x; }

}  // namespace

// `normalized` may be `source`; `inverse_norms` may be null.
// gate: normalize_matrix registers <= 64
PFC_KERNEL_OF(normalize_matrix, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, MatrixView source, MatrixView normalized,
               float* inverse_norms)) {
    const uint32_t end = uint32_t(source.columns), lane = threadIdx.x % 32;
    for (uint64_t row = rows::first_row(); row < source.rows; row += rows::row_stride()) {
        const float inverse = inverse_of_row(source, row);
        if (lane == 0 && inverse_norms != nullptr) {
            inverse_norms[row] = inverse;
        }
        for (uint32_t column = rows::kGroup * lane; column < end; column += rows::kSpan) {
            const ptx::Float4 group =
                rows::read_typed(source.data, row * source.stride, source.dtype, column, end);
            rows::write_typed(normalized.data, row * normalized.stride, normalized.dtype, column,
                              end, rows::scaled(inverse, group));
        }
    }
}

// Rows first .. first + count of `source`, divided by their norms, as a side of the products: 0,
// E^: unit_operand, inverse_norms and units; 1, W^: center_operand at the chunk's place and
// center_inverse_norms at the row's own. But for the operands, what has no array is left out.
// gate: unit_operands registers <= 64
PFC_KERNEL_OF(unit_operands, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, MatrixView source, uint64_t first,
               uint32_t count, int32_t side)) {
    const uint32_t end = uint32_t(source.columns), lane = threadIdx.x % 32;
    uint16_t* const operand = side == 0 ? view.unit_operand : view.center_operand;
    const uint64_t plane = side == 0 ? view.plane_rows : view.plane_centers;
    float* const units = side == 0 ? view.units : nullptr;
    float* const inverse_norms = side == 0 ? view.inverse_norms : view.center_inverse_norms;
    // Rows to the end of the last tile are zero: the products read them.
    static_assert(kTileRows == kTileColumns, "one rounding for both sides");
    for (uint32_t slot = rows::first_row(); slot < rows::round_up(count, kTileRows);
         slot += rows::row_stride()) {
        const bool counts = slot < count;
        const float inverse = counts ? inverse_of_row(source, first + slot) : 0.0f;
        if (counts && lane == 0 && inverse_norms != nullptr) {
            inverse_norms[first + slot] = inverse;
        }
        for (uint32_t column = rows::kGroup * lane; column < view.depth_pitch;
             column += rows::kSpan) {
            ptx::Float4 unit = rows::zeros();
            if (counts && column < end) {
                const ptx::Float4 group = rows::read_typed(
                    source.data, (first + slot) * source.stride, source.dtype, column, end);
                // Beyond the row's end a NaN of the norm must not get into the products.
                unit = ptx::Float4{inverse * group.x, column + 1 < end ? inverse * group.y : 0.0f,
                                   column + 2 < end ? inverse * group.z : 0.0f,
                                   column + 3 < end ? inverse * group.w : 0.0f};
            }
            const uint64_t at = uint64_t(slot) * view.depth_pitch + column;
            if (units != nullptr) {
                *reinterpret_cast<ptx::Float4*>(units + at) = unit;
            }
            rows::write_split(operand + at, plane, unit);
        }
    }
}

// `logits` may be `cosines`.
// gate: margin_forward registers <= 64
PFC_KERNEL_OF(margin_forward, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, const float* cosines, uint64_t count,
               float* logits)) {
    for (uint64_t i = first_element(); i < count; i += element_stride()) {
        logits[i] = float(margin::target(view.margin, angle_of(cosines[i])).logit);
    }
}

// `grad_cosines` may be `grad_logits`.
// gate: margin_backward registers <= 64
PFC_KERNEL_OF(margin_backward, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, const float* cosines,
               const float* grad_logits, uint64_t count, float* grad_cosines)) {
    for (uint64_t i = first_element(); i < count; i += element_stride()) {
        const margin::Target target = margin::target(view.margin, angle_of(cosines[i]));
        const double slope = view.margin.scale * target.derivative;
        grad_cosines[i] = float(double(grad_logits[i]) * slope);
    }
}

// Cosines to numerators in place, a CTA a row; columns: the row's own class, or kNone. 32 numbers
// of 8 bytes of dynamic shared memory.
// gate: partial_softmax registers <= 64 shared 256 <= 256
PFC_KERNEL_OF(partial_softmax, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, MatrixView cosines, const uint32_t* columns,
               float* row_sums)) {
    PFC_DYNAMIC_SHARED(dynamic);
    constexpr uint32_t kRun = 8;  // numbers that are added up in float32
    const epilogue::Softmax softmax = epilogue::softmax_of(view.margin);
    for (uint64_t row = blockIdx.x; row < cosines.rows; row += gridDim.x) {
        float* const values = reinterpret_cast<float*>(cosines.data) + row * cosines.stride;
        const uint32_t target = columns[row];
        double sum = 0.0;
        for (uint64_t base = threadIdx.x; base < cosines.columns;
             base += uint64_t(kRun) * blockDim.x) {
            float run = 0.0f;
            for (uint32_t i = 0; i < kRun; ++i) {
                const uint64_t column = base + uint64_t(i) * blockDim.x;
                if (column < cosines.columns) {
                    const float cosine = values[column];
                    const float power =
                        ptx::exp2_approximate(fmaf(cosine, softmax.slope, softmax.shift));
                    const bool is_target = column == target, filtered = cosine > softmax.filter;
                    values[column] = is_target || filtered ? 0.0f : power;
                    run += is_target ? 0.0f : filtered ? softmax.floor : power;
                }
            }
            sum += double(run);
        }
        sum = rows::sum_of_block(sum, reinterpret_cast<double*>(dynamic));
        if (threadIdx.x == 0) {
            row_sums[row] = float(sum);
        }
    }
}

// Row places[i] of W and its state by row i of the gradients; no row is there twice.
// gate: update_given_rows registers <= 64
PFC_KERNEL_OF(update_given_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, MatrixView centers, MatrixView momentum,
               MatrixView second_moment, const uint32_t* places, MatrixView gradients,
               Rule step)) {
    for (uint64_t i = rows::first_row(); i < gradients.rows; i += rows::row_stride()) {
        const uint64_t place = places[i];
        float* const w = reinterpret_cast<float*>(centers.data) + place * centers.stride;
        float* const m = reinterpret_cast<float*>(momentum.data) + place * momentum.stride;
        float* const v =
            reinterpret_cast<float*>(second_moment.data) + place * second_moment.stride;
        for (uint64_t column = threadIdx.x % 32; column < gradients.columns; column += 32) {
            const float g =
                rows::read_element(gradients.data, i * gradients.stride + column, gradients.dtype);
            if (view.optimizer.adamw) {
                rule::adamw(step, w[column], m[column], v[column], g);
            } else {
                rule::sgd(step, w[column], m[column], g);
            }
        }
    }
}

// The ids of a sample that was listed.
// gate: write_ids registers <= 32
PFC_KERNEL_OF(write_ids, 256, 4, (const PFC_GRID_CONSTANT HeadView view, int64_t* ids)) {
    for (uint64_t i = first_element(); i < view.block->classes; i += element_stride()) {
        ids[i] = int64_t(view.first_class + view.sample[i]);
    }
}
