// Dense rows: applies the updates that a row missed since it was last brought up to date, while the
// row is read.
//
// SGD: (w, m) -> (keep * w + (w_w * w + w_m * m), m_w * w + m_m * m), the product of the missed
// updates' matrices. AdamW, for n missed updates: w -> decay * w - m * sum_k rate_k / (scale_k *
// sqrt(v) + epsilon), m -> beta1^n * m, v -> beta2^n * v; decay = keep + w_w.
//
// head.missed_updates is a ring. Slot s is for the rows whose last update is the latest before now
// with number mod history_capacity = s. So a row may be behind by history_capacity updates and no
// more; the host calls catch_up_rows before that. A slot at which no row was left yet has no
// meaning: the first update after it writes it whole. Semantics: src/optimizer/replay.rs.
//
// All lanes of a warp call these functions together with the same row: the moves of an AdamW row
// are computed 32 at a time, one a lane.
#pragma once

#include "rule.h"
#include "stored.h"

namespace replay {

struct Missed {
    uint64_t last_update;
    uint64_t count;                   // missed updates; 0: the row is current
    float keep, w_w;           // what is left of w: keep is 1 or 0
    float w_m, m_w, m_m;       // SGD
    float shrink_m, shrink_v;  // AdamW
    uint32_t moves;            // AdamW: missed updates whose moves count
};

PFC_DEVICE const MissedUpdates& slot(const HeadArrays& head, uint64_t update) {
    return head.missed_updates[update % head.history_capacity];
}

PFC_DEVICE Missed missed(const HeadArrays& head, uint32_t row) {
    Missed missed = {};
    if (!head.optimizer.dense) {
        return missed;
    }
    missed.last_update = head.last_update[row];
    missed.count = head.ledger->updates - missed.last_update;
    if (missed.count == 0) {
        return missed;
    }
    const MissedUpdates update = slot(head, missed.last_update);
    const bool near = update.shift_w > -0.5;
    missed.keep = near ? 1.0f : 0.0f;
    missed.w_w = float(near ? update.shift_w : update.whole_w);
    if (head.optimizer.adamw) {
        missed.shrink_m = float(rule::power(head.optimizer.beta1, missed.count));
        missed.shrink_v = float(rule::power(head.optimizer.beta2, missed.count));
        const uint64_t replayed = head.optimizer.replayed_updates;
        missed.moves = uint32_t(missed.count < replayed ? missed.count : replayed);
    } else {
        missed.w_m = float(update.w_m);
        missed.m_w = float(update.m_w);
        missed.m_m = float(update.m_m);
    }
    return missed;
}

PFC_DEVICE void replay_sgd(const Missed& missed, float& w, float& m) {
    const float old_w = w, old_m = m;
    const float moved =
        ptx::add(ptx::multiply(missed.w_w, old_w), ptx::multiply(missed.w_m, old_m));
    w = ptx::add(ptx::multiply(missed.keep, old_w), moved);
    m = ptx::add(ptx::multiply(missed.m_w, old_w), ptx::multiply(missed.m_m, old_m));
}

PFC_DEVICE void replay_adamw(const Missed& missed, float sum, float& w, float& m, float& v) {
    const float moved = ptx::subtract(ptx::multiply(missed.w_w, w), ptx::multiply(m, sum));
    w = ptx::add(ptx::multiply(missed.keep, w), moved);
    m = ptx::multiply(m, missed.shrink_m);
    v = ptx::multiply(v, missed.shrink_v);
}

// sum_k rate_k / (scale_k * sqrt(v) + epsilon) for a lane's four elements.
PFC_DEVICE ptx::Float4 moves(const HeadArrays& head, const Missed& missed, const ptx::Float4& v) {
    const ptx::Float4 sqrt_v = {ptx::square_root(v.x), ptx::square_root(v.y), ptx::square_root(v.z),
                                ptx::square_root(v.w)};
    const float epsilon = float(head.optimizer.epsilon);
    const double sqrt_beta2 = sqrt(head.optimizer.beta2);
    ptx::Float4 total = rows::zeros();
    for (uint32_t first = 0; first < missed.moves; first += 32) {
        const uint64_t number = uint64_t(first) + threadIdx.x % 32 + 1;
        float rate = 0.0f, scale = 0.0f;
        if (number <= missed.moves) {
            const MissedUpdates update = slot(head, missed.last_update + number);
            // The decay after this move is the one of a row that was left at this update.
            const double decay = number == missed.count ? 1.0 : update.whole_w;
            rate = float(update.w_m * rule::power(head.optimizer.beta1, number) * decay);
            scale = float(update.m_w * rule::power(sqrt_beta2, number));
        }
        ptx::Float4 sum = rows::zeros();
        const uint32_t count = smaller(32, missed.moves - first);
        for (uint32_t lane = 0; lane < count; ++lane) {
            const float r = ptx::shuffle(rate, int(lane)), s = ptx::shuffle(scale, int(lane));
            sum.x += ptx::divide(r, s * sqrt_v.x + epsilon);
            sum.y += ptx::divide(r, s * sqrt_v.y + epsilon);
            sum.z += ptx::divide(r, s * sqrt_v.z + epsilon);
            sum.w += ptx::divide(r, s * sqrt_v.w + epsilon);
        }
        total.x += sum.x;
        total.y += sum.y;
        total.z += sum.z;
        total.w += sum.w;
    }
    return total;
}

// Brings a lane's columns of a row up to date.
PFC_DEVICE void catch_up(const HeadArrays& head, const Missed& missed, stored::Group& group) {
    if (missed.count == 0) {
        return;
    }
    ptx::Float4 &w = group.w, &m = group.m, &v = group.v;
    if (head.optimizer.adamw) {
        const ptx::Float4 sum = moves(head, missed, v);
        replay_adamw(missed, sum.x, w.x, m.x, v.x);
        replay_adamw(missed, sum.y, w.y, m.y, v.y);
        replay_adamw(missed, sum.z, w.z, m.z, v.z);
        replay_adamw(missed, sum.w, w.w, m.w, v.w);
    } else {
        replay_sgd(missed, w.x, m.x);
        replay_sgd(missed, w.y, m.y);
        replay_sgd(missed, w.z, m.z);
        replay_sgd(missed, w.w, m.w);
    }
}

// Columns `column` .. of a row's tensors, brought up to date; 0 beyond its pitch. Memory stays as
// it is.
PFC_DEVICE stored::Group current(const HeadArrays& head, const Missed& missed, uint32_t row,
                                 uint32_t column) {
    stored::Group group = stored::read_all(head, row, column);
    catch_up(head, missed, group);
    return group;
}

// The same of the class center alone.
PFC_DEVICE ptx::Float4 center(const HeadArrays& head, const Missed& missed, uint32_t row,
                              uint32_t column) {
    return missed.count == 0 ? stored::read(head, stored::centers(head), row, column)
                             : current(head, missed, row, column).w;
}

// Brings a whole row up to date in memory. The caller writes its last_update.
PFC_DEVICE void catch_up_row(const HeadArrays& head, const Missed& missed, uint32_t row) {
    const stored::Keys keys = stored::keys(head, row, head.ledger->updates);
    for (uint32_t base = 0; base < head.dim; base += rows::kSpan) {
        const uint32_t column = base + rows::kGroup * (threadIdx.x % 32);
        stored::Group group = current(head, missed, row, column);
        stored::write_all(head, keys, row, column, group);
    }
}

}  // namespace replay
