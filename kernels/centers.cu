// Class centers: gathered and normalized for the products, read and written for callers, brought up
// to date.
//
//     W^_j = W_j / |W_j| of a chunk of the sample's columns, as operands; dense rows as they are
//     after the latest update
//
// Fused: the row's replay, its norm, both operands. The gather brings a copy up to date, never the
// row itself: gathering twice changes nothing. Floor of a gather: 4 d bytes read, in bf16 2 d, and
// 4 d (half) or 6 d (f32) written a row, 512 MB for 125000 rows of 512 in half; dense rows that are
// behind also read their state. Agrees with src/device/cpu/rows.rs and `gather` of
// src/device/cpu/products.rs.
#include "replay.h"

namespace {

PFC_DEVICE stored::Tensor tensor_of(const HeadArrays& head, int32_t tensor) {
    return tensor == 0   ? stored::centers(head)
           : tensor == 1 ? stored::momentum(head)
                         : stored::second_moment(head);
}

}  // namespace

// launch: gather_centers blocks 8 per SM threads 256 shared 0
// gate: gather_centers registers <= 72
PFC_KERNEL(gather_centers, (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first)) {
    if (head.block->status != kOk || first >= head.block->classes) {
        return;
    }
    const uint32_t count = smaller(head.chunk_capacity, head.block->classes - first),
                   lane = threadIdx.x % 32;
    // The products read rows to the end of the last tile: those beyond `count` are zero.
    for (uint32_t slot = rows::first_row(); slot < round_up(count, kTileColumns);
         slot += rows::row_stride()) {
        const bool counts = slot < count;
        uint32_t row = 0;
        replay::Missed missed = {};
        float inverse = 0.0f;
        if (counts) {
            row = head.sample[first + slot];
            missed = replay::missed(head, row);
            double squares = 0.0;
            for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
                squares = rows::add_squares(
                    squares, replay::center(head, missed, row, base + rows::kGroup * lane));
            }
            inverse = float(rows::center_inverse_norm(warp_sum(squares)));
            if (lane == 0) {
                head.center_inverse_norms[first + slot] = inverse;
            }
        }
        for (uint32_t base = 0; base < head.depth_pitch; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 unit = rows::zeros();
            if (counts) {
                unit = rows::scaled(inverse, replay::center(head, missed, row, column));
            }
            if (column >= head.depth_pitch) {
                continue;
            }
            if (column >= head.master_pitch) {
                unit = rows::zeros();  // a row that overflowed would give NaNs here
            }
            const uint64_t at = uint64_t(slot) * head.depth_pitch + column;
            if (head.split_operands) {
                rows::write_split(head.center_operand + at, head.plane_centers, unit);
            } else {
                rows::write_half(head.center_operand + at, unit);
                rows::write_bfloat(head.center_wide + at, unit);
            }
        }
    }
}

// Writes rows first .. of W (tensor 0), m (1) or v (2), brought up to date, to `out`.
// launch: read_rows blocks 4 per SM threads 256 shared 0
// gate: read_rows registers <= 72
PFC_KERNEL(read_rows, (const PFC_GRID_CONSTANT HeadArrays head, int32_t tensor, uint32_t first,
                       MatrixView out)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint64_t i = rows::first_row(); i < out.rows; i += rows::row_stride()) {
        const uint32_t row = first + uint32_t(i);
        const replay::Missed missed = replay::missed(head, row);
        for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 values;
            if (missed.count == 0) {
                values = stored::read(head, tensor_of(head, tensor), row, column);
            } else {
                const stored::Group now = replay::current(head, missed, row, column);
                values = tensor == 0 ? now.w : tensor == 1 ? now.m : now.v;
            }
            rows::write_typed(out.data, i * out.stride, out.dtype, column, head.dim, values);
        }
    }
}

// Overwrites rows of one tensor, in bf16 with the nearest; the other tensors of a dense row are
// brought up to date first.
// launch: write_rows blocks 4 per SM threads 256 shared 0
// gate: write_rows registers <= 96
PFC_KERNEL(write_rows,
           (const PFC_GRID_CONSTANT HeadArrays head, int32_t tensor, uint32_t first,
            MatrixView in)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint64_t i = rows::first_row(); i < in.rows; i += rows::row_stride()) {
        const uint32_t row = first + uint32_t(i);
        const replay::Missed missed = replay::missed(head, row);
        if (missed.count != 0) {
            replay::catch_up_row(head, missed, row);
            ptx::sync_warp();  // every lane has read last_update
            if (lane == 0) {
                head.last_update[row] = uint32_t(head.ledger->updates);
            }
        }
        for (uint32_t column = rows::kGroup * lane; column < head.master_pitch;
             column += rows::kSpan) {
            const ptx::Float4 values =
                rows::read_typed(in.data, i * in.stride, in.dtype, column, head.dim);
            stored::write_nearest(head, tensor_of(head, tensor), row, column, values);
        }
    }
}

// Brings the dense rows last touched before update `before` up to date, so that the ring of missed
// updates can reuse their slots.
// launch: catch_up_rows blocks 8 per SM threads 256 shared 0
// gate: catch_up_rows registers <= 96
PFC_KERNEL(catch_up_rows, (const PFC_GRID_CONSTANT HeadArrays head, uint64_t before)) {
    if (!head.optimizer.dense) {
        return;
    }
    for (uint32_t row = rows::first_row(); row < head.shard_rows; row += rows::row_stride()) {
        const replay::Missed missed = replay::missed(head, row);
        if (missed.count == 0 || missed.last_update >= before) {
            continue;
        }
        replay::catch_up_row(head, missed, row);
        ptx::sync_warp();  // every lane has read last_update
        if (threadIdx.x % 32 == 0) {
            head.last_update[row] = uint32_t(head.ledger->updates);
        }
    }
}

// Takes the rows, all of them up to date, as those after update `updates`.
// launch: set_updates blocks 1 per SM threads 256 shared 0
// gate: set_updates registers <= 16
PFC_KERNEL(set_updates, (const PFC_GRID_CONSTANT HeadArrays head, uint64_t updates)) {
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
    if (first == 0) {
        head.ledger->updates = updates;
    }
    if (head.optimizer.dense) {
        for (uint32_t row = first; row < head.shard_rows; row += gridDim.x * blockDim.x) {
            head.last_update[row] = uint32_t(updates);
        }
    }
}
