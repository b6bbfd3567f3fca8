// The optimizer's update of the sampled rows, and the record of what other dense rows miss by it.
//
//     dW = (dW^ - (dW^ . u) u) / |W| with u = W / |W|, the row as it is after the latest update
//     (W, m, v) by the rule of rule.h
//
// Accumulated: place_rows, then accumulate_rows for each chunk, in every micro-batch; in the update
// begin_update, apply_accumulated, finish_accumulated, then as below.
//
// Order within a step: begin_update, update_rows for each chunk of columns (or the epilogue of the
// center gradient), then advance_history, then end_update. Semantics: src/optimizer,
// src/device/cpu/rows.rs and vector.rs normalize_backward. Floor of
// update_rows: 4 d bytes of gradient and 16 d (SGD) or 24 d (AdamW) of rows and state a column, in
// bf16 half of the latter; the second pass over a row finds it in the cache.
#include "ptx/atomic.h"
#include "replay.h"

constexpr double kLargestFloat = 3.4028234663852886e38;

// The coefficients of update number updates + 1. The gradient is multiplied by `factor` and, with
// `on_device`, by the ledger's device_factor. If that comes to no finite float32, the update is
// skipped: the kernels that follow leave rows, state and counters alone, as those of a failed step.
// The ledger gets the factor's word at factors[slot]; the labels message of a later step tells it.
// `counts` is an Accumulated's where its gradients are applied, else null: those of the step that
// failed are not among them, and without any there is no update.
// launch: begin_update blocks 1 threads 32 shared 0
// gate: begin_update registers <= 40
PFC_KERNEL(begin_update, (const PFC_GRID_CONSTANT HeadArrays head, double learning_rate,
                          double factor, int32_t on_device, uint32_t slot,
                          const uint32_t* counts)) {
    if (blockIdx.x != 0 || threadIdx.x != 0) {
        return;
    }
    Ledger& ledger = *head.ledger;
    if (on_device != 0) {
        factor *= double(ledger.device_factor);
    }
    const bool finite = fabs(factor) <= kLargestFloat;
    int64_t word = kSkippedFactor;
    if (finite) {
        __builtin_memcpy(&word, &factor, sizeof word);
    }
    ledger.factors[slot] = word;
    Rule made = {};
    const bool ready = counts == nullptr ? head.block->status == kOk : counts[1] != 0;
    if (!ready || !finite) {
        if (ready) {
            ledger.skipped += 1;
        }
        if (ready && counts == nullptr) {
            head.block->status = kSkipped;
        }
        *head.rule = made;
        return;
    }
    const OptimizerSettings& optimizer = head.optimizer;
    if (optimizer.adamw) {
        const uint64_t update = head.ledger->updates + 1;
        made.beta1 = float(optimizer.beta1);
        made.beta2 = float(optimizer.beta2);
        made.one_minus_beta1 = float(1.0 - optimizer.beta1);
        made.one_minus_beta2 = float(1.0 - optimizer.beta2);
        made.decay_factor = float(learning_rate * optimizer.weight_decay);
        made.corrected_rate = float(learning_rate / (1.0 - rule::power(optimizer.beta1, update)));
        made.sqrt_v_scale = float(1.0 / sqrt(1.0 - rule::power(optimizer.beta2, update)));
        made.epsilon = float(optimizer.epsilon);
    } else {
        made.momentum = float(optimizer.momentum);
        made.weight_decay = float(optimizer.weight_decay);
    }
    made.learning_rate = float(learning_rate);
    made.factor = float(factor);
    made.active = 1;
    *head.rule = made;
}

namespace {

// Gives columns of a row their gradient, and stores them. `now` becomes what is stored.
PFC_DEVICE void apply(const HeadArrays& head, const Rule& rule, const stored::Keys& keys,
                      uint32_t row, uint32_t column, stored::Group& now, const ptx::Float4& g) {
    if (head.optimizer.adamw) {
        rule::adamw(rule, now.w, now.m, now.v, g);
    } else {
        rule::sgd(rule, now.w, now.m, g);
    }
    stored::write_all(head, keys, row, column, now);
}

PFC_DEVICE float probe(float so_far, const stored::Group& group) {
    return rule::probe(rule::probe(rule::probe(so_far, group.w), group.m), group.v);
}

}  // namespace

// Updates columns first .. first + count of the sample; their dW^ begins center_gradient. A row
// without direction has gradient 0.
// launch: update_rows blocks 4 per SM threads 256 shared 0
// gate: update_rows registers <= 112
PFC_KERNEL(update_rows, (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first, uint32_t count)) {
    if (head.block->status != kOk || first >= head.block->classes) {
        return;
    }
    const uint32_t lane = threadIdx.x % 32;
    const Rule rule = *head.rule;
    // Rows in float32 are brought up to date in memory by the first pass. Others would be rounded
    // twice: both passes bring a copy up to date.
    const bool in_place = stored::in_float32(head);
    count = smaller(count, head.block->classes - first);
    for (uint32_t slot = rows::first_row(); slot < count; slot += rows::row_stride()) {
        const uint32_t row = head.sample[first + slot];
        const float* unit_gradient = head.center_gradient + uint64_t(slot) * head.dim;
        replay::Missed missed = replay::missed(head, row);
        const stored::Keys keys = stored::keys(head, row, head.ledger->updates + 1);
        double dot = 0.0;
        for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 w;
            if (in_place && missed.count != 0) {
                stored::Group now = replay::current(head, missed, row, column);
                stored::write_all(head, keys, row, column, now);
                w = now.w;
            } else {
                w = replay::center(head, missed, row, column);
            }
            dot = rows::add_products(dot, rows::read_floats(unit_gradient, column, head.dim), w);
        }
        if (in_place) {
            missed.count = 0;
        }
        const float inverse = head.center_inverse_norms[first + slot];
        const float along = float(warp_sum(dot) * double(inverse)) * inverse;
        const float length = inverse * rule.factor;
        double squares = 0.0;
        float torn = 0.0f;
        for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            stored::Group now = replay::current(head, missed, row, column);
            const ptx::Float4 g = rows::subtract_along(
                rows::read_floats(unit_gradient, column, head.dim), along, now.w, length);
            apply(head, rule, keys, row, column, now, g);
            torn = probe(torn, now);
            squares = rows::add_squares(squares, g);
        }
        squares = warp_sum(squares);
        if (torn != 0.0f) {
            ptx::atomic_min(&head.ledger->torn_row, row);
        }
        ptx::sync_warp();  // every lane has read last_update
        if (lane == 0) {
            head.center_squares[first + slot] = float(squares);
            if (head.optimizer.dense) {
                head.last_update[row] = uint32_t(head.ledger->updates + 1);
            }
        }
    }
}

// Gives a place among the accumulated gradients to each class of the sample that has none, by
// ascending class: replicated ranks, whose samples are the same, add up place by place. One CTA.
// launch: place_rows blocks 1 threads 1024 shared 256
// gate: place_rows registers <= 32
PFC_KERNEL_OF(place_rows, 1024, 1,
              (const PFC_GRID_CONSTANT HeadArrays head,
               const PFC_GRID_CONSTANT Accumulated accumulated)) {
    PFC_DYNAMIC_SHARED(shared);
    if (blockIdx.x != 0 || head.block->status != kOk) {
        return;
    }
    const uint32_t classes = head.block->classes;
    uint32_t rows = accumulated.counts[0];
    for (uint32_t first = 0; first < classes; first += blockDim.x) {
        const uint32_t column = first + threadIdx.x;
        const uint32_t row = column < classes ? head.sample[column] : 0;
        const bool is_new = column < classes && accumulated.places[row] == 0;
        uint32_t total;
        const uint32_t at = rows + block_scan(is_new ? 1u : 0u, total, shared);
        if (is_new) {
            accumulated.classes[at] = row;
            accumulated.places[row] = at + 1;
        }
        rows += total;
    }
    __syncthreads();  // all have read the count
    if (threadIdx.x == 0) {
        accumulated.counts[0] = rows;
        accumulated.counts[1] += 1;
    }
}

// Adds dW of columns first .. first + count of the sample to the accumulated gradients; their dW^
// begins center_gradient. No row moves before the update, so that dW is of the row as it is now.
// launch: accumulate_rows blocks 4 per SM threads 256 shared 0
// gate: accumulate_rows registers <= 104
PFC_KERNEL(accumulate_rows,
           (const PFC_GRID_CONSTANT HeadArrays head,
            const PFC_GRID_CONSTANT Accumulated accumulated, uint32_t first, uint32_t count)) {
    if (head.block->status != kOk || first >= head.block->classes) {
        return;
    }
    const uint32_t lane = threadIdx.x % 32;
    count = smaller(count, head.block->classes - first);
    for (uint32_t slot = rows::first_row(); slot < count; slot += rows::row_stride()) {
        const uint32_t row = head.sample[first + slot];
        const float* unit_gradient = head.center_gradient + uint64_t(slot) * head.dim;
        float* const sum =
            accumulated.gradients + uint64_t(accumulated.places[row] - 1) * head.dim;
        const replay::Missed missed = replay::missed(head, row);
        double dot = 0.0;
        for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            dot = rows::add_products(dot, rows::read_floats(unit_gradient, column, head.dim),
                                     replay::center(head, missed, row, column));
        }
        const float inverse = head.center_inverse_norms[first + slot];
        const float along = float(warp_sum(dot) * double(inverse)) * inverse;
        for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            const ptx::Float4 w = replay::center(head, missed, row, column);
            const ptx::Float4 g = rows::subtract_along(
                rows::read_floats(unit_gradient, column, head.dim), along, w, inverse);
            const ptx::Float4 before = rows::read_floats(sum, column, head.dim);
            rows::write_floats(sum, column, head.dim,
                               ptx::Float4{before.x + g.x, before.y + g.y, before.z + g.z,
                                           before.w + g.w});
        }
    }
}

// Updates the rows that have an accumulated gradient, and leaves no gradient behind. An update that
// is skipped only does the latter.
// launch: apply_accumulated blocks 4 per SM threads 256 shared 0
// gate: apply_accumulated registers <= 112
PFC_KERNEL(apply_accumulated, (const PFC_GRID_CONSTANT HeadArrays head,
                               const PFC_GRID_CONSTANT Accumulated accumulated)) {
    const uint32_t lane = threadIdx.x % 32, count = accumulated.counts[0];
    const Rule rule = *head.rule;
    for (uint32_t slot = rows::first_row(); slot < count; slot += rows::row_stride()) {
        const uint32_t row = accumulated.classes[slot];
        float* const from = accumulated.gradients + uint64_t(slot) * head.dim;
        const replay::Missed missed = replay::missed(head, row);
        const stored::Keys keys = stored::keys(head, row, head.ledger->updates + 1);
        double squares = 0.0;
        float torn = 0.0f;
        for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            const ptx::Float4 g =
                rows::scaled(rule.factor, rows::read_floats(from, column, head.dim));
            rows::write_floats(from, column, head.dim, rows::zeros());
            if (rule.active == 0) {
                continue;
            }
            stored::Group now = replay::current(head, missed, row, column);
            apply(head, rule, keys, row, column, now, g);
            torn = probe(torn, now);
            squares = rows::add_squares(squares, g);
        }
        if (torn != 0.0f) {
            ptx::atomic_min(&head.ledger->torn_row, row);
        }
        squares = warp_sum(squares);
        ptx::sync_warp();  // every lane has read last_update
        if (lane == 0) {
            accumulated.squares[slot] = rule.active != 0 ? float(squares) : 0.0f;
            accumulated.places[row] = 0;
            if (head.optimizer.dense && rule.active != 0) {
                head.last_update[row] = uint32_t(head.ledger->updates + 1);
            }
        }
    }
}

// block->grad_centers of the gradients that apply_accumulated has applied. None is left. One CTA.
// launch: finish_accumulated blocks 1 threads 1024 shared 256
// gate: finish_accumulated registers <= 32
PFC_KERNEL_OF(finish_accumulated, 1024, 1,
              (const PFC_GRID_CONSTANT HeadArrays head,
               const PFC_GRID_CONSTANT Accumulated accumulated)) {
    PFC_DYNAMIC_SHARED(dynamic);
    if (blockIdx.x != 0) {
        return;
    }
    const uint32_t count = accumulated.counts[0];
    double sum = 0.0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        sum += double(accumulated.squares[i]);
    }
    sum = block_sum(sum, dynamic);
    if (threadIdx.x == 0) {
        head.block->grad_centers = sum;
        accumulated.counts[0] = 0;
        accumulated.counts[1] = 0;
    }
}

namespace {

// What is left of w: `shift` is whole - 1, which has the digits near 1. src/optimizer/replay.rs Decay.
PFC_DEVICE void change(MissedUpdates& missed, double shift, double whole, double by) {
    missed.shift_w = shift + by;
    missed.whole_w = missed.shift_w > -0.5 ? 1.0 + missed.shift_w : whole + by;
}

}  // namespace

// Adds this update to what the rows of every age missed, before end_update counts it.
//
// A missed update of SGD is (w, m) -> (w - lr * m', m') with m' = momentum * m + weight_decay * w:
// one matrix for all elements of all rows, multiplied onto each slot's product. The product's first
// entry is stored as it is and less 1: near 1 its digits are in the distance from 1.
// launch: advance_history blocks 1 per SM threads 256 shared 0
// gate: advance_history registers <= 32
PFC_KERNEL(advance_history, (const PFC_GRID_CONSTANT HeadArrays head)) {
    const Rule rule = *head.rule;
    if (rule.active == 0 || !head.optimizer.dense) {
        return;
    }
    const double rate = rule.learning_rate, mu = head.optimizer.momentum,
                 decay = head.optimizer.weight_decay;
    const uint64_t updates = head.ledger->updates;
    const uint32_t ring = head.history_capacity;
    const uint32_t newest = uint32_t(updates % ring), next = uint32_t((updates + 1) % ring);
    for (uint32_t slot = blockIdx.x * blockDim.x + threadIdx.x; slot < ring;
         slot += gridDim.x * blockDim.x) {
        MissedUpdates missed = head.missed_updates[slot];
        if (head.optimizer.adamw) {
            const bool none = slot == newest;
            const double a = none ? 0.0 : missed.shift_w, whole = none ? 1.0 : missed.whole_w;
            change(missed, a, whole, -whole * (rate * decay));
            if (slot == next) {
                missed.w_m = rule.corrected_rate;
                missed.m_w = rule.sqrt_v_scale;
            }
        } else {
            // [1 - lr wd, -lr mu; wd, mu] * [whole, b; c, d]. The rows left at the newest update
            // had missed nothing yet.
            const bool none = slot == newest;
            const double a = none ? 0.0 : missed.shift_w, b = none ? 0.0 : missed.w_m;
            const double c = none ? 0.0 : missed.m_w, d = none ? 1.0 : missed.m_m;
            const double first = none ? 1.0 : missed.whole_w;
            change(missed, a, first, -rate * (decay * first + mu * c));
            missed.w_m = b - rate * (decay * b + mu * d);
            missed.m_w = decay * first + mu * c;
            missed.m_m = decay * b + mu * d;
        }
        head.missed_updates[slot] = missed;
    }
}

// launch: end_update blocks 1 threads 32 shared 0
// gate: end_update registers <= 8
PFC_KERNEL(end_update, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && head.rule->active != 0) {
        head.ledger->updates += 1;
    }
}
