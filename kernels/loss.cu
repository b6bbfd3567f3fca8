// What the ranks add up between forward and backward, and the loss each of them finds in it.
//
//     L_i = N_i + exp(zt_i - c),  loss_i = log1p(exp(-|x|)) + max(x, 0) with x = ln N_i + c - zt_i
//     factor_i = scale / L_i,  coefficient_i = -scale * (N_i / L_i) * psi'_i,  E' = factor_i * E^_i
//
// Agrees with src/device/cpu/sums.rs and src/protocol.rs. All in double where the CPU has doubles.
// reduce_rows reads the tiles' sums, 8 bytes for 128 columns of a row: 32 MB at 4096 rows and
// 125000 columns; scale_embeddings B * pitch floats and as many operands; the others are one CTA
// each and wait for latency.
#include "ptx/atomic.h"
#include "rows.h"

namespace {

constexpr float kOneError = 65536.0f;  // protocol.rs ONE_ERROR
constexpr uint32_t kLanesOfRow = 4;    // reduce_rows: lanes that share a row, 8 rows a warp

// Shared memory of the kernels of one CTA.
struct Shared {
    double* parts;      // [32]
    uint32_t* bad_row;  // least row whose sum leaves float32
};

PFC_DEVICE Shared shared_of(unsigned char* dynamic) {
    return Shared{reinterpret_cast<double*>(dynamic), reinterpret_cast<uint32_t*>(dynamic + 256)};
}

PFC_DEVICE float pack_error(uint32_t rank) {
    return kOneError + float(rows::least(rank, 65534) + 1);
}

// Loss, coefficient and factor of a row from its reduced sums; NaN where they leave float32.
PFC_DEVICE double finish_row(const HeadView& view, uint32_t row, float sum, float logit,
                             bool only_target) {
    if (view.target_cosines[row] == kIgnored || only_target) {
        view.coefficients[row] = 0.0f;
        view.factors[row] = 0.0f;
        return 0.0;
    }
    const double offset = view.margin.offset, over = double(logit) - offset;
    const double whole = double(sum) + exp(over);
    const float factor = float(view.margin.scale / whole);
    if (!(double(sum) > 0.0) || !rows::is_finite(whole) || !rows::is_finite(double(factor))) {
        return nan("");
    }
    view.factors[row] = factor;
    view.coefficients[row] =
        float(-view.margin.scale * (double(sum) / whole) * double(view.derivatives[row]));
    const double excess = log(double(sum)) - over;
    return (excess > 0.0 ? excess : 0.0) + log1p(exp(-fabs(excess)));
}

// finish_row of all rows: the sum of their losses, in every thread. `sums` and `logits` are those
// of C or this rank's own.
PFC_DEVICE double finish_rows(const HeadView& view, const float* sums, const float* logits,
                              bool only_target, const Shared& shared) {
    if (threadIdx.x == 0) {
        *shared.bad_row = kNone;
    }
    __syncthreads();
    double loss = 0.0;
    for (uint32_t row = threadIdx.x; row < view.block->rows; row += blockDim.x) {
        const double own = finish_row(view, row, sums[row], logits[row], only_target);
        if (own != own) {
            ptx::atomic_min(shared.bad_row, row);
        }
        loss += own;
    }
    return rows::sum_of_block(loss, shared.parts);  // its barriers also publish bad_row
}

// Sum of the target cosines of the rows whose class centre this rank has.
PFC_DEVICE double sum_cosines(const HeadView& view, const Shared& shared) {
    double sum = 0.0;
    for (uint32_t row = threadIdx.x; row < view.block->rows; row += blockDim.x) {
        const float cosine = view.target_cosines[row];
        sum += fabsf(cosine) < kIgnored ? double(cosine) : 0.0;
    }
    return rows::sum_of_block(sum, shared.parts);
}

PFC_DEVICE void pack_sharded(const HeadView& view, int32_t own_status, int32_t place,
                             const Shared& shared) {
    const StepBlock& block = *view.block;
    // A verdict in the block is one that all ranks reach: they wait for this sum, but not its
    // terms.
    const bool counts = own_status == kOk && block.status == kOk;
    for (uint32_t i = threadIdx.x; i < view.label_capacity; i += blockDim.x) {
        const bool row = counts && i < block.rows;
        view.sums[i] = row ? view.row_sums[i] : 0.0f;
        view.sums[view.label_capacity + i] = row ? view.target_logits[i] : 0.0f;
    }
    const double cosines = counts ? sum_cosines(view, shared) : 0.0;
    if (threadIdx.x == 0) {
        float* totals = view.sums + 2 * uint64_t(view.label_capacity);
        totals[0] = float(cosines);
        totals[1] = float(place);
        totals[2] = own_status == kOk ? 0.0f : pack_error(view.rank);
        // Whether a row's sample holds more than its target: two classes are as good as any number.
        totals[3] = counts ? float(rows::least(block.classes, 2)) : 0.0f;
    }
}

PFC_DEVICE void pack_replicated(const HeadView& view, int32_t own_status, int32_t place,
                                uint64_t room, const Shared& shared) {
    const StepBlock& block = *view.block;
    double loss = 0.0, cosines = 0.0, status = double(own_status), row = 0.0;
    if (own_status != kOk) {
        row = 0.0;
    } else if (block.status != kOk) {
        status = double(block.status);
        row = block.fault == kFaultEmbedding ? double(block.row) : 0.0;
    } else {
        loss = finish_rows(view, view.row_sums, view.target_logits, block.classes <= 1, shared);
        cosines = sum_cosines(view, shared);
        if (*shared.bad_row != kNone) {
            status = double(kNotFinite);
            row = -1.0 - double(*shared.bad_row);
        }
    }
    for (uint32_t i = threadIdx.x; i < kTotals + kSlot * view.ranks; i += blockDim.x) {
        view.replicated_sums[i] = 0.0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double* slot = view.replicated_sums + kTotals + kSlot * view.rank;
        slot[0] = status;
        slot[1] = row;
        slot[3] = double(room);
        view.replicated_sums[3] = double(place);
        if (status == double(kOk)) {
            view.replicated_sums[0] = loss;
            view.replicated_sums[1] = double(block.own_valid_rows);
            view.replicated_sums[2] = cosines;
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

PFC_DEVICE double judge_sharded(const HeadView& view, const Shared& shared) {
    StepBlock& block = *view.block;
    const float* totals = view.sums + 2 * uint64_t(view.label_capacity);
    const float cosines = totals[0], errors = totals[2], classes = totals[3];
    double loss = 0.0;
    const bool failed = !(errors < kOneError);
    if (!failed) {
        loss =
            finish_rows(view, view.sums, view.sums + view.label_capacity, classes <= 1.0f, shared);
    }
    if (threadIdx.x == 0) {
        if (failed) {
            const bool one = errors < 2 * kOneError;
            const int64_t rank = one ? int64_t(errors - kOneError) - 1 : 0;
            fail(block, kRemote, kFaultForward, rank, 0, int64_t(errors));
        } else if (*shared.bad_row != kNone) {
            const uint32_t place = view.origins[block.first_computed + *shared.bad_row];
            fail(block, kNotFinite, kFaultSum, place / view.max_batch, place % view.max_batch, 0);
        } else {
            block.valid_rows =
                block.own_valid_rows;  // the rows computed here are those of all ranks
            block.target_cosines = double(cosines);
            block.only_target = classes <= 1.0f ? 1 : 0;
        }
    }
    return loss;
}

// By thread 0: what the ranks brought is judged in rank order, as every rank does it alike.
PFC_DEVICE void judge_replicated(const HeadView& view) {
    StepBlock& block = *view.block;
    const double* sums = view.replicated_sums;
    // A rank's own bad row is in its slot, and a lower rank's fault comes before it.
    block.status = kOk;
    block.fault = kNoFault;
    for (uint32_t rank = 0; rank < view.ranks; ++rank) {
        const double* slot = sums + kTotals + kSlot * rank;
        const int32_t status = int32_t(slot[0]);
        if (status == kOk) {
            continue;
        }
        if (status == kNotFinite && slot[1] < 0.0) {
            fail(block, kNotFinite, kFaultSum, rank, int64_t(-slot[1] - 1.0), 0);
        } else if (status == kNotFinite) {
            fail(block, kNotFinite, kFaultEmbedding, rank, int64_t(slot[1]), 0);
        } else {
            fail(block, kRemote, kFaultSums, rank, 0, status);
        }
        return;
    }
    for (uint32_t rank = 1; rank < view.ranks; ++rank) {
        if (sums[kTotals + kSlot * rank + 2] != sums[kTotals + 2]) {
            fail(block, kMismatch, kFaultSamples, rank, 0, 0);
            return;
        }
    }
    block.valid_rows = uint64_t(sums[1]);
    block.target_cosines = sums[2];
    block.only_target = block.classes <= 1 ? 1 : 0;
}

}  // namespace

// row_sums and best_negatives from the tiles of columns. Four lanes share a row, each taking every
// fourth tile, and 8 rows go side by side: whole sectors, and an order that no grid changes.
// gate: reduce_rows registers <= 64
PFC_KERNEL(reduce_rows, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != kOk) {
        return;
    }
    const uint32_t count = view.block->rows, part = threadIdx.x % 32 / 8;
    const uint32_t tiles = (view.block->classes + kTileColumns - 1) / kTileColumns;
    for (uint32_t group = rows::first_row(); group * 8 < count; group += rows::row_stride()) {
        const uint32_t row = group * 8 + threadIdx.x % 8;
        double sum = 0.0;
        float best = kElsewhere;
        if (row < count) {
#pragma unroll 4
            for (uint32_t tile = part; tile < tiles; tile += kLanesOfRow) {
                const uint64_t at = uint64_t(tile) * view.row_capacity + row;
                sum += double(view.partial_sums[at]);
                const float found = view.partial_best[at];
                best = found > best ? found : best;
            }
        }
        for (int mask = 8; mask < 32; mask *= 2) {
            sum += ptx::shuffle_xor(sum, mask);
            const float other = ptx::shuffle_xor(best, mask);
            best = other > best ? other : best;
        }
        if (part == 0 && row < count) {
            view.row_sums[row] = float(sum);
            view.best_negatives[row] = best;
        }
    }
}

// This rank's part of C, whatever became of the step: the other ranks wait for it. `place`: 1
// for a loss in the device's memory, -1 for one of the host's, 0 for none. `room`: classes that a
// replicated head's dW has rows for. Both are for hosts that have to know of the others'.
// gate: pack_sums registers <= 56
PFC_KERNEL(pack_sums, (const PFC_GRID_CONSTANT HeadView view, int32_t own_status, int32_t place,
                       uint64_t room)) {
    PFC_DYNAMIC_SHARED(dynamic);
    if (blockIdx.x != 0) {
        return;
    }
    if (view.sharded) {
        pack_sharded(view, own_status, place, shared_of(dynamic));
    } else {
        pack_replicated(view, own_status, place, room, shared_of(dynamic));
    }
}

// The verdict on the reduced sums and the loss; `loss` may be null. The last word on a step's
// forward: a step that failed anywhere is counted here.
// gate: judge_sums registers <= 56
PFC_KERNEL(judge_sums, (const PFC_GRID_CONSTANT HeadView view, double* loss)) {
    PFC_DYNAMIC_SHARED(dynamic);
    if (blockIdx.x != 0) {
        return;
    }
    const Shared shared = shared_of(dynamic);
    StepBlock& block = *view.block;
    const int32_t status = block.status;
    // A replicated rank's own bad embedding is no verdict yet: the others have to hear of it.
    const bool open = status == kOk || (!view.sharded && block.fault == kFaultEmbedding);
    __syncthreads();  // all have read the status
    double sum = 0.0;
    if (open && view.sharded) {
        sum = judge_sharded(view, shared);
    } else if (open && threadIdx.x == 0) {
        judge_replicated(view);
        sum = view.replicated_sums[0];
    }
    if (threadIdx.x != 0) {
        return;
    }
    if (block.status == kOk) {
        block.loss = block.valid_rows == 0 ? 0.0 : sum / double(block.valid_rows);
    } else {
        block.loss = nan("");
        Ledger& ledger = *view.ledger;
        if (ledger.failed == 0) {
            ledger.first_failure = block;
        }
        ledger.failed += 1;
    }
    if (loss != nullptr) {
        *loss = block.loss;
    }
}

// E' as GEMM3's operand; rows to the end of the last tile are zero.
// gate: scale_embeddings registers <= 40
PFC_KERNEL(scale_embeddings, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != kOk) {
        return;
    }
    const uint32_t count = view.block->rows;
    const uint32_t end = rows::round_up(count, kTileRows);
    for (uint32_t row = rows::first_row(); row < end; row += rows::row_stride()) {
        const float factor = row < count ? view.factors[row] : 0.0f;
        for (uint32_t column = rows::kGroup * (threadIdx.x % 32); column < view.depth_pitch;
             column += rows::kSpan) {
            const uint64_t at = uint64_t(row) * view.depth_pitch + column;
            ptx::Float4 values = rows::zeros();
            if (factor != 0.0f) {
                const ptx::Float4 unit = *reinterpret_cast<const ptx::Float4*>(view.units + at);
                values = rows::scaled(factor, unit);
            }
            if (view.split_operands) {
                rows::write_split(view.scaled_operand + at, view.plane_rows, values);
            } else {
                rows::write_bfloat(view.scaled_operand + at, values);
            }
        }
    }
}
