// A step's embeddings: packed for the other ranks, checked, normalized, and the angle of each to
// its class center.
//
//     sent_i = s_i E_i,  s_i = 2^-floor(log2 max_k |E_ik|) where they travel in f16, else 1
//     E^_i = sent_i / |sent_i| = E_i / |E_i|
//     zt_i = scale * psi(angle(E_i, W_y)),  psi'_i,  T_i = W^_y - cos E^_i
//
// A row in f16 has its largest magnitude in [1, 2), whatever its norm: it neither overflows nor
// loses its digits, and the receiver needs its direction alone. The rank that sends it keeps s_i
// for the backward of normalize (finish_gradient).
//
// Fused: packing, the row's largest magnitude with its scaling and rounding; normalizing, the norm,
// E^ in float32 and as operands of the products, the clearing of all per-row results of the step,
// and the target. Floor: B * d elements read twice (the second time from the cache), B * pitch written in
// float32 and as operands; 17 MB at 4096 rows of 512 in half precision. Agrees with
// `pack_embeddings` and `embed` of src/device/cpu/head.rs, send_scale
// (src/device/cpu/vector.rs) and src/margin.rs angle.
#include "angle.h"
#include "ptx/atomic.h"
#include "replay.h"
#include "row_terms.h"

namespace {

// A row of the step as its rank sent it.
struct RawRow {
    const uint8_t* data;
    uint64_t start;
    int32_t dtype;
};

PFC_DEVICE RawRow raw_row(const HeadArrays& head, const MatrixView& source, uint32_t row) {
    if (head.sharded) {
        const uint64_t origin = head.origins[head.block->first_computed + row];
        return RawRow{head.embeddings_recv, origin * head.dim, head.gather_dtype};
    }
    return RawRow{source.data, row * source.stride, source.dtype};
}

PFC_DEVICE bool ignored(const HeadArrays& head, uint32_t global_row) {
    return head.labels[global_row] == head.ignore_label;
}

constexpr uint32_t kInfinityBits = 0x7f800000u;  // magnitudes from here on are no numbers
constexpr uint32_t kShortestBits = 0x2b8cbcccu;  // rows::kShortest in float32
constexpr uint32_t kOneExponent = 127;           // the exponent field of 1

// The power of two that takes the row's largest magnitude into [1, 2). It and its inverse are
// normal float32 numbers: a largest magnitude of 2^127 or more comes into [2, 4). 0 for a row
// without a direction, 1 for a row with a NaN or an infinity, which f16 keeps.
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
        if (rows::inverse_norm(warp_sum(squares)) == 0.0) {
            return 0.0f;
        }
    }
    const uint32_t exponent = smaller(largest >> 23, 2 * kOneExponent - 1);
    return ptx::bits_float((2 * kOneExponent - exponent) << 23);
}

// The angle of a row to its class center, the margin on it, and the tangent, where the center is in
// this rank's sample. Reads the row as it came, not E^, which is rounded.
PFC_DEVICE void find_target(const HeadArrays& head, const RawRow& raw, uint32_t row) {
    const uint32_t target = head.columns[head.block->first_computed + row];
    if (target == kNone) {
        return;
    }
    const uint32_t center = head.sample[target];
    const replay::Missed missed = replay::missed(head, center);
    const double angle = angle::between(
        head.dim,
        [&](uint32_t column) {
            return rows::read_typed(raw.data, raw.start, raw.dtype, column, head.dim);
        },
        [&](uint32_t column) { return replay::center(head, missed, center, column); },
        [&](uint32_t column, const ptx::Float4& tangent) {
            rows::write_group(head.tangents + uint64_t(row) * head.depth_pitch, column,
                              head.depth_pitch, tangent);
        });
    if (threadIdx.x % 32 != 0) {
        return;
    }
    head.target_cosines[row] = float(margin::cosine(angle));
    if (head.angles != nullptr) {
        head.angles[row] = angle;  // the row's rank alone knows its margin
        return;
    }
    const margin::Target found = margin::target(head.margin, angle);
    head.target_logits[row] = float(found.logit);
    head.derivatives[row] = float(found.derivative);
}

}  // namespace

// Writes embeddings_send, `batch` rows of the source in gather_dtype, then zeros; and send_scales.
// It ignores the status: the other ranks wait for these rows even if the step has failed.
// launch: pack_embeddings blocks 4 per SM threads 256 shared 0
// gate: pack_embeddings registers <= 32
// gate: pack_embeddings on 100,120 registers <= 56
PFC_KERNEL(pack_embeddings,
           (const PFC_GRID_CONSTANT HeadArrays head, MatrixView source, uint64_t batch)) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = rows::first_row(); row < head.max_batch; row += rows::row_stride()) {
        const uint64_t start = row * source.stride;
        float scale = 1.0f;
        if (head.send_scales != nullptr) {
            scale = row < batch ? send_scale(source, start, head.dim) : 0.0f;
            if (lane == 0) {
                head.send_scales[row] = scale;
            }
        }
        for (uint32_t column = lane; column < head.dim; column += 32) {
            float value = 0.0f;
            if (row < batch) {
                value = scale * rows::read_element(source.data, start + column, source.dtype);
            }
            rows::write_element(head.embeddings_send, uint64_t(row) * head.dim + column,
                                head.gather_dtype, value);
        }
    }
}

// E^, cleared results, and targets. A row that is no number is noted, and its E^ is zero: the
// verdict, which is the same on all ranks of a sharded head, as each has all rows, comes with the
// sums (loss.cu).
// launch: normalize_embeddings blocks 4 per SM threads 256 shared 0
// gate: normalize_embeddings registers <= 96
PFC_KERNEL(normalize_embeddings, (const PFC_GRID_CONSTANT HeadArrays head, MatrixView source)) {
    if (head.block->status != kOk) {
        return;
    }
    const uint32_t count = head.block->rows, lane = threadIdx.x % 32;
    // The products read rows to the end of the last tile: those beyond `count` are zero.
    for (uint32_t row = rows::first_row(); row < round_up(count, kTileRows);
         row += rows::row_stride()) {
        const bool counts = row < count && !ignored(head, head.block->first_computed + row);
        RawRow raw = {nullptr, 0, kF32};
        double squares = 0.0;
        if (counts) {
            raw = raw_row(head, source, row);
            for (uint32_t column = rows::kGroup * lane; column < head.dim; column += rows::kSpan) {
                squares = rows::add_squares(
                    squares, rows::read_typed(raw.data, raw.start, raw.dtype, column, head.dim));
            }
            squares = warp_sum(squares);
        }
        const bool finite = rows::is_finite(squares);
        const float inverse = counts && finite ? float(rows::inverse_norm(squares)) : 0.0f;
        if (lane == 0) {
            if (!finite) {
                ptx::atomic_min(&head.block->bad_row, row);
            }
            head.inverse_norms[row] = inverse;
            head.target_logits[row] = 0.0f;
            head.derivatives[row] = 0.0f;
            head.coefficients[row] = 0.0f;
            head.factors[row] = 0.0f;
            head.row_sums[row] = 0.0f;
            head.best_negatives[row] = kElsewhere;
            head.target_cosines[row] = counts ? kElsewhere : kIgnored;
        }
        for (uint32_t column = rows::kGroup * lane; column < head.depth_pitch;
             column += rows::kSpan) {
            ptx::Float4 unit = rows::zeros();
            if (counts && finite && column < head.dim) {
                unit = rows::scaled(
                    inverse, rows::read_typed(raw.data, raw.start, raw.dtype, column, head.dim));
            }
            const uint64_t at = uint64_t(row) * head.depth_pitch + column;
            *reinterpret_cast<ptx::Float4*>(head.units + at) = unit;
            if (head.split_operands) {
                rows::write_split(head.unit_operand + at, head.plane_rows, unit);
            } else {
                rows::write_half(head.unit_operand + at, unit);
            }
        }
        if (counts && finite) {
            find_target(head, raw, row);
        }
    }
}

// Takes the terms of this rank's rows from the caller's arrays, of which each may be null, and
// forgets the angles of the step before: it comes before normalize_embeddings.
// launch: take_terms blocks 1 per SM threads 256 shared 0
// gate: take_terms registers <= 40
PFC_KERNEL(take_terms, (const PFC_GRID_CONSTANT HeadArrays head, const float* m2, const float* m3,
                        const float* weight)) {
    const StepBlock& block = *head.block;
    if (block.status != kOk) {
        return;
    }
    for (uint32_t row = blockIdx.x * blockDim.x + threadIdx.x; row < head.row_capacity;
         row += gridDim.x * blockDim.x) {
        // Rows before the first are beyond the last, too.
        const uint32_t number = row - block.first_own;
        const bool own = number < block.own_rows;
        head.angles[row] = 0.0;
        for (uint32_t term = 0; term < row_terms::kCount; ++term) {
            const float* const given =
                term == row_terms::kM2 ? m2 : term == row_terms::kM3 ? m3 : weight;
            float value = 0.0f;
            if (own) {
                value = given == nullptr ? row_terms::default_term(head.margin, term)
                                         : given[number];
            }
            head.terms[uint64_t(term) * head.row_capacity + row] = value;
        }
    }
}
