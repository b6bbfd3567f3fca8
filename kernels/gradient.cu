// The gradient of the embeddings: of the unit rows, then back through normalize.
//
//     dE^_i = factor_i * (P @ W^)_i + coefficient_i * T_i,  T_i = W^_y - cos E^_i
//     dE_i = (dE^_i - (dE^_i . E^_i) E^_i) * s_i / |sent_i| * factor / valid rows
//
// where sent_i = s_i E_i is the row as it travelled (embeddings.cu), so that s_i / |sent_i| is
// 1 / |E_i|. Of W^_y the part across E^ is all that the backward leaves; on its own it keeps its
// digits where the two nearly agree.
//
// Fused: the sum over the splits of the weighted centers, the target's term, the order of rows in
// the gradient message. Floor: splits * B * pitch floats and B target rows read, ranks * max_batch
// * d floats written (16 MB at 4096 rows of 512 and one split). Agrees with `backward` and
// `finish_gradient` of src/device/cpu/head.rs and normalize_backward (src/device/cpu/vector.rs).
#include "rows.h"

namespace {

// The row with this origin, or kNone.
PFC_DEVICE uint32_t row_of(const HeadArrays& head, uint32_t origin) {
    const uint32_t count = head.block->rows;
    const uint32_t* origins = head.origins + head.block->first_computed;
    // Where all batches are full the origin is the row; else origins, which ascend, are searched.
    if (origin < count && origins[origin] == origin) {
        return origin;
    }
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (origins[middle] < origin) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && origins[low] == origin ? low : kNone;
}

}  // namespace

// Sharded: writes gradient_send, a row for each origin, with zeros where there is no row.
// Replicated: writes gradient_recv. A failed step sends zeros.
// launch: embedding_gradient blocks 4 per SM threads 256 shared 0
// gate: embedding_gradient registers <= 120
PFC_KERNEL(embedding_gradient, (const PFC_GRID_CONSTANT HeadArrays head)) {
    const bool failed = head.block->status != kOk;
    const uint32_t lane = threadIdx.x % 32;
    float* const gradient = head.sharded ? head.gradient_send : head.gradient_recv;
    const uint32_t count = head.sharded ? head.label_capacity : head.max_batch;
    for (uint32_t out = rows::first_row(); out < count; out += rows::row_stride()) {
        uint32_t row = kNone;
        if (!failed) {
            row = head.sharded ? row_of(head, out) : out < head.block->rows ? out : kNone;
        }
        const float factor = row == kNone ? 0.0f : head.factors[row];
        // A row far from this rank's negatives may be near another's: then its target counts.
        const float coefficient = row == kNone ? 0.0f : head.coefficients[row];
        const bool pulled =
            coefficient != 0.0f && head.columns[head.block->first_computed + row] != kNone;
        for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 sum = rows::zeros();
            if (factor != 0.0f) {
                for (uint32_t split = 0; split < head.splits; ++split) {
                    const uint64_t start =
                        (uint64_t(split) * head.row_capacity + row) * head.depth_pitch;
                    const ptx::Float4 more =
                        rows::read_group(head.weighted_centers + start, column, head.depth_pitch);
                    sum.x += more.x;
                    sum.y += more.y;
                    sum.z += more.z;
                    sum.w += more.w;
                }
                sum = rows::scaled(factor, sum);
            }
            if (pulled) {
                const ptx::Float4 t = rows::read_group(
                    head.tangents + uint64_t(row) * head.depth_pitch, column, head.depth_pitch);
                sum.x += coefficient * t.x;
                sum.y += coefficient * t.y;
                sum.z += coefficient * t.z;
                sum.w += coefficient * t.w;
            }
            rows::write_floats(gradient + uint64_t(out) * head.dim, column, head.dim, sum);
        }
    }
}

// Writes this rank's own rows from gradient_recv to the caller's matrix. The matrix may be null:
// the kernel then computes the squares alone. A failed step gives zeros.
// launch: finish_gradient blocks 4 per SM threads 256 shared 0
// gate: finish_gradient registers <= 56
PFC_KERNEL(finish_gradient,
           (const PFC_GRID_CONSTANT HeadArrays head, double factor, MatrixView out)) {
    const StepBlock& block = *head.block;
    const bool failed = block.status != kOk;
    const uint32_t lane = threadIdx.x % 32;
    const double weight = block.valid_rows == 0 ? 0.0 : factor / double(block.valid_rows);
    for (uint32_t i = rows::first_row(); i < block.own_rows; i += rows::row_stride()) {
        const uint64_t unit_start = uint64_t(block.first_own + i) * head.depth_pitch;
        const float* const from = head.gradient_recv + uint64_t(i) * head.dim;
        double along = 0.0, squares = 0.0;
        float length = 0.0f;
        if (!failed) {
            for (uint32_t column = rows::kGroup * lane; column < head.dim; column += rows::kSpan) {
                const ptx::Float4 unit =
                    rows::read_group(head.units + unit_start, column, head.depth_pitch);
                along = rows::add_products(along, rows::read_floats(from, column, head.dim), unit);
            }
            along = warp_sum(along);
            const float scale = head.send_scales == nullptr ? 1.0f : head.send_scales[i];
            length = head.inverse_norms[block.first_own + i] * scale * float(weight);
        }
        for (uint32_t column = rows::kGroup * lane; column < head.dim; column += rows::kSpan) {
            ptx::Float4 made = rows::zeros();
            if (!failed) {
                const ptx::Float4 unit =
                    rows::read_group(head.units + unit_start, column, head.depth_pitch);
                const ptx::Float4 g = rows::read_floats(from, column, head.dim);
                made = rows::subtract_along(g, float(along), unit, length);
            }
            squares = rows::add_squares(squares, made);
            if (out.data != nullptr) {
                rows::write_typed(out.data, i * out.stride, out.dtype, column, head.dim, made);
            }
        }
        squares = warp_sum(squares);
        if (lane == 0) {
            head.squares[i] = float(squares);
        }
    }
}

// Writes the gradients of the margins of this rank's rows to the caller's arrays, of which each may
// be null. A failed step gives zeros.
// launch: margin_gradients blocks 1 per SM threads 256 shared 0
// gate: margin_gradients registers <= 40
PFC_KERNEL(margin_gradients,
           (const PFC_GRID_CONSTANT HeadArrays head, double factor, float* m2, float* m3)) {
    const StepBlock& block = *head.block;
    const bool none = block.status != kOk || block.valid_rows == 0;
    const double weight = none ? 0.0 : factor / double(block.valid_rows);
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < block.own_rows;
         i += gridDim.x * blockDim.x) {
        const float* const own = head.margin_gradients + block.first_own + i;
        if (m2 != nullptr) {
            m2[i] = none ? 0.0f : float(double(own[0]) * weight);
        }
        if (m3 != nullptr) {
            m3[i] = none ? 0.0f : float(double(own[head.row_capacity]) * weight);
        }
    }
}

// Computes block->grad_embeddings (which 0: own rows) or grad_centers (1: the sample's columns), when
// somebody asks for the step's figures. A skipped update has no gradient of the centers. One CTA
// of up to 1024 threads: a sample has many squares, and fewer threads would have too few loads
// under way.
// launch: sum_squares blocks 1 threads 1024 shared 256
// gate: sum_squares registers <= 32
PFC_KERNEL_OF(sum_squares, 1024, 1,
              (const PFC_GRID_CONSTANT HeadArrays head, int32_t which)) {
    PFC_DYNAMIC_SHARED(dynamic);
    StepBlock& block = *head.block;
    const bool skipped = which == 0 && block.status == kSkipped;
    if (blockIdx.x != 0 || (block.status != kOk && !skipped)) {
        return;
    }
    const uint32_t count = which == 0 ? block.own_rows : block.classes;
    const float* const squares = which == 0 ? head.squares : head.center_squares;
    double sum = 0.0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        sum += double(squares[i]);
    }
    sum = block_sum(sum, dynamic);
    if (threadIdx.x == 0) {
        (which == 0 ? block.grad_embeddings : block.grad_centers) = sum;
    }
}
