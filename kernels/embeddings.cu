// A step's embeddings: packed for the other ranks, judged, normalised, and the angle of each to its
// class centre.
//
//     sent_i = s_i E_i,  s_i = 2^-floor(log2 max_k |E_ik|) where they travel in f16, else 1
//     E^_i = sent_i / |sent_i| = E_i / |E_i|
//     zt_i = scale * psi(angle(E_i, W_y)),  psi'_i
//
// A row in f16 has its largest magnitude in [1, 2), whatever its norm: it neither overflows nor
// loses its digits, and the receiver needs its direction alone. Its own rank keeps s_i for the
// backward of normalize (finish_gradient).
//
// Fused: packing, the row's largest magnitude with its scaling and rounding; normalising, the norm,
// E^ in float32 and as operands of the products, and the clearing of all per-row results of the
// step. Floor: B * d elements read twice (the second time from the cache), B * pitch written in
// float32 and as operands; 17 MB at 4096 rows of 512 in half precision. Agrees with
// CpuHead::pack_embeddings and embed (src/device/cpu/step.rs), send_scale
// (src/device/cpu/vector.rs) and src/margin.rs angle.
#include "angle.h"
#include "ptx/atomic.h"
#include "replay.h"

namespace {

// Where the raw row of a step's row is.
struct RawRow {
    const uint8_t* data;
    uint64_t start;
    int32_t dtype;
};

PFC_DEVICE RawRow raw_row(const HeadView& view, const MatrixView& source, uint32_t row) {
    if (view.sharded) {
        const uint64_t place = view.origins[view.block->first_computed + row];
        return RawRow{view.embeddings_recv, place * view.dim, view.gather_dtype};
    }
    return RawRow{source.data, row * source.stride, source.dtype};
}

PFC_DEVICE bool ignored(const HeadView& view, uint32_t global_row) {
    return view.labels[global_row] == view.ignore_label;
}

constexpr uint32_t kInfinityBits = 0x7f800000u;  // magnitudes from here on are no numbers
constexpr uint32_t kShortestBits = 0x2b8cbcccu;  // rows::kShortest in float32
constexpr uint32_t kOneExponent = 127;           // the exponent field of 1

// The power of two that takes the row's largest magnitude into [1, 2). It and its inverse are
// normal float32 numbers: a largest magnitude of 2^127 or more comes into [2, 4). 0 for a row
// without a direction, 1 for one with a NaN or an infinity: that is still there in f16.
PFC_DEVICE float send_scale(const MatrixView& source, uint64_t start, uint32_t dim) {
    const uint32_t lane = threadIdx.x % 32;
    // As integers magnitudes have the order of the numbers, with NaN above them all.
    uint32_t largest = 0;
    for (uint32_t column = lane; column < dim; column += 32) {
        const float value = rows::read_element(source.data, start + column, source.dtype);
        const uint32_t magnitude = ptx::float_bits(value) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = ptx::shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    if (largest >= kInfinityBits) {
        return 1.0f;
    }
    // A row with a larger element has a larger norm.
    if (largest <= kShortestBits) {
        double squares = 0.0;
        for (uint32_t column = rows::kGroup * lane; column < dim; column += rows::kSpan) {
            squares = rows::add_squares(
                squares, rows::read_typed(source.data, start, source.dtype, column, dim));
        }
        if (rows::inverse_norm(rows::sum_of_warp(squares)) == 0.0) {
            return 0.0f;
        }
    }
    const uint32_t exponent = rows::least(largest >> 23, 2 * kOneExponent - 1);
    return ptx::bits_float((2 * kOneExponent - exponent) << 23);
}

}  // namespace

// embeddings_send = `batch` rows of the source in gather_dtype, then zeros; send_scales. Does not
// ask for the status: the other ranks wait for these rows whatever becomes of the step.
// gate: pack_embeddings registers <= 32
// gate: pack_embeddings on 100,120 registers <= 56
PFC_KERNEL(pack_embeddings,
           (const PFC_GRID_CONSTANT HeadView view, MatrixView source, uint64_t batch)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = rows::first_row(); row < view.max_batch; row += rows::row_stride()) {
        const uint64_t start = row * source.stride;
        float scale = 1.0f;
        if (view.send_scales != nullptr) {
            scale = row < batch ? send_scale(source, start, view.dim) : 0.0f;
            if (lane == 0) {
                view.send_scales[row] = scale;
            }
        }
        for (uint32_t column = lane; column < view.dim; column += 32) {
            float value = 0.0f;
            if (row < batch) {
                value = scale * rows::read_element(source.data, start + column, source.dtype);
            }
            rows::write_element(view.embeddings_send, uint64_t(row) * view.dim + column,
                                view.gather_dtype, value);
        }
    }
}

// gate: normalize_embeddings registers <= 48
PFC_KERNEL(normalize_embeddings, (const PFC_GRID_CONSTANT HeadView view, MatrixView source)) {
    if (view.block->status != kOk) {
        return;
    }
    const uint32_t count = view.block->rows, lane = threadIdx.x % 32;
    // Rows to the end of the last tile are zero: the products read them.
    for (uint32_t row = rows::first_row(); row < rows::round_up(count, kTileRows);
         row += rows::row_stride()) {
        const bool counts = row < count && !ignored(view, view.block->first_computed + row);
        RawRow raw = {nullptr, 0, kF32};
        double squares = 0.0;
        if (counts) {
            raw = raw_row(view, source, row);
            for (uint32_t column = rows::kGroup * lane; column < view.dim; column += rows::kSpan) {
                squares = rows::add_squares(
                    squares, rows::read_typed(raw.data, raw.start, raw.dtype, column, view.dim));
            }
            squares = rows::sum_of_warp(squares);
        }
        const bool finite = rows::is_finite(squares);
        const float inverse = counts && finite ? float(rows::inverse_norm(squares)) : 0.0f;
        if (lane == 0) {
            if (!finite) {
                ptx::atomic_min(&view.block->bad_row, row);
            }
            view.inverse_norms[row] = inverse;
            view.target_logits[row] = 0.0f;
            view.derivatives[row] = 0.0f;
            view.coefficients[row] = 0.0f;
            view.factors[row] = 0.0f;
            view.row_sums[row] = 0.0f;
            view.best_negatives[row] = kElsewhere;
            view.target_cosines[row] = counts ? kElsewhere : kIgnored;
        }
        for (uint32_t column = rows::kGroup * lane; column < view.depth_pitch;
             column += rows::kSpan) {
            ptx::Float4 unit = rows::zeros();
            if (counts && finite && column < view.dim) {
                unit = rows::scaled(
                    inverse, rows::read_typed(raw.data, raw.start, raw.dtype, column, view.dim));
            }
            const uint64_t at = uint64_t(row) * view.depth_pitch + column;
            *reinterpret_cast<ptx::Float4*>(view.units + at) = unit;
            if (view.split_operands) {
                rows::write_split(view.unit_operand + at, view.plane_rows, unit);
            } else {
                rows::write_half(view.unit_operand + at, unit);
            }
        }
    }
}

// The verdict on the rows: sharded, the same on all ranks, as all have all rows.
// gate: judge_embeddings registers <= 16
PFC_KERNEL(judge_embeddings, (const PFC_GRID_CONSTANT HeadView view)) {
    StepBlock& block = *view.block;
    if (blockIdx.x != 0 || threadIdx.x != 0 || block.status != kOk || block.bad_row == kNone) {
        return;
    }
    const uint32_t place =
        view.sharded ? view.origins[block.first_computed + block.bad_row] : block.bad_row;
    block.status = kNotFinite;
    block.fault = kFaultEmbedding;
    block.rank = view.sharded ? int32_t(place / view.max_batch) : int32_t(view.rank);
    block.row = view.sharded ? place % view.max_batch : place;
}

// The angle of each row whose class centre is in this rank's sample, and the margin on it. Reads the
// rows as they came, not E^, which is rounded.
// gate: find_targets registers <= 88
PFC_KERNEL(find_targets, (const PFC_GRID_CONSTANT HeadView view, MatrixView source)) {
    if (view.block->status != kOk) {
        return;
    }
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = rows::first_row(); row < view.block->rows; row += rows::row_stride()) {
        const uint32_t global = view.block->first_computed + row;
        const uint32_t target = view.columns[global];
        if (target == kNone || ignored(view, global)) {
            continue;
        }
        const RawRow raw = raw_row(view, source, row);
        const uint32_t center = view.sample[target];
        const replay::Missed missed = replay::missed(view, center);
        const double angle = angle::between(
            view.dim,
            [&](uint32_t column) {
                return rows::read_typed(raw.data, raw.start, raw.dtype, column, view.dim);
            },
            [&](uint32_t column) { return replay::center(view, missed, center, column); });
        if (lane == 0) {
            const margin::Target found = margin::target(view.margin, angle);
            view.target_logits[row] = float(found.logit);
            view.target_cosines[row] = float(margin::cosine(angle));
            view.derivatives[row] = float(found.derivative);
        }
    }
}
