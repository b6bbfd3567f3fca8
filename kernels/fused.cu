// The kernels of pfc_fused_forward and pfc_fused_backward between a head's products, over a
// caller's rows: target angles, row sums, gradients in the caller's types.
//
//     zt_i = scale * psi(angle(E_i, W_y)),  N_i = sum of the chunks' partial sums
//     L_i = N_i + exp(zt_i - c),  factor_i = scale / L_i
//     coefficient_i = -scale * (N_i / L_i) * psi'_i
//     dE^_i = factor_i * (P @ W^)_i + coefficient_i * (W^_y - cos E^_i)
//     dE_i of dE^_i and dW_j of the center gradient's dW^_j by the backward of normalize
//
// Floor: B d elements of E, of P @ W^ and of dE, S d of W, dW^ and dW, each once or twice. Agrees
// with `fused_forward` and `fused_backward` of src/device/cpu/stateless.rs.
#include "angle.h"
#include "far.h"

namespace {

PFC_DEVICE ptx::Float4 group_of(const MatrixView& matrix, uint64_t row, uint32_t column) {
    return rows::read_typed(matrix.data, row * matrix.stride, matrix.dtype, column,
                            uint32_t(matrix.columns));
}

}  // namespace

// Writes derivatives, target_cosines and, unless null, target_logits and tangents: 0 for rows whose
// class is not among the centers, which have no tangent.
// launch: find_given_targets blocks 4 per SM threads 256 shared 0
// gate: find_given_targets registers <= 128
PFC_KERNEL_OF(find_given_targets, 256, 2,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView embeddings,
               MatrixView centers)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = rows::first_row(); row < head.block->rows; row += rows::row_stride()) {
        const uint32_t target = head.columns[row];
        margin::Target found = {0.0, 0.0};
        double angle = margin::kHalfPi;
        if (target != kNone) {
            angle = angle::between(
                head.dim, [&](uint32_t column) { return group_of(embeddings, row, column); },
                [&](uint32_t column) { return group_of(centers, target, column); },
                [&](uint32_t column, const ptx::Float4& tangent) {
                    if (head.tangents != nullptr) {
                        rows::write_group(head.tangents + uint64_t(row) * head.depth_pitch, column,
                                          head.depth_pitch, tangent);
                    }
                });
            found = margin::target(head.margin, angle);
        }
        if (lane == 0) {
            if (head.target_logits != nullptr) {
                head.target_logits[row] = float(found.logit);
            }
            head.derivatives[row] = float(found.derivative);
            head.target_cosines[row] = float(margin::cosine(angle));
        }
    }
}

// Adds the chunk's row sums to `totals`, tile by tile, and rounds the totals so far to row_sums.
// partial_sums begins at the chunk's first tile; `tiles` may be 0. Unless it is null,
// best_negatives gets the largest cosine so far.
// launch: add_row_sums blocks 4 per SM threads 256 shared 0
// gate: add_row_sums registers <= 64
PFC_KERNEL_OF(add_row_sums, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t tiles, int32_t is_first,
               double* totals)) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t row = thread; row < head.block->rows; row += gridDim.x * blockDim.x) {
        double sum = is_first ? 0.0 : totals[row];
#pragma unroll 8
        for (uint32_t tile = 0; tile < tiles; ++tile) {
            sum += double(head.partial_sums[uint64_t(tile) * head.row_capacity + row]);
        }
        totals[row] = sum;
        head.row_sums[row] = float(sum);
        if (head.best_negatives != nullptr) {
            float best = is_first ? kElsewhere : head.best_negatives[row];
            for (uint32_t tile = 0; tile < tiles; ++tile) {
                const float found = head.partial_best[uint64_t(tile) * head.row_capacity + row];
                best = found > best ? found : best;
            }
            head.best_negatives[row] = best;
        }
    }
}

// Adds the splits of P @ W^ and writes the sum to the caller's float32 matrix.
// launch: write_weighted_centers blocks 4 per SM threads 256 shared 0
// gate: write_weighted_centers registers <= 64
PFC_KERNEL_OF(write_weighted_centers, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView weighted_centers)) {
    for (uint32_t row = rows::first_row(); row < head.block->rows; row += rows::row_stride()) {
        for (uint32_t column = rows::kGroup * (threadIdx.x % 32); column < head.dim;
             column += rows::kSpan) {
            ptx::Float4 sum = rows::zeros();
            for (uint32_t split = 0; split < head.splits; ++split) {
                const uint64_t start =
                    (uint64_t(split) * head.row_capacity + row) * head.depth_pitch;
                const ptx::Float4 more =
                    rows::read_group(head.weighted_centers + start, column, head.depth_pitch);
                sum = ptx::Float4{sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
            }
            rows::write_typed(weighted_centers.data, row * weighted_centers.stride,
                              weighted_centers.dtype, column, head.dim, sum);
        }
    }
}

// Writes each row's offset, c without shifts, and makes row_sums relative to it: a shift is rounded.
// launch: write_row_offsets blocks 4 per SM threads 256 shared 0
// gate: write_row_offsets registers <= 64
PFC_KERNEL_OF(write_row_offsets, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, float* row_offsets)) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t row = thread; row < head.block->rows; row += gridDim.x * blockDim.x) {
        float offset = float(head.margin.offset);
        if (far::has_own_offset(head, row)) {
            offset = far::row_offset(head.margin, head.best_negatives[row]);
            const double shift = -double(head.shifts[row]) / far::kLog2E - double(offset);
            head.row_sums[row] = float(double(head.row_sums[row]) * exp(shift));
        } else if (head.shifts != nullptr) {
            offset = far::given_offset(head.margin, head.best_negatives[row]);
        }
        row_offsets[row] = offset;
    }
}

// Writes the shifts of rows that have these offsets.
// launch: set_shifts blocks 4 per SM threads 256 shared 0
// gate: set_shifts registers <= 64
PFC_KERNEL_OF(set_shifts, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, const float* row_offsets)) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t row = thread; row < head.block->rows; row += gridDim.x * blockDim.x) {
        head.shifts[row] = far::shift_of(head.margin, row_offsets[row]);
    }
}

// Computes factors and coefficients from the sums over the ranks, which the host has checked.
// `sum_offsets`: what the sums are relative to; null: c.
// launch: weigh_rows blocks 4 per SM threads 256 shared 0
// gate: weigh_rows registers <= 64
PFC_KERNEL_OF(weigh_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, const float* row_sums,
               const float* target_logits, const float* sum_offsets)) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t row = thread; row < head.block->rows; row += gridDim.x * blockDim.x) {
        double sum = double(row_sums[row]);
        if (sum_offsets != nullptr && sum_offsets[row] != float(head.margin.offset)) {
            sum *= exp(double(sum_offsets[row]) - head.margin.offset);
        }
        const double denominator = sum + exp(double(target_logits[row]) - head.margin.offset);
        // A row without negatives gets no gradient.
        const bool counts = sum > 0.0;
        const float factor =
            float(head.margin.scale / denominator * far::from_own_offset(head, row));
        // It leaves float32 where all negatives are other ranks' and far: nothing is weighed here.
        head.factors[row] = counts && rows::is_finite(double(factor)) ? factor : 0.0f;
        head.coefficients[row] =
            counts ? float(-head.margin.scale * (sum / denominator) * double(head.derivatives[row]))
                   : 0.0f;
    }
}

// Writes dE to the caller's matrix. Comes before scale_embeddings, which turns the tangents.
// launch: finish_given_rows blocks 4 per SM threads 256 shared 0
// gate: finish_given_rows registers <= 64
PFC_KERNEL_OF(finish_given_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView weighted_centers,
               double loss_weight, MatrixView gradient)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = rows::first_row(); row < head.block->rows; row += rows::row_stride()) {
        const float factor = head.factors[row], coefficient = head.coefficients[row];
        const bool pulled = coefficient != 0.0f && head.columns[row] != kNone;
        // The gradient of the unit row, computed twice rather than kept.
        auto unit_gradient = [&](uint32_t column) {
            ptx::Float4 sum = rows::zeros();
            if (factor != 0.0f) {
                sum = rows::scaled(factor, group_of(weighted_centers, row, column));
            }
            if (pulled) {
                const ptx::Float4 t = rows::read_group(
                    head.tangents + uint64_t(row) * head.depth_pitch, column, head.depth_pitch);
                sum = ptx::Float4{sum.x + coefficient * t.x, sum.y + coefficient * t.y,
                                  sum.z + coefficient * t.z, sum.w + coefficient * t.w};
            }
            return sum;
        };
        const float* const unit = head.units + uint64_t(row) * head.depth_pitch;
        double dot = 0.0;
        for (uint32_t column = rows::kGroup * lane; column < head.dim; column += rows::kSpan) {
            dot = rows::add_products(dot, unit_gradient(column),
                                     rows::read_group(unit, column, head.depth_pitch));
        }
        const float along = float(warp_sum(dot));
        const float length = head.inverse_norms[row] * float(loss_weight);
        for (uint32_t column = rows::kGroup * lane; column < head.dim; column += rows::kSpan) {
            const ptx::Float4 g = unit_gradient(column);
            const ptx::Float4 u = rows::read_group(unit, column, head.depth_pitch);
            rows::write_typed(gradient.data, row * gradient.stride, gradient.dtype, column,
                              head.dim, rows::subtract_along(g, along, u, length));
        }
    }
}

// Writes dW of a chunk, from its dW^ in center_gradient, to rows first .. of the caller's matrix.
// launch: write_center_rows blocks 4 per SM threads 256 shared 0
// gate: write_center_rows registers <= 64
PFC_KERNEL_OF(write_center_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, uint64_t first, uint32_t count,
               MatrixView centers, MatrixView gradient)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t slot = rows::first_row(); slot < count; slot += rows::row_stride()) {
        const uint64_t row = first + slot;
        const float* const unit_gradient = head.center_gradient + uint64_t(slot) * head.dim;
        double dot = 0.0;
        for (uint32_t column = rows::kGroup * lane; column < head.dim; column += rows::kSpan) {
            dot = rows::add_products(dot, rows::read_floats(unit_gradient, column, head.dim),
                                     group_of(centers, row, column));
        }
        const float inverse = head.center_inverse_norms[row];
        const float along = float(warp_sum(dot) * double(inverse)) * inverse;
        for (uint32_t column = rows::kGroup * lane; column < head.dim; column += rows::kSpan) {
            const ptx::Float4 made =
                rows::subtract_along(rows::read_floats(unit_gradient, column, head.dim), along,
                                     group_of(centers, row, column), inverse);
            rows::write_typed(gradient.data, row * gradient.stride, gradient.dtype, column,
                              head.dim, made);
        }
    }
}
