// What pfc_fused_forward and pfc_fused_backward do between a head's products, over a caller's rows:
// target angles, row sums, gradients in the caller's types.
//
//     zt_i = scale * psi(angle(E_i, W_y)),  N_i = sum of the chunks' partial sums
//     L_i = N_i + exp(zt_i - c),  factor_i = scale / L_i
//     coefficient_i = -scale * (N_i / L_i) * psi'_i
//     dE^_i = factor_i * (P @ W^)_i + coefficient_i * W^_y
//     dE_i of dE^_i and dW_j of the third product's dW^_j by the backward of normalize
//
// Floor: B d elements of E, of P @ W^ and of dE, S d of W, dW^ and dW, each once or twice. Agrees with
// Cpu::fused_forward and fused_backward (src/device/cpu/kernels.rs).
#include "angle.h"

namespace {

PFC_DEVICE ptx::Float4 group_of(const MatrixView& matrix, uint64_t row, uint32_t column) {
    return rows::read_typed(matrix.data, row * matrix.stride, matrix.dtype, column,
                            uint32_t(matrix.columns));
}

}  // namespace

// target_logits, where there are any, and derivatives of the rows whose class is among the centres;
// 0 of the others.
// gate: find_given_targets registers <= 128
PFC_KERNEL_OF(find_given_targets, 256, 2,
              (const PFC_GRID_CONSTANT HeadView view, MatrixView embeddings, MatrixView centers)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = rows::first_row(); row < view.block->rows; row += rows::row_stride()) {
        const uint32_t target = view.columns[row];
        margin::Target found = {0.0, 0.0};
        if (target != kNone) {
            const double angle = angle::between(
                view.dim, [&](uint32_t column) { return group_of(embeddings, row, column); },
                [&](uint32_t column) { return group_of(centers, target, column); });
            found = margin::target(view.margin, angle);
        }
        if (lane == 0) {
            if (view.target_logits != nullptr) {
                view.target_logits[row] = float(found.logit);
            }
            view.derivatives[row] = float(found.derivative);
        }
    }
}

// Adds the chunk's row sums to `totals`, tile by tile, and rounds what there is by then to
// row_sums. partial_sums begins at the chunk's first tile; `tiles` may be 0.
// gate: add_row_sums registers <= 64
PFC_KERNEL_OF(add_row_sums, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, uint32_t tiles, int32_t is_first,
               double* totals)) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t row = thread; row < view.block->rows; row += gridDim.x * blockDim.x) {
        double sum = is_first ? 0.0 : totals[row];
#pragma unroll 8
        for (uint32_t tile = 0; tile < tiles; ++tile) {
            sum += double(view.partial_sums[uint64_t(tile) * view.row_capacity + row]);
        }
        totals[row] = sum;
        view.row_sums[row] = float(sum);
    }
}

// P @ W^ from its parts, in the caller's float32 matrix.
// gate: write_weighted registers <= 64
PFC_KERNEL_OF(write_weighted, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, MatrixView weighted)) {
    for (uint32_t row = rows::first_row(); row < view.block->rows; row += rows::row_stride()) {
        for (uint32_t column = rows::kGroup * (threadIdx.x % 32); column < view.dim;
             column += rows::kSpan) {
            ptx::Float4 sum = rows::zeros();
            for (uint32_t split = 0; split < view.splits; ++split) {
                const uint64_t part =
                    (uint64_t(split) * view.row_capacity + row) * view.depth_pitch;
                const ptx::Float4 more =
                    rows::read_group(view.weighted + part, column, view.depth_pitch);
                sum = ptx::Float4{sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
            }
            rows::write_typed(weighted.data, row * weighted.stride, weighted.dtype, column,
                              view.dim, sum);
        }
    }
}

// factors and coefficients from the sums over the ranks, which the host has judged.
// gate: weigh_rows registers <= 64
PFC_KERNEL_OF(weigh_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, const float* row_sums,
               const float* target_logits)) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t row = thread; row < view.block->rows; row += gridDim.x * blockDim.x) {
        const double sum = double(row_sums[row]);
        const double whole = sum + exp(double(target_logits[row]) - view.margin.offset);
        // A row without negatives gets no gradient.
        const bool counts = sum > 0.0;
        view.factors[row] = counts ? float(view.margin.scale / whole) : 0.0f;
        view.coefficients[row] =
            counts ? float(-view.margin.scale * (sum / whole) * double(view.derivatives[row]))
                   : 0.0f;
    }
}

// dE in the caller's matrix. Comes after all chunks of W^, whose norms it takes.
// gate: finish_given_rows registers <= 64
PFC_KERNEL_OF(finish_given_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, MatrixView centers, MatrixView weighted,
               double loss_weight, MatrixView gradient)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = rows::first_row(); row < view.block->rows; row += rows::row_stride()) {
        const float factor = view.factors[row];
        const uint32_t target = view.columns[row];
        const bool pulled = factor != 0.0f && target != kNone;
        const float share =
            pulled ? view.coefficients[row] * view.center_inverse_norms[target] : 0.0f;
        // Of the unit row; made twice rather than kept.
        auto unit_gradient = [&](uint32_t column) {
            ptx::Float4 sum = rows::zeros();
            if (factor != 0.0f) {
                sum = rows::scaled(factor, group_of(weighted, row, column));
            }
            if (pulled) {
                const ptx::Float4 w = group_of(centers, target, column);
                sum = ptx::Float4{sum.x + share * w.x, sum.y + share * w.y, sum.z + share * w.z,
                                  sum.w + share * w.w};
            }
            return sum;
        };
        const float* const unit = view.units + uint64_t(row) * view.depth_pitch;
        double dot = 0.0;
        for (uint32_t column = rows::kGroup * lane; column < view.dim; column += rows::kSpan) {
            dot = rows::add_products(dot, unit_gradient(column),
                                     rows::read_group(unit, column, view.depth_pitch));
        }
        const float along = float(rows::sum_of_warp(dot));
        const float length = view.inverse_norms[row] * float(loss_weight);
        for (uint32_t column = rows::kGroup * lane; column < view.dim; column += rows::kSpan) {
            const ptx::Float4 g = unit_gradient(column);
            const ptx::Float4 u = rows::read_group(unit, column, view.depth_pitch);
            rows::write_typed(gradient.data, row * gradient.stride, gradient.dtype, column,
                              view.dim, rows::subtract_along(g, along, u, length));
        }
    }
}

// dW of a chunk, from its dW^ in center_gradient, to rows first .. of the caller's matrix.
// gate: write_center_rows registers <= 64
PFC_KERNEL_OF(write_center_rows, 256, 4,
              (const PFC_GRID_CONSTANT HeadView view, uint64_t first, uint32_t count,
               MatrixView centers, MatrixView gradient)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t slot = rows::first_row(); slot < count; slot += rows::row_stride()) {
        const uint64_t row = first + slot;
        const float* const unit_gradient = view.center_gradient + uint64_t(slot) * view.dim;
        double dot = 0.0;
        for (uint32_t column = rows::kGroup * lane; column < view.dim; column += rows::kSpan) {
            dot = rows::add_products(dot, rows::read_floats(unit_gradient, column, view.dim),
                                     group_of(centers, row, column));
        }
        const float inverse = view.center_inverse_norms[row];
        const float along = float(rows::sum_of_warp(dot) * double(inverse)) * inverse;
        for (uint32_t column = rows::kGroup * lane; column < view.dim; column += rows::kSpan) {
            const ptx::Float4 made =
                rows::subtract_along(rows::read_floats(unit_gradient, column, view.dim), along,
                                     group_of(centers, row, column), inverse);
            rows::write_typed(gradient.data, row * gradient.stride, gradient.dtype, column,
                              view.dim, made);
        }
    }
}
