// The sums message, which the ranks add up between forward and backward, and the loss that each of
// them computes from it.
//
//     L_i = N_i + exp(zt_i - c),  loss_i = log1p(exp(-|x|)) + max(x, 0) with x = ln N_i + c - zt_i
//     factor_i = scale / L_i,  coefficient_i = -scale * (N_i / L_i) * psi'_i,  E' = factor_i * E^_i
//
// A row that is far from all its negatives (far.h) has its N relative to an offset of its own, and
// so is its factor. N and L are doubles, which have them relative to exp(c) however small.
//
// With row terms (row_terms.h) the message has theta_i for zt_i; loss_i, factor_i and coefficient_i
// are times weight_i.
//
// Agrees with src/device/cpu/loss.rs and src/protocol.rs, in double where the CPU has doubles.
// reduce_rows reads the tiles' sums, 8 bytes for 128 columns of a row: 32 MB at 4096 rows and
// 125000 columns; scale_embeddings B * pitch floats and as many operands; finish_rows a few numbers
// a row; the others are one CTA each and wait for latency.
#include "far.h"
#include "ptx/atomic.h"
#include "reduce.h"
#include "row_terms.h"
#include "rows.h"

namespace {

constexpr float kOneError = 65536.0f;  // protocol.rs ONE_ERROR
constexpr uint32_t kRowsOfCta = 8;     // reduce_rows: rows side by side, a sector of floats

// What a warp has of a row.
struct RowPart {
    double sum;
    float best;
};

// Shared memory of the kernels of one CTA: kReduceBytes, then bad_row and bad_term.
struct Shared {
    void* reduce;
    uint32_t* bad_row;   // first row whose sum leaves float32
    uint32_t* bad_term;  // kCount * row + term, of the first term that is out of its range
};

PFC_DEVICE Shared shared_of(unsigned char* dynamic) {
    uint32_t* const found = reinterpret_cast<uint32_t*>(dynamic + kReduceBytes);
    return Shared{dynamic, found, found + 1};
}

PFC_DEVICE float pack_error(uint32_t rank) {
    return kOneError + float(smaller(rank, 65534) + 1);
}

// Computes loss, coefficient and factor of a row from its reduced sums; NaN where they leave
// float32. `sent` is the target's logit, or with terms its angle.
PFC_DEVICE double finish_row(const HeadArrays& head, uint32_t row, double sum, float sent,
                             bool only_target, const row_terms::Terms& terms) {
    const bool has_terms = terms.values != nullptr;
    if (head.target_cosines[row] == kIgnored || only_target) {
        head.coefficients[row] = 0.0f;
        head.factors[row] = 0.0f;
        if (has_terms) {
            row_terms::keep_gradients(head, row, 0.0, 0.0);
        }
        return 0.0;
    }
    row_terms::Target own = {double(sent), double(head.derivatives[row]), 0.0, 1.0};
    if (has_terms) {
        own = row_terms::target(head, terms, row, sent);
    }
    const double offset = head.margin.offset, over = own.logit - offset;
    const double denominator = sum + exp(over);
    // Without a negative on this rank there is nothing to weigh, and where the other ranks' are far
    // 1 / L would leave float32.
    const bool alone = head.shifts != nullptr && head.best_negatives[row] == kElsewhere;
    const float factor =
        alone ? 0.0f
              : float(own.weight * head.margin.scale / denominator *
                      far::from_own_offset(head, row));
    if (!(sum > 0.0) || !rows::is_finite(denominator) ||
        !rows::is_finite(double(factor))) {
        return nan("");
    }
    const double steepness = own.weight * head.margin.scale * (sum / denominator);
    head.factors[row] = factor;
    head.coefficients[row] = float(-steepness * own.derivative);
    if (has_terms) {
        row_terms::keep_gradients(head, row, steepness, own.by_m2);
    }
    const double excess = log(sum) - over;
    return own.weight * ((excess > 0.0 ? excess : 0.0) + log1p(exp(-fabs(excess))));
}

// What is sent of a row's target.
PFC_DEVICE float sent_target(const HeadArrays& head, uint32_t row) {
    return head.angles != nullptr ? float(head.angles[row]) : head.target_logits[row];
}

// Adds up row_losses, in every thread, and finds the first bad row and term. Of the sums message
// (`all_ranks`) or of this rank's own sums.
PFC_DEVICE double add_losses(const HeadArrays& head, bool all_ranks, const Shared& shared) {
    const row_terms::Terms terms = row_terms::terms(head, all_ranks);
    if (threadIdx.x == 0) {
        *shared.bad_row = kNone;
        *shared.bad_term = kNone;
    }
    __syncthreads();
    double loss = 0.0;
    for (uint32_t row = threadIdx.x; row < head.block->rows; row += blockDim.x) {
        if (terms.values != nullptr && head.target_cosines[row] != kIgnored) {
            const uint32_t term = row_terms::bad_term(terms, row);
            if (term < row_terms::kCount) {
                ptx::atomic_min(shared.bad_term, row_terms::kCount * row + term);
            }
        }
        const double row_loss = head.row_losses[row];
        if (row_loss != row_loss) {
            ptx::atomic_min(shared.bad_row, row);
        }
        loss += row_loss;
    }
    return block_sum(loss, shared.reduce);  // its barriers also publish bad_row
}

// Sum of the target cosines of the rows whose class center this rank has.
PFC_DEVICE double sum_cosines(const HeadArrays& head, const Shared& shared) {
    double sum = 0.0;
    for (uint32_t row = threadIdx.x; row < head.block->rows; row += blockDim.x) {
        const float cosine = head.target_cosines[row];
        sum += fabsf(cosine) < kIgnored ? double(cosine) : 0.0;
    }
    return block_sum(sum, shared.reduce);
}

// The verdict on the rows of this rank's forward. Called by thread 0.
PFC_DEVICE void judge_embeddings(const HeadArrays& head) {
    StepBlock& block = *head.block;
    if (block.status != kOk || block.bad_row == kNone) {
        return;
    }
    const uint32_t origin =
        head.sharded ? head.origins[block.first_computed + block.bad_row] : block.bad_row;
    block.status = kNotFinite;
    block.fault = kFaultEmbedding;
    block.rank = head.sharded ? int32_t(origin / head.max_batch) : int32_t(head.rank);
    block.row = head.sharded ? origin % head.max_batch : origin;
}

PFC_DEVICE void pack_sharded(const HeadArrays& head, int32_t own_status, int32_t loss_place,
                             const Shared& shared) {
    const StepBlock& block = *head.block;
    // All ranks reach the verdict that is in the block: they wait for this sum, but ignore its
    // terms.
    const bool counts = own_status == kOk && block.status == kOk;
    for (uint32_t i = threadIdx.x; i < head.label_capacity; i += blockDim.x) {
        const bool row = counts && i < block.rows;
        const bool own = row && far::has_own_offset(head, i);
        head.sums[i] = row && !own ? head.row_sums[i] : 0.0f;
        head.sums[head.label_capacity + i] = row ? sent_target(head, i) : 0.0f;
        if (head.terms != nullptr) {
            for (uint32_t term = 0; term < row_terms::kCount; ++term) {
                row_terms::message(head)[uint64_t(term) * head.label_capacity + i] =
                    row ? head.terms[uint64_t(term) * head.row_capacity + i] : 0.0f;
            }
        }
        if (head.shifts != nullptr) {
            const double exponent =
                own ? -double(head.shifts[i]) / far::kLog2E - head.margin.offset : 0.0;
            far::far_sums(head)[i] =
                own ? float(double(head.row_sums[i]) * exp(exponent + far::kTravelExponent)) : 0.0f;
        }
    }
    const double cosines = counts ? sum_cosines(head, shared) : 0.0;
    if (threadIdx.x == 0) {
        float* totals = head.sums + 2 * uint64_t(head.label_capacity);
        totals[0] = float(cosines);
        totals[1] = float(loss_place);
        totals[2] = own_status == kOk ? 0.0f : pack_error(head.rank);
        // Ranks ask whether the sample has more than one class: 2 stands for any larger number.
        totals[3] = counts ? float(smaller(block.classes, 2)) : 0.0f;
    }
}

PFC_DEVICE void pack_replicated(const HeadArrays& head, int32_t own_status, int32_t loss_place,
                                uint64_t sample_limit, const Shared& shared) {
    const StepBlock& block = *head.block;
    double loss = 0.0, cosines = 0.0, status = double(own_status), row = 0.0;
    double value = 0.0;
    if (own_status != kOk) {
        row = 0.0;
    } else if (block.status != kOk) {
        status = double(block.status);
        row = block.fault == kFaultEmbedding ? double(block.row) : 0.0;
    } else {
        loss = add_losses(head, false, shared);
        cosines = sum_cosines(head, shared);
        if (*shared.bad_term != kNone) {
            const row_terms::Terms terms = row_terms::terms(head, false);
            const uint32_t found = *shared.bad_term;
            status = double(kInvalidArgument);
            row = -1.0 - double(found);
            value = double(terms.of(found % row_terms::kCount, found / row_terms::kCount));
        } else if (*shared.bad_row != kNone) {
            status = double(kNotFinite);
            row = -1.0 - double(*shared.bad_row);
        }
    }
    for (uint32_t i = threadIdx.x; i < kTotals + kSlot * head.ranks; i += blockDim.x) {
        head.replicated_sums[i] = 0.0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double* slot = head.replicated_sums + kTotals + kSlot * head.rank;
        slot[0] = status;
        slot[1] = row;
        slot[2] = value;
        slot[3] = double(sample_limit);
        head.replicated_sums[3] = double(loss_place);
        if (status == double(kOk)) {
            head.replicated_sums[0] = loss;
            head.replicated_sums[1] = double(block.own_valid_rows);
            head.replicated_sums[2] = cosines;
            slot[2] = block.digest;
        }
    }
}

PFC_DEVICE void fail(StepBlock& block, Status status, Fault fault, int64_t rank, int64_t row,
                     int64_t value) {
    block.status = status;
    block.fault = fault;
    block.rank = int32_t(rank);
    block.row = row;
    block.value = value;
}

PFC_DEVICE double judge_sharded(const HeadArrays& head, const Shared& shared) {
    StepBlock& block = *head.block;
    const float* totals = head.sums + 2 * uint64_t(head.label_capacity);
    const float cosines = totals[0], errors = totals[2], classes = totals[3];
    double loss = 0.0;
    const bool failed = !(errors < kOneError);
    if (!failed) {
        loss = add_losses(head, true, shared);
    }
    if (threadIdx.x == 0) {
        if (failed) {
            const bool one = errors < 2 * kOneError;
            const int64_t rank = one ? int64_t(errors - kOneError) - 1 : 0;
            fail(block, kRemote, kFaultForward, rank, 0, int64_t(errors));
        } else if (*shared.bad_term != kNone) {
            const uint32_t row = *shared.bad_term / row_terms::kCount;
            const uint32_t term = *shared.bad_term % row_terms::kCount;
            const uint32_t origin = head.origins[block.first_computed + row];
            fail(block, kInvalidArgument, kFaultTerm, origin / head.max_batch,
                 int64_t(row_terms::kCount) * (origin % head.max_batch) + term,
                 ptx::float_bits(row_terms::terms(head, true).of(term, row)));
        } else if (*shared.bad_row != kNone) {
            const uint32_t origin = head.origins[block.first_computed + *shared.bad_row];
            fail(block, kNotFinite, kFaultSum, origin / head.max_batch, origin % head.max_batch,
                 0);
        } else {
            // The rows computed here are those of all ranks.
            block.valid_rows = block.own_valid_rows;
            block.target_cosines = double(cosines);
            block.only_target = classes <= 1.0f ? 1 : 0;
        }
    }
    return loss;
}

// Called by thread 0. Every rank judges the ranks' sums in the same order, by rank.
PFC_DEVICE void judge_replicated(const HeadArrays& head) {
    StepBlock& block = *head.block;
    const double* sums = head.replicated_sums;
    // A rank's own bad row is in its slot, and a lower rank's fault comes before it.
    block.status = kOk;
    block.fault = kNoFault;
    for (uint32_t rank = 0; rank < head.ranks; ++rank) {
        const double* slot = sums + kTotals + kSlot * rank;
        const int32_t status = int32_t(slot[0]);
        if (status == kOk) {
            continue;
        }
        if (status == kNotFinite && slot[1] < 0.0) {
            fail(block, kNotFinite, kFaultSum, rank, int64_t(-slot[1] - 1.0), 0);
        } else if (status == kNotFinite) {
            fail(block, kNotFinite, kFaultEmbedding, rank, int64_t(slot[1]), 0);
        } else if (status == kInvalidArgument && slot[1] < 0.0) {
            fail(block, kInvalidArgument, kFaultTerm, rank, int64_t(-slot[1] - 1.0),
                 ptx::float_bits(float(slot[2])));
        } else {
            fail(block, kRemote, kFaultSums, rank, 0, status);
        }
        return;
    }
    for (uint32_t rank = 1; rank < head.ranks; ++rank) {
        if (sums[kTotals + kSlot * rank + 2] != sums[kTotals + 2]) {
            fail(block, kMismatch, kFaultSamples, rank, 0, 0);
            return;
        }
    }
    block.valid_rows = uint64_t(sums[1]);
    block.target_cosines = sums[2];
    block.only_target = block.classes <= 1 ? 1 : 0;
}

// src/device/cpu/vector.rs turn_tangent, for a warp's row.
PFC_DEVICE void turn_tangent(const HeadArrays& head, uint32_t row) {
    const uint64_t start = uint64_t(row) * head.depth_pitch;
    const uint32_t lane = threadIdx.x % 32;
    double squares = 0.0;
    for (uint32_t column = rows::kGroup * lane; column < head.depth_pitch; column += rows::kSpan) {
        squares = rows::add_squares(
            squares, rows::read_group(head.tangents + start, column, head.depth_pitch));
    }
    const float sine_squared = float(warp_sum(squares)), cosine = head.target_cosines[row];
    for (uint32_t column = rows::kGroup * lane; column < head.depth_pitch; column += rows::kSpan) {
        const ptx::Float4 unit = rows::read_group(head.units + start, column, head.depth_pitch);
        const ptx::Float4 t = rows::read_group(head.tangents + start, column, head.depth_pitch);
        const ptx::Float4 turned = {
            sine_squared * unit.x - cosine * t.x, sine_squared * unit.y - cosine * t.y,
            sine_squared * unit.z - cosine * t.z, sine_squared * unit.w - cosine * t.w};
        rows::write_group(head.tangents + start, column, head.depth_pitch, turned);
    }
}

}  // namespace

// Adds up row_sums and best_negatives over the tiles of columns. A CTA has 8 rows side by side, so
// that it reads whole sectors; its threads of a row, 32 of them, take every 32nd tile. Few tiles a
// thread: each is a wait for memory, and a step waits for all of them. The order depends on the
// number of threads alone.
// launch: reduce_rows blocks 4 per SM threads 256 shared 1024
// gate: reduce_rows registers <= 64
PFC_KERNEL(reduce_rows, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(dynamic);
    if (head.block->status != kOk) {
        return;
    }
    RowPart* const parts = reinterpret_cast<RowPart*>(dynamic);  // [warps][kRowsOfCta]
    const uint32_t count = head.block->rows, own = threadIdx.x % kRowsOfCta;
    const uint32_t tiles = ceil_div(head.block->classes, kTileColumns);
    for (uint32_t first = blockIdx.x * kRowsOfCta; first < count;
         first += gridDim.x * kRowsOfCta) {
        const uint32_t row = first + own;
        double sum = 0.0;
        float best = kElsewhere;
        if (row < count) {
#pragma unroll 4
            for (uint32_t tile = threadIdx.x / kRowsOfCta; tile < tiles;
                 tile += blockDim.x / kRowsOfCta) {
                const uint64_t at = uint64_t(tile) * head.row_capacity + row;
                sum += double(head.partial_sums[at]);
                const float found = head.partial_best[at];
                best = found > best ? found : best;
            }
        }
        for (int mask = kRowsOfCta; mask < 32; mask *= 2) {
            sum += ptx::shuffle_xor(sum, mask);
            const float other = ptx::shuffle_xor(best, mask);
            best = other > best ? other : best;
        }
        if (ptx::lane() < kRowsOfCta) {
            parts[ptx::warp() * kRowsOfCta + own] = {sum, best};
        }
        __syncthreads();
        if (threadIdx.x < kRowsOfCta && row < count) {
            for (uint32_t warp = 1; warp < blockDim.x / 32; ++warp) {
                const RowPart& other = parts[warp * kRowsOfCta + own];
                sum += other.sum;
                best = other.best > best ? other.best : best;
            }
            head.row_sums[row] = float(sum);
            head.best_negatives[row] = best;
        }
        __syncthreads();  // the next rows' parts overwrite these
    }
}

// Writes the shifts of all rows from their largest negatives, and which tiles of rows have one that
// is not c's. A thread a row.
// launch: find_far_rows blocks 4 per SM threads 128 shared 256
// gate: find_far_rows registers <= 48
PFC_KERNEL(find_far_rows, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(dynamic);
    const StepBlock& block = *head.block;
    if (block.status != kOk) {
        return;
    }
    const uint32_t tiles = ceil_div(block.rows, kTileRows);
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        uint32_t count = 0;
        for (uint32_t i = threadIdx.x; i < kTileRows; i += blockDim.x) {
            const uint32_t row = tile * kTileRows + i;
            const float best = row < block.rows ? head.best_negatives[row] : kElsewhere;
            head.shifts[row] = far::shift_of(head.margin, far::row_offset(head.margin, best));
            count += far::has_own_offset(head, row) ? 1 : 0;
        }
        count = block_sum(count, dynamic);
        if (threadIdx.x == 0) {
            head.far_tiles[tile] = count != 0 ? 1 : 0;
        }
    }
}

// Calls finish_row for all rows, before the kernel of one CTA that adds their losses up: exp and log
// in double take a hundred instructions a row. Sharded: of the reduced sums. Replicated: of this
// rank's own, unless it has failed.
// launch: finish_rows blocks 2 per SM threads 128 shared 0
// gate: finish_rows registers <= 128
PFC_KERNEL(finish_rows, (const PFC_GRID_CONSTANT HeadArrays head, int32_t own_status)) {
    const StepBlock& block = *head.block;
    if (own_status != kOk || block.status != kOk) {
        return;
    }
    const bool all_ranks = head.sharded != 0;
    bool only_target = block.classes <= 1;
    if (all_ranks) {
        const float* const totals = head.sums + 2 * uint64_t(head.label_capacity);
        if (!(totals[2] < kOneError)) {
            return;
        }
        only_target = totals[3] <= 1.0f;
    }
    const double far_unit = exp(-far::kTravelExponent);
    const float* const sums = all_ranks ? head.sums : head.row_sums;
    const row_terms::Terms terms = row_terms::terms(head, all_ranks);
    for (uint32_t row = blockIdx.x * blockDim.x + threadIdx.x; row < block.rows;
         row += gridDim.x * blockDim.x) {
        double sum = double(sums[row]);
        if (!all_ranks) {
            sum *= far::from_own_offset(head, row);
        } else if (head.shifts != nullptr) {
            sum += double(far::far_sums(head)[row]) * far_unit;
        }
        const float sent =
            all_ranks ? head.sums[head.label_capacity + row] : sent_target(head, row);
        head.row_losses[row] = finish_row(head, row, sum, sent, only_target, terms);
    }
}

// Writes this rank's terms of the sums message, also for a failed step: the other ranks wait for
// them. Before that the verdict on the embeddings: what has run since they were normalized took the
// bad ones for zeros. `loss_place`: 1 for a loss in device memory, -1 for one in host memory, 0 if the rank has
// no usable loss pointer. `sample_limit`: classes that a replicated head's dW has rows for. The
// other ranks' hosts read both. A rank whose update took a row out of its type fails here,
// at the latest.
// launch: pack_sums blocks 1 threads 256 shared 272
// gate: pack_sums registers <= 128
PFC_KERNEL(pack_sums, (const PFC_GRID_CONSTANT HeadArrays head, int32_t own_status,
                       int32_t loss_place, uint64_t sample_limit)) {
    PFC_DYNAMIC_SHARED(dynamic);
    if (blockIdx.x != 0) {
        return;
    }
    if (own_status == kOk && head.ledger->torn_row != kNone) {
        own_status = kNotFinite;
    }
    if (threadIdx.x == 0) {
        judge_embeddings(head);
    }
    __syncthreads();
    if (head.sharded) {
        pack_sharded(head, own_status, loss_place, shared_of(dynamic));
    } else {
        pack_replicated(head, own_status, loss_place, sample_limit, shared_of(dynamic));
    }
}

// The verdict on the reduced sums, and the loss; `loss` may be null. This ends a step's forward: it
// counts a step that failed anywhere.
// launch: judge_sums blocks 1 threads 256 shared 272
// gate: judge_sums registers <= 128
PFC_KERNEL(judge_sums, (const PFC_GRID_CONSTANT HeadArrays head, double* loss)) {
    PFC_DYNAMIC_SHARED(dynamic);
    if (blockIdx.x != 0) {
        return;
    }
    const Shared shared = shared_of(dynamic);
    StepBlock& block = *head.block;
    const int32_t status = block.status;
    // A replicated rank's own bad embedding is no verdict yet: the other ranks must learn of it.
    const bool open = status == kOk || (!head.sharded && block.fault == kFaultEmbedding);
    __syncthreads();  // all have read the status
    double sum = 0.0;
    if (open && head.sharded) {
        sum = judge_sharded(head, shared);
    } else if (open && threadIdx.x == 0) {
        judge_replicated(head);
        sum = head.replicated_sums[0];
    }
    if (threadIdx.x != 0) {
        return;
    }
    if (block.status == kOk) {
        block.loss = block.valid_rows == 0 ? 0.0 : sum / double(block.valid_rows);
    } else {
        block.loss = nan("");
        Ledger& ledger = *head.ledger;
        if (ledger.failed == 0) {
            ledger.first_failure = block;
        }
        ledger.failed += 1;
    }
    if (loss != nullptr) {
        *loss = block.loss;
    }
}

// Writes E', the operand of the center gradient; rows to the end of the last tile are zero. And
// turns the tangents, W^ - cos E^ so far, to E^ - cos W^ = sin^2 E^ - cos T: nothing cancels. Comes
// once a step, after the embeddings' gradient.
// launch: scale_embeddings blocks 4 per SM threads 256 shared 0
// gate: scale_embeddings registers <= 64
PFC_KERNEL_OF(scale_embeddings, 256, 4, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != kOk) {
        return;
    }
    const uint32_t count = head.block->rows;
    const uint32_t end = round_up(count, kTileRows);
    for (uint32_t row = rows::first_row(); row < end; row += rows::row_stride()) {
        const float factor = row < count ? head.factors[row] : 0.0f;
        if (row < count && head.coefficients[row] != 0.0f &&
            head.columns[head.block->first_computed + row] != kNone) {
            turn_tangent(head, row);
        }
        for (uint32_t column = rows::kGroup * (threadIdx.x % 32); column < head.depth_pitch;
             column += rows::kSpan) {
            const uint64_t at = uint64_t(row) * head.depth_pitch + column;
            ptx::Float4 values = rows::zeros();
            if (factor != 0.0f) {
                const ptx::Float4 unit = *reinterpret_cast<const ptx::Float4*>(head.units + at);
                values = rows::scaled(factor, unit);
            }
            if (head.split_operands) {
                rows::write_split(head.scaled_operand + at, head.plane_rows, values);
            } else {
                rows::write_bfloat(head.scaled_operand + at, values);
            }
        }
    }
}
