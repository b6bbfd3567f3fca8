// The optimizer's update of the sampled rows, and what dense rows that are not sampled miss by it.
//
//     dW = (dW^ - (dW^ . u) u) / |W| with u = W / |W|, the row as it is after the latest update
//     (W, m, v) by the rule of rule.h
//
// Order within a step: begin_update, update_rows for each chunk of columns (or the fused update of
// the third product), then advance_history, then end_update. Semantics: src/optimizer.rs,
// src/optimizer/replay.rs, Table::rows and count_update, vector.rs normalize_backward. Floor of
// update_rows: 4 d bytes of gradient and 16 d (SGD) or 24 d (AdamW) of rows and state a column; the
// second pass over a row finds it in the cache.
#include "replay.h"

// The coefficients of update number updates + 1.
// gate: begin_update registers <= 32
PFC_KERNEL(begin_update, (const PFC_GRID_CONSTANT HeadView view, double learning_rate)) {
    if (blockIdx.x != 0 || threadIdx.x != 0 || view.block->status != kOk) {
        return;
    }
    const OptimizerView& optimizer = view.optimizer;
    Rule made = {};
    if (optimizer.adamw) {
        const uint64_t update = view.ledger->updates + 1;
        made.beta1 = float(optimizer.beta1);
        made.beta2 = float(optimizer.beta2);
        made.rest1 = float(1.0 - optimizer.beta1);
        made.rest2 = float(1.0 - optimizer.beta2);
        made.decay = float(learning_rate * optimizer.weight_decay);
        made.rate = float(learning_rate / (1.0 - rule::power(optimizer.beta1, update)));
        made.root = float(1.0 / sqrt(1.0 - rule::power(optimizer.beta2, update)));
        made.epsilon = float(optimizer.epsilon);
    } else {
        made.momentum = float(optimizer.momentum);
        made.weight_decay = float(optimizer.weight_decay);
    }
    made.learning_rate = float(learning_rate);
    *view.rule = made;
}

// Columns first .. first + count of the sample, their dW^ in center_gradient from its start. A row
// without direction has gradient 0.
// gate: update_rows registers <= 104
PFC_KERNEL(update_rows, (const PFC_GRID_CONSTANT HeadView view, uint32_t first, uint32_t count)) {
    if (view.block->status != kOk || first >= view.block->classes) {
        return;
    }
    const uint32_t lane = threadIdx.x % 32;
    const Rule step = *view.rule;
    count = rows::least(count, view.block->classes - first);
    for (uint32_t slot = rows::first_row(); slot < count; slot += rows::row_stride()) {
        const uint32_t row = view.sample[first + slot];
        const uint64_t start = uint64_t(row) * view.master_pitch;
        const float* unit_gradient = view.center_gradient + uint64_t(slot) * view.dim;
        const replay::Missed missed = replay::missed(view, row);
        double dot = 0.0;
        for (uint32_t base = 0; base < view.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            dot = rows::add_products(dot, rows::read_floats(unit_gradient, column, view.dim),
                                     replay::catch_up_group(view, missed, row, column));
        }
        const float inverse = view.center_inverse_norms[first + slot];
        const float along = float(rows::sum_of_warp(dot) * double(inverse)) * inverse;
        double squares = 0.0;
        for (uint32_t base = 0; base < view.dim; base += rows::kSpan) {
            const uint32_t column = base + rows::kGroup * lane;
            ptx::Float4 w = rows::read_group(view.centers + start, column, view.master_pitch);
            ptx::Float4 m = rows::read_group(view.momentum + start, column, view.master_pitch);
            ptx::Float4 v = rows::zeros();
            if (view.optimizer.adamw) {
                v = rows::read_group(view.second_moment + start, column, view.master_pitch);
            }
            const ptx::Float4 g = rows::subtract_along(
                rows::read_floats(unit_gradient, column, view.dim), along, w, inverse);
            if (view.optimizer.adamw) {
                rule::adamw(step, w.x, m.x, v.x, g.x);
                rule::adamw(step, w.y, m.y, v.y, g.y);
                rule::adamw(step, w.z, m.z, v.z, g.z);
                rule::adamw(step, w.w, m.w, v.w, g.w);
                rows::write_group(view.second_moment + start, column, view.master_pitch, v);
            } else {
                rule::sgd(step, w.x, m.x, g.x);
                rule::sgd(step, w.y, m.y, g.y);
                rule::sgd(step, w.z, m.z, g.z);
                rule::sgd(step, w.w, m.w, g.w);
            }
            rows::write_group(view.centers + start, column, view.master_pitch, w);
            rows::write_group(view.momentum + start, column, view.master_pitch, m);
            squares = rows::add_squares(squares, g);
        }
        squares = rows::sum_of_warp(squares);
        ptx::sync_warp();  // every lane has read `last`
        if (lane == 0) {
            view.center_squares[first + slot] = float(squares);
            if (view.optimizer.dense) {
                view.last[row] = uint32_t(view.ledger->updates + 1);
            }
        }
    }
}

// Adds this update to what the rows of every age missed; before end_update counts it.
//
// A missed update of SGD is (w, m) -> (w - lr * m', m') with m' = momentum * m + weight_decay * w:
// one matrix for all elements of all rows, multiplied onto each slot's product. Kept less the
// identity in its first entry, whose distance from 1 is what counts.
// gate: advance_history registers <= 32
PFC_KERNEL(advance_history, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != kOk || !view.optimizer.dense) {
        return;
    }
    const Rule step = *view.rule;
    const double rate = step.learning_rate, mu = view.optimizer.momentum,
                 decay = view.optimizer.weight_decay;
    const uint64_t updates = view.ledger->updates;
    const uint32_t ring = view.history_capacity;
    const uint32_t newest = uint32_t(updates % ring), next = uint32_t((updates + 1) % ring);
    for (uint32_t slot = blockIdx.x * blockDim.x + threadIdx.x; slot < ring;
         slot += gridDim.x * blockDim.x) {
        Gap gap = view.gaps[slot];
        if (view.optimizer.adamw) {
            // 1 + a, times 1 - lr * decay.
            const double a = slot == newest ? 0.0 : gap.shift_w, lost = rate * decay;
            gap.shift_w = a - (1.0 + a) * lost;
            if (slot == next) {
                gap.w_m = step.rate;
                gap.m_w = step.root;
            }
        } else {
            // [1 - lr wd, -lr mu; wd, mu] * [1 + a, b; c, d]; the rows left at the newest update
            // had missed nothing yet.
            const bool none = slot == newest;
            const double a = none ? 0.0 : gap.shift_w, b = none ? 0.0 : gap.w_m;
            const double c = none ? 0.0 : gap.m_w, d = none ? 1.0 : gap.m_m;
            const double first = 1.0 + a;
            gap.shift_w = a - rate * (decay * first + mu * c);
            gap.w_m = b - rate * (decay * b + mu * d);
            gap.m_w = decay * first + mu * c;
            gap.m_m = decay * b + mu * d;
        }
        view.gaps[slot] = gap;
    }
}

// gate: end_update registers <= 8
PFC_KERNEL(end_update, (const PFC_GRID_CONSTANT HeadView view)) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && view.block->status == kOk) {
        view.ledger->updates += 1;
    }
}
