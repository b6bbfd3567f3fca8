// Class centres: gathered and normalised for the products, read and written for callers, brought to
// now.
//
//     W^_j = W_j / |W_j| of a chunk of the sample's columns, as operands; dense rows as they are
//     after the latest update
//
// Fused: the row's replay, its norm, both operands. A copy is brought to now, never the row itself:
// gathering twice changes nothing. Floor of a gather: 4 d bytes read and 4 d (half) or 6 d (f32)
// written a row, 512 MB for 125000 rows of 512 in half; dense rows that are behind also read their
// state. Agrees with src/table.rs and Pass::gather of src/device/cpu/fused.rs.
#include "replay.h"

namespace {

PFC_DEVICE float* tensor_of(const HeadView& view, int32_t tensor) {
    return tensor == 0 ? view.centers : tensor == 1 ? view.momentum : view.second_moment;
}

}  // namespace

// gate: gather_centers registers <= 72
PFC_KERNEL(gather_centers, (const PFC_GRID_CONSTANT HeadView view, uint32_t first)) {
    if (view.block->status != kOk || first >= view.block->classes) {
        return;
    }
    const uint32_t count = rows::least(view.chunk_capacity, view.block->classes - first),
                   lane = threadIdx.x % 32;
    // Rows to the end of the last tile are zero: the products read them.
    for (uint32_t slot = rows::first_row(); slot < rows::round_up(count, kTileColumns);
         slot += rows::row_stride()) {
        const bool counts = slot < count;
        uint32_t row = 0;
        replay::Missed missed = {};
        float inverse = 0.0f;
        if (counts) {
            row = view.sample[first + slot];
            missed = replay::missed(view, row);
            double squares = 0.0;
            for (uint32_t base = 0; base < view.dim; base += rows::kSpan) {
                squares = rows::add_squares(
                    squares, replay::center(view, missed, row, base + rows::kGroup * lane));
            }
            inverse = float(rows::inverse_norm(rows::sum_of_warp(squares)));
            if (lane == 0) {
                view.center_inverse_norms[first + slot] = inverse;
            }
        }
        for (uint32_t base = 0; base < view.depth_pitch; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 unit = rows::zeros();
            if (counts) {
                unit = rows::scaled(inverse, replay::center(view, missed, row, column));
            }
            if (column >= view.depth_pitch) {
                continue;
            }
            if (column >= view.master_pitch) {
                unit = rows::zeros();  // not a NaN of a row that overflowed
            }
            const uint64_t at = uint64_t(slot) * view.depth_pitch + column;
            if (view.split_operands) {
                rows::write_split(view.center_operand + at, view.plane_centers, unit);
            } else {
                rows::write_half(view.center_operand + at, unit);
                rows::write_bfloat(view.center_wide + at, unit);
            }
        }
    }
}

// Rows first .. of W (tensor 0), m (1) or v (2) as they are now.
// gate: read_rows registers <= 72
PFC_KERNEL(read_rows, (const PFC_GRID_CONSTANT HeadView view, int32_t tensor, uint32_t first,
                       MatrixView out)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint64_t i = rows::first_row(); i < out.rows; i += rows::row_stride()) {
        const uint32_t row = first + uint32_t(i);
        const uint64_t start = uint64_t(row) * view.master_pitch;
        const replay::Missed missed = replay::missed(view, row);
        for (uint32_t base = 0; base < view.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 values;
            if (missed.gap == 0) {
                values =
                    rows::read_group(tensor_of(view, tensor) + start, column, view.master_pitch);
            } else {
                ptx::Float4 w = rows::read_group(view.centers + start, column, view.master_pitch);
                ptx::Float4 m = rows::read_group(view.momentum + start, column, view.master_pitch);
                ptx::Float4 v = rows::zeros();
                if (view.optimizer.adamw) {
                    v = rows::read_group(view.second_moment + start, column, view.master_pitch);
                }
                replay::catch_up(view, missed, w, m, v);
                values = tensor == 0 ? w : tensor == 1 ? m : v;
            }
            rows::write_typed(out.data, i * out.stride, out.dtype, column, view.dim, values);
        }
    }
}

// Overwrites rows of one tensor; the other tensors of a dense row are brought to now first.
// gate: write_rows registers <= 88
PFC_KERNEL(write_rows,
           (const PFC_GRID_CONSTANT HeadView view, int32_t tensor, uint32_t first, MatrixView in)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint64_t i = rows::first_row(); i < in.rows; i += rows::row_stride()) {
        const uint32_t row = first + uint32_t(i);
        const uint64_t start = uint64_t(row) * view.master_pitch;
        const replay::Missed missed = replay::missed(view, row);
        if (missed.gap != 0) {
            replay::catch_up_row(view, missed, row);
            ptx::sync_warp();  // every lane has read `last`
            if (lane == 0) {
                view.last[row] = uint32_t(view.ledger->updates);
            }
        }
        for (uint32_t column = rows::kGroup * lane; column < view.master_pitch;
             column += rows::kSpan) {
            const ptx::Float4 values =
                rows::read_typed(in.data, i * in.stride, in.dtype, column, view.dim);
            rows::write_group(tensor_of(view, tensor) + start, column, view.master_pitch, values);
        }
    }
}

// Brings the dense rows last touched before update `before` to now, so that the ring of gaps may
// forget what they missed.
// gate: catch_up_rows registers <= 80
PFC_KERNEL(catch_up_rows, (const PFC_GRID_CONSTANT HeadView view, uint64_t before)) {
    if (!view.optimizer.dense) {
        return;
    }
    for (uint32_t row = rows::first_row(); row < view.shard_rows; row += rows::row_stride()) {
        const replay::Missed missed = replay::missed(view, row);
        if (missed.gap == 0 || missed.last >= before) {
            continue;
        }
        replay::catch_up_row(view, missed, row);
        ptx::sync_warp();  // every lane has read `last`
        if (threadIdx.x % 32 == 0) {
            view.last[row] = uint32_t(view.ledger->updates);
        }
    }
}
