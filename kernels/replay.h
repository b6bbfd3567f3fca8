// Dense rows: what a row missed since the update that it was last brought to, made up for while it
// is read.
//
// SGD: (w, m) -> (keep * w + (w_w * w + w_m * m), m_w * w + m_m * m), the product of the missed
// updates' matrices. AdamW: w -> w + (decay - 1) * w - m * sum_k rate_k / (root_k * sqrt(v) +
// epsilon), m -> beta1^gap * m, v -> beta2^gap * v.
//
// view.gaps is a ring: slot s holds what rows missed whose last update is the latest before now
// with number mod history_capacity = s. So a row may be behind by history_capacity updates, not
// more; the host sweeps with catch_up_rows in time. A slot that no row was left at yet holds
// nothing: the first update after it writes it whole. Semantics: src/optimizer/replay.rs.
//
// All lanes of a warp come here together with the same row: an AdamW row's moves are worked out 32
// at a time, one a lane.
#pragma once

#include "rows.h"
#include "rule.h"

namespace replay {

struct Missed {
    uint64_t last;
    uint64_t gap;                     // 0: the row is current
    float keep, w_w, w_m, m_w, m_m;   // SGD
    float decay, shrink_m, shrink_v;  // AdamW: decay - 1
    uint32_t moves;                   // AdamW: missed updates whose moves count
};

PFC_DEVICE const Gap& slot(const HeadView& view, uint64_t update) {
    return view.gaps[update % view.history_capacity];
}

PFC_DEVICE Missed missed(const HeadView& view, uint32_t row) {
    Missed missed = {};
    if (!view.optimizer.dense) {
        return missed;
    }
    missed.last = view.last[row];
    missed.gap = view.ledger->updates - missed.last;
    if (missed.gap == 0) {
        return missed;
    }
    const Gap gap = slot(view, missed.last);
    if (view.optimizer.adamw) {
        missed.decay = float(gap.shift_w);
        missed.shrink_m = float(rule::power(view.optimizer.beta1, missed.gap));
        missed.shrink_v = float(rule::power(view.optimizer.beta2, missed.gap));
        missed.moves =
            uint32_t(missed.gap < view.optimizer.replayed ? missed.gap : view.optimizer.replayed);
    } else {
        // Near the identity the distance from it has the digits, far from it the entry itself.
        const bool near = gap.shift_w > -0.5;
        missed.keep = near ? 1.0f : 0.0f;
        missed.w_w = float(near ? gap.shift_w : 1.0 + gap.shift_w);
        missed.w_m = float(gap.w_m);
        missed.m_w = float(gap.m_w);
        missed.m_m = float(gap.m_m);
    }
    return missed;
}

PFC_DEVICE void turn(const Missed& missed, float& w, float& m) {
    const float old_w = w, old_m = m;
    const float moved =
        ptx::add(ptx::multiply(missed.w_w, old_w), ptx::multiply(missed.w_m, old_m));
    w = ptx::add(ptx::multiply(missed.keep, old_w), moved);
    m = ptx::add(ptx::multiply(missed.m_w, old_w), ptx::multiply(missed.m_m, old_m));
}

PFC_DEVICE void move(const Missed& missed, float sum, float& w, float& m, float& v) {
    w = ptx::add(w, ptx::subtract(ptx::multiply(missed.decay, w), ptx::multiply(m, sum)));
    m = ptx::multiply(m, missed.shrink_m);
    v = ptx::multiply(v, missed.shrink_v);
}

// sum_k rate_k / (root_k * sqrt(v) + epsilon) for a lane's four elements.
PFC_DEVICE ptx::Float4 moves(const HeadView& view, const Missed& missed, const ptx::Float4& v) {
    const ptx::Float4 root_v = {ptx::square_root(v.x), ptx::square_root(v.y), ptx::square_root(v.z),
                                ptx::square_root(v.w)};
    const float epsilon = float(view.optimizer.epsilon);
    const double root_beta2 = sqrt(view.optimizer.beta2);
    ptx::Float4 total = rows::zeros();
    for (uint32_t first = 0; first < missed.moves; first += 32) {
        const uint64_t number = uint64_t(first) + threadIdx.x % 32 + 1;
        float rate = 0.0f, root = 0.0f;
        if (number <= missed.moves) {
            const Gap update = slot(view, missed.last + number);
            // What decays after the move is what a row missed that was left at it.
            const double decay = number == missed.gap ? 1.0 : 1.0 + update.shift_w;
            rate = float(update.w_m * rule::power(view.optimizer.beta1, number) * decay);
            root = float(update.m_w * rule::power(root_beta2, number));
        }
        ptx::Float4 sum = rows::zeros();
        const uint32_t count = rows::least(32, missed.moves - first);
        for (uint32_t lane = 0; lane < count; ++lane) {
            const float r = ptx::shuffle(rate, int(lane)), q = ptx::shuffle(root, int(lane));
            sum.x += ptx::divide(r, q * root_v.x + epsilon);
            sum.y += ptx::divide(r, q * root_v.y + epsilon);
            sum.z += ptx::divide(r, q * root_v.z + epsilon);
            sum.w += ptx::divide(r, q * root_v.w + epsilon);
        }
        total.x += sum.x;
        total.y += sum.y;
        total.z += sum.z;
        total.w += sum.w;
    }
    return total;
}

// Brings a lane's group of a row, with its state, to now. `v` counts for AdamW alone.
PFC_DEVICE void catch_up(const HeadView& view, const Missed& missed, ptx::Float4& w, ptx::Float4& m,
                         ptx::Float4& v) {
    if (missed.gap == 0) {
        return;
    }
    if (view.optimizer.adamw) {
        const ptx::Float4 sum = moves(view, missed, v);
        move(missed, sum.x, w.x, m.x, v.x);
        move(missed, sum.y, w.y, m.y, v.y);
        move(missed, sum.z, w.z, m.z, v.z);
        move(missed, sum.w, w.w, m.w, v.w);
    } else {
        turn(missed, w.x, m.x);
        turn(missed, w.y, m.y);
        turn(missed, w.z, m.z);
        turn(missed, w.w, m.w);
    }
}

// Columns `column` .. of class centre `row` as it is now; 0 beyond its pitch. Nothing is written
// back.
PFC_DEVICE ptx::Float4 center(const HeadView& view, const Missed& missed, uint32_t row,
                              uint32_t column) {
    const uint64_t start = uint64_t(row) * view.master_pitch;
    ptx::Float4 w = rows::read_group(view.centers + start, column, view.master_pitch);
    if (missed.gap != 0) {
        ptx::Float4 m = rows::read_group(view.momentum + start, column, view.master_pitch);
        ptx::Float4 v = rows::zeros();
        if (view.optimizer.adamw) {
            v = rows::read_group(view.second_moment + start, column, view.master_pitch);
        }
        catch_up(view, missed, w, m, v);
    }
    return w;
}

// Brings columns `column` .. of a row to now in memory, and gives those of the class centre. The
// row's `last` is the caller's to write.
PFC_DEVICE ptx::Float4 catch_up_group(const HeadView& view, const Missed& missed, uint32_t row,
                                      uint32_t column) {
    const uint64_t start = uint64_t(row) * view.master_pitch;
    ptx::Float4 w = rows::read_group(view.centers + start, column, view.master_pitch);
    if (missed.gap != 0) {
        ptx::Float4 m = rows::read_group(view.momentum + start, column, view.master_pitch);
        ptx::Float4 v = rows::zeros();
        if (view.optimizer.adamw) {
            v = rows::read_group(view.second_moment + start, column, view.master_pitch);
        }
        catch_up(view, missed, w, m, v);
        rows::write_group(view.centers + start, column, view.master_pitch, w);
        rows::write_group(view.momentum + start, column, view.master_pitch, m);
        if (view.optimizer.adamw) {
            rows::write_group(view.second_moment + start, column, view.master_pitch, v);
        }
    }
    return w;
}

// The same of a whole row.
PFC_DEVICE void catch_up_row(const HeadView& view, const Missed& missed, uint32_t row) {
    for (uint32_t base = 0; base < view.dim; base += rows::kSpan) {
        catch_up_group(view, missed, row, base + rows::kGroup * (threadIdx.x % 32));
    }
}

}  // namespace replay
