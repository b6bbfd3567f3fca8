// The gradient of the embeddings: of the unit rows, then back through normalize.
//
//     dE^_i = factor_i * (P @ W^)_i + coefficient_i * W^_y
//     dE_i = (dE^_i - (dE^_i . E^_i) E^_i) * s_i / |sent_i| * factor / valid rows
//
// where sent_i = s_i E_i is the row as it travelled (embeddings.cu), so that s_i / |sent_i| is
// 1 / |E_i|.
//
// Fused: the sum over the splits of the second product, the target's term, the places of D. Floor:
// splits * B * pitch floats and B target rows read, ranks * max_batch * d floats written (16 MB at
// 4096 rows of 512 and one split). Agrees with CpuHead::backward and finish_gradient
// (src/device/cpu/step.rs) and normalize_backward (src/device/cpu/vector.rs).
#include "replay.h"

namespace {

// Which row came from this place of B and D, rank * max_batch + number; kNone: none did.
PFC_DEVICE uint32_t row_of(const HeadView& view, uint32_t place) {
    const uint32_t count = view.block->rows;
    const uint32_t* origins = view.origins + view.block->first_computed;
    // Where all batches are full a place is its row; else origins are searched, as they ascend.
    if (place < count && origins[place] == place) {
        return place;
    }
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (origins[middle] < place) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && origins[low] == place ? low : kNone;
}

}  // namespace

// Sharded: gradient_send, a row for each place, zeros where no row came from. Replicated:
// gradient_recv. A failed step sends zeros.
// gate: embedding_gradient registers <= 120
PFC_KERNEL(embedding_gradient, (const PFC_GRID_CONSTANT HeadView view)) {
    const bool failed = view.block->status != kOk;
    const uint32_t lane = threadIdx.x % 32;
    float* const gradient = view.sharded ? view.gradient_send : view.gradient_recv;
    const uint32_t places = view.sharded ? view.label_capacity : view.max_batch;
    for (uint32_t place = rows::first_row(); place < places; place += rows::row_stride()) {
        uint32_t row = kNone;
        if (!failed) {
            row = view.sharded ? row_of(view, place) : place < view.block->rows ? place : kNone;
        }
        const float factor = row == kNone ? 0.0f : view.factors[row];
        uint32_t target = kNone, center = 0;
        replay::Missed missed = {};
        float share = 0.0f;
        if (factor != 0.0f) {
            target = view.columns[view.block->first_computed + row];
            if (target != kNone) {
                center = view.sample[target];
                missed = replay::missed(view, center);
                share = view.coefficients[row] * view.center_inverse_norms[target];
            }
        }
        for (uint32_t base = 0; base < view.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 sum = rows::zeros();
            if (factor != 0.0f) {
                for (uint32_t split = 0; split < view.splits; ++split) {
                    const uint64_t part =
                        (uint64_t(split) * view.row_capacity + row) * view.depth_pitch;
                    const ptx::Float4 more =
                        rows::read_group(view.weighted + part, column, view.depth_pitch);
                    sum.x += more.x;
                    sum.y += more.y;
                    sum.z += more.z;
                    sum.w += more.w;
                }
                sum = rows::scaled(factor, sum);
                if (target != kNone) {
                    const ptx::Float4 w = replay::center(view, missed, center, column);
                    sum.x += share * w.x;
                    sum.y += share * w.y;
                    sum.z += share * w.z;
                    sum.w += share * w.w;
                }
            }
            rows::write_floats(gradient + uint64_t(place) * view.dim, column, view.dim, sum);
        }
    }
}

// This rank's own rows from gradient_recv to the caller's matrix, which may be null: then for the
// squares alone. A failed step gives zeros.
// gate: finish_gradient registers <= 56
PFC_KERNEL(finish_gradient,
           (const PFC_GRID_CONSTANT HeadView view, double factor, MatrixView out)) {
    const StepBlock& block = *view.block;
    const bool failed = block.status != kOk;
    const uint32_t lane = threadIdx.x % 32;
    const double weight = block.valid_rows == 0 ? 0.0 : factor / double(block.valid_rows);
    for (uint32_t i = rows::first_row(); i < block.own_rows; i += rows::row_stride()) {
        const uint64_t unit_start = uint64_t(block.first_own + i) * view.depth_pitch;
        const float* const from = view.gradient_recv + uint64_t(i) * view.dim;
        double along = 0.0, squares = 0.0;
        float length = 0.0f;
        if (!failed) {
            for (uint32_t column = rows::kGroup * lane; column < view.dim; column += rows::kSpan) {
                const ptx::Float4 unit =
                    rows::read_group(view.units + unit_start, column, view.depth_pitch);
                along = rows::add_products(along, rows::read_floats(from, column, view.dim), unit);
            }
            along = rows::sum_of_warp(along);
            const float scale = view.send_scales == nullptr ? 1.0f : view.send_scales[i];
            length = view.inverse_norms[block.first_own + i] * scale * float(weight);
        }
        for (uint32_t column = rows::kGroup * lane; column < view.dim; column += rows::kSpan) {
            ptx::Float4 made = rows::zeros();
            if (!failed) {
                const ptx::Float4 unit =
                    rows::read_group(view.units + unit_start, column, view.depth_pitch);
                const ptx::Float4 g = rows::read_floats(from, column, view.dim);
                made = rows::subtract_along(g, float(along), unit, length);
            }
            squares = rows::add_squares(squares, made);
            if (out.data != nullptr) {
                rows::write_typed(out.data, i * out.stride, out.dtype, column, view.dim, made);
            }
        }
        squares = rows::sum_of_warp(squares);
        if (lane == 0) {
            view.squares[i] = float(squares);
        }
    }
}

// block->grad_embeddings (which 0: own rows) or grad_centers (1: the sample's columns). One CTA, of
// up to 1024 threads: a sample's squares are many for the loads that fewer have under way.
// gate: sum_squares registers <= 32
PFC_KERNEL_OF(sum_squares, 1024, 1,
              (const PFC_GRID_CONSTANT HeadView view, int32_t which)) {
    PFC_DYNAMIC_SHARED(dynamic);
    StepBlock& block = *view.block;
    if (blockIdx.x != 0 || block.status != kOk) {
        return;
    }
    const uint32_t count = which == 0 ? block.own_rows : block.classes;
    const float* const squares = which == 0 ? view.squares : view.center_squares;
    double sum = 0.0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        sum += double(squares[i]);
    }
    sum = rows::sum_of_block(sum, reinterpret_cast<double*>(dynamic));
    if (threadIdx.x == 0) {
        (which == 0 ? block.grad_embeddings : block.grad_centers) = sum;
    }
}
