// Row-wise kernels over a caller's memory, without a head: pfc_normalize_rows, the margin alone,
// the softmax numerators, an optimizer's update of given rows, and the operands of the products.
//
//     E^_i = E_i / |E_i|,  z = scale * psi(acos cos),  p = exp(scale cos - c),  (w, m, v) by a rule
//
// A caller's rows have any type and any stride; nothing is known of their alignment, so that they
// are read an element at a time, side by side over a warp. Each kernel reads its input once (a row
// to be normalized a second time, from the cache) and writes its output once: the floor is those
// bytes. HeadArrays gives them the margin, the optimizer and the operands' addresses. Agrees with
// src/device/cpu/stateless.rs and src/optimizer UpdateRule.
#include "epilogue/numerators.h"
#include "far.h"
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
    return float(rows::inverse_norm(warp_sum(squares)));
}

PFC_DEVICE double angle_of(float cosine) {
    // A cosine that rounding took beyond 1; a NaN passes both comparisons by.
    const double c = double(cosine);
    return acos(c > 1.0 ? 1.0 : c < -1.0 ? -1.0 : c);
}

// The largest value over the CTA, in all threads.
PFC_DEVICE float block_largest(float value, void* shared) {
    float* const partial = static_cast<float*>(shared);
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = ptx::shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    __syncthreads();  // threads may still be reading what was there
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = value;
    }
    __syncthreads();
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) {
        value = partial[warp] > value ? partial[warp] : value;
    }
    return value;
}

PFC_DEVICE uint64_t first_element() { return uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
PFC_DEVICE uint64_t element_stride() { return uint64_t(gridDim.x) * blockDim.x; }

}  // namespace

// `normalized` may be `source`; `inverse_norms` may be null.
// launch: normalize_matrix blocks 4 per SM threads 256 shared 0
// gate: normalize_matrix registers <= 64
PFC_KERNEL_OF(normalize_matrix, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView source, MatrixView normalized,
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

// Writes rows first .. first + count of `source`, divided by their norms, as an operand of the
// products. Side 0 is E^: unit_operand, inverse_norms and units. Side 1 is W^: center_operand from
// the chunk's first row and center_inverse_norms from row `first`. Arrays that are null, other than
// the operands, are left out.
// launch: write_unit_operands blocks 4 per SM threads 256 shared 0
// gate: write_unit_operands registers <= 64
PFC_KERNEL_OF(write_unit_operands, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView source, uint64_t first,
               uint32_t count, int32_t side)) {
    const uint32_t end = uint32_t(source.columns), lane = threadIdx.x % 32;
    uint16_t* const operand = side == 0 ? head.unit_operand : head.center_operand;
    const uint64_t plane = side == 0 ? head.plane_rows : head.plane_centers;
    float* const units = side == 0 ? head.units : nullptr;
    float* const inverse_norms = side == 0 ? head.inverse_norms : head.center_inverse_norms;
    // The products read rows to the end of the last tile: those beyond `count` are zero.
    static_assert(kTileRows == kTileColumns, "one rounding for both sides");
    for (uint32_t slot = rows::first_row(); slot < round_up(count, kTileRows);
         slot += rows::row_stride()) {
        const bool counts = slot < count;
        const float inverse = counts ? inverse_of_row(source, first + slot) : 0.0f;
        if (counts && lane == 0 && inverse_norms != nullptr) {
            inverse_norms[first + slot] = inverse;
        }
        for (uint32_t column = rows::kGroup * lane; column < head.depth_pitch;
             column += rows::kSpan) {
            ptx::Float4 unit = rows::zeros();
            if (counts && column < end) {
                const ptx::Float4 group = rows::read_typed(
                    source.data, (first + slot) * source.stride, source.dtype, column, end);
                // If the norm is a NaN, it must not get into the padding beyond the row's end.
                unit = ptx::Float4{inverse * group.x, column + 1 < end ? inverse * group.y : 0.0f,
                                   column + 2 < end ? inverse * group.z : 0.0f,
                                   column + 3 < end ? inverse * group.w : 0.0f};
            }
            const uint64_t at = uint64_t(slot) * head.depth_pitch + column;
            if (units != nullptr) {
                *reinterpret_cast<ptx::Float4*>(units + at) = unit;
            }
            rows::write_split(operand + at, plane, unit);
        }
    }
}

// `logits` may be `cosines`.
// launch: margin_forward blocks 4 per SM threads 256 shared 0
// gate: margin_forward registers <= 64
PFC_KERNEL_OF(margin_forward, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, const float* cosines, uint64_t count,
               float* logits)) {
    for (uint64_t i = first_element(); i < count; i += element_stride()) {
        logits[i] = float(margin::target(head.margin, angle_of(cosines[i])).logit);
    }
}

// `grad_cosines` may be `grad_logits`.
// launch: margin_backward blocks 4 per SM threads 256 shared 0
// gate: margin_backward registers <= 64
PFC_KERNEL_OF(margin_backward, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, const float* cosines,
               const float* grad_logits, uint64_t count, float* grad_cosines)) {
    for (uint64_t i = first_element(); i < count; i += element_stride()) {
        const margin::Target target = margin::target(head.margin, angle_of(cosines[i]));
        const double slope = head.margin.scale * target.derivative;
        grad_cosines[i] = float(double(grad_logits[i]) * slope);
    }
}

// Turns cosines into numerators in place, a CTA a row. columns: the column of the row's own class,
// or kNone. row_offsets: each row's offset, written; null: all rows have offset c.
// launch: partial_softmax blocks 4 per SM threads 256 shared 256
// gate: partial_softmax registers <= 64 shared 256 <= 256
PFC_KERNEL_OF(partial_softmax, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView cosines, const uint32_t* columns,
               float* row_sums, float* row_offsets, int32_t own_offsets)) {
    PFC_DYNAMIC_SHARED(dynamic);
    constexpr uint32_t kFloatTerms = 8;  // terms that are added up in float32
    const epilogue::Softmax softmax = epilogue::softmax_of(head.margin);
    for (uint64_t row = blockIdx.x; row < cosines.rows; row += gridDim.x) {
        float* const values = reinterpret_cast<float*>(cosines.data) + row * cosines.stride;
        const uint32_t target = columns[row];
        float offset = float(head.margin.offset);
        if (own_offsets != 0) {
            float best = kElsewhere;
            for (uint64_t column = threadIdx.x; column < cosines.columns; column += blockDim.x) {
                const float cosine = values[column];
                best = column != target && cosine > best ? cosine : best;
            }
            offset = far::given_offset(head.margin, block_largest(best, dynamic));
        }
        const float shift = far::shift_of(head.margin, offset);
        double sum = 0.0;
        for (uint64_t base = threadIdx.x; base < cosines.columns;
             base += uint64_t(kFloatTerms) * blockDim.x) {
            float float_sum = 0.0f;
            for (uint32_t i = 0; i < kFloatTerms; ++i) {
                const uint64_t column = base + uint64_t(i) * blockDim.x;
                if (column < cosines.columns) {
                    const float cosine = values[column];
                    const float power =
                        ptx::exp2_approximate(fmaf(cosine, softmax.slope, shift));
                    const bool is_target = column == target, filtered = cosine > softmax.filter;
                    values[column] = is_target || filtered ? 0.0f : power;
                    float_sum += is_target ? 0.0f : filtered ? softmax.floor : power;
                }
            }
            sum += double(float_sum);
        }
        sum = block_sum(sum, dynamic);
        if (threadIdx.x == 0) {
            row_sums[row] = float(sum);
            if (row_offsets != nullptr) {
                row_offsets[row] = offset;
            }
        }
    }
}

// Updates row row_indices[i] of W and its state by row i of the gradients; no index repeats.
// launch: update_given_rows blocks 4 per SM threads 256 shared 0
// gate: update_given_rows registers <= 64
PFC_KERNEL_OF(update_given_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView centers, MatrixView momentum,
               MatrixView second_moment, const uint32_t* row_indices, MatrixView gradients,
               Rule rule)) {
    for (uint64_t i = rows::first_row(); i < gradients.rows; i += rows::row_stride()) {
        const uint64_t row = row_indices[i];
        float* const w = reinterpret_cast<float*>(centers.data) + row * centers.stride;
        float* const m = reinterpret_cast<float*>(momentum.data) + row * momentum.stride;
        float* const v = reinterpret_cast<float*>(second_moment.data) + row * second_moment.stride;
        for (uint64_t column = threadIdx.x % 32; column < gradients.columns; column += 32) {
            const float g =
                rows::read_element(gradients.data, i * gradients.stride + column, gradients.dtype);
            if (head.optimizer.adamw) {
                rule::adamw(rule, w[column], m[column], v[column], g);
            } else {
                rule::sgd(rule, w[column], m[column], g);
            }
        }
    }
}

// Writes the ids of the listed sample.
// launch: write_ids blocks 4 per SM threads 256 shared 0
// gate: write_ids registers <= 32
PFC_KERNEL_OF(write_ids, 256, 4, (const PFC_GRID_CONSTANT HeadArrays head, int64_t* ids)) {
    for (uint64_t i = first_element(); i < head.block->classes; i += element_stride()) {
        ids[i] = int64_t(head.first_class + head.sample[i]);
    }
}
