// kernels/loss.cu against plain double arithmetic: the reduction of the tiles, C of a sharded and
// of a replicated head, the verdict, the loss, E'.
#include "rows.h"

namespace {

constexpr uint64_t kSampleLimit = (uint64_t(1) << 32) + 77;

// The ranks' finite outcomes of a step, as judge_sums leaves them for the kernels after it.
struct Finished {
    std::vector<double> factors, coefficients;
    double loss = 0;
};

// Values as the forward leaves them.
struct Forward {
    std::vector<float> sums, logits, cosines, derivatives;

    explicit Forward(RowHead& head) {
        for (uint32_t row = 0; row < head.block.rows; ++row) {
            const bool here = head.columns[head.global(row)] != kNone;
            const bool ignored = head.ignored(row);
            sums.push_back(ignored ? 0.0f : std::exp(20 * head.uniform()));
            logits.push_back(here ? 60 * head.uniform() : 0.0f);
            cosines.push_back(ignored ? kIgnored : here ? head.uniform() : kElsewhere);
            derivatives.push_back(here ? 2 * head.uniform() : 0.0f);
        }
    }

    void put(RowHead& head) const {
        head.memory.put(head.arrays.row_sums, sums);
        head.memory.put(head.arrays.target_logits, logits);
        head.memory.put(head.arrays.target_cosines, cosines);
        head.memory.put(head.arrays.derivatives, derivatives);
    }

    Finished finish(const RowHead& head) const {
        Finished made;
        for (uint32_t row = 0; row < sums.size(); ++row) {
            made.factors.push_back(0);
            made.coefficients.push_back(0);
            if (cosines[row] == kIgnored) {
                continue;
            }
            const MarginSettings& margin = head.arrays.margin;
            const double target = std::exp(double(logits[row]) - margin.offset);
            const double whole = sums[row] + target;
            made.factors.back() = margin.scale / whole;
            made.coefficients.back() = -margin.scale * sums[row] / whole * derivatives[row];
            made.loss += std::log(whole) - std::log(target);
        }
        return made;
    }
};

void check_rows(RowHead& head, const Finished& truth, const std::string& what) {
    const uint32_t rows = head.block.rows;
    const std::vector<float> factors = head.memory.get(head.arrays.factors, rows);
    const std::vector<float> coefficients = head.memory.get(head.arrays.coefficients, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        EXPECT(close(factors[row], truth.factors[row], 2e-7), what);
        EXPECT(close(coefficients[row], truth.coefficients[row], 2e-7), what);
    }
}

void test_reducing() {
    for (uint32_t classes : {1u, 127u, 128u, 200u, 900u}) {
        Shape shape;
        shape.classes = classes;
        shape.shard_rows = 1000;
        RowHead head(shape, classes);
        const size_t tiles = head.arrays.column_tiles, rows = head.arrays.row_capacity;
        std::vector<float> sums, best;
        for (size_t i = 0; i < tiles * rows; ++i) {
            sums.push_back(std::exp(5 * head.uniform()));
            best.push_back(i % 5 == 0 ? kElsewhere : head.uniform());
        }
        head.memory.put(head.arrays.partial_sums, sums);
        head.memory.put(head.arrays.partial_best, best);
        head.fill(head.arrays.row_sums, rows, -1.0f);
        head.launch(kLaunches[classes % 4], "reduce_rows");
        const std::vector<float> found = head.memory.get(head.arrays.row_sums, rows);
        const std::vector<float> largest =
            head.memory.get(head.arrays.best_negatives, head.block.rows);
        for (uint32_t row = 0; row < head.block.rows; ++row) {
            double sum = 0;
            float most = kElsewhere;
            for (size_t tile = 0; tile < (classes + 127) / 128; ++tile) {
                sum += sums[tile * rows + row];
                most = std::max(most, best[tile * rows + row]);
            }
            EXPECT(close(found[row], sum, 1e-7) && largest[row] == most, "reduced");
        }
        EXPECT(found[head.block.rows] == -1.0f, "beyond the rows");
    }
}

double* loss_cell(RowHead& head) {
    double* const loss = head.memory.make<double>(1);
    head.memory.put(loss, std::vector<double>{-7.0});
    return loss;
}

void judge(RowHead& head, const Launch& launch, double* loss) {
    if (head.arrays.sharded) {
        head.launch(launch, "finish_rows", int32_t(kOk));
    }
    head.launch({1, launch.block}, "judge_sums", loss);
}

// By one CTA of `block` threads, after the rows of a replicated head are finished.
void pack(RowHead& head, unsigned block, int32_t status = kOk, int32_t loss_place = -1) {
    if (!head.arrays.sharded) {
        head.launch({2, block}, "finish_rows", status);
    }
    head.launch({1, block}, "pack_sums", status, loss_place, kSampleLimit);
}

// A head at scale 128, whose rows may have offsets of their own.
void allow_offsets(RowHead& head) {
    head.arrays.margin.scale = 128;
    head.arrays.margin.offset = 64;
    head.arrays.shifts = head.memory.make<float>(head.arrays.row_capacity);
    head.arrays.far_tiles = head.memory.make<uint32_t>(head.arrays.row_capacity / kTileRows);
}

void test_far_rows(double filter) {
    RowHead head((Shape()), 4);
    allow_offsets(head);
    head.arrays.margin.filter = filter;
    const uint32_t rows = head.block.rows;
    std::vector<float> best;
    for (uint32_t row = 0; row < head.arrays.row_capacity; ++row) {
        best.push_back(row % 5 == 0 ? kElsewhere : 0.06f * head.uniform());
    }
    head.memory.put(head.arrays.best_negatives, best);
    head.launch({2, 128}, "find_far_rows");
    const float common = float(-64 * 1.4426950408889634);
    bool any = false;
    const std::vector<float> shifts = head.memory.get(head.arrays.shifts, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        const bool passes = filter > 0 && best[row] > filter;
        const bool own = best[row] != kElsewhere && !passes && 128.0 * best[row] - 64 < -60;
        const float offset = float(128.0 * double(best[row]));
        const float truth = own ? float(-double(offset) * 1.4426950408889634) : common;
        EXPECT(shifts[row] == truth, "shift of row " + std::to_string(row));
        any = any || own;
    }
    EXPECT(any && head.memory.get(head.arrays.far_tiles, 1)[0] == 1, "the tile");
    head.memory.put(head.arrays.best_negatives, std::vector<float>(rows, 0.5f));
    head.launch({1, 128}, "find_far_rows");
    EXPECT(head.memory.get(head.arrays.shifts, 1)[0] == common, "near");
    EXPECT(head.memory.get(head.arrays.far_tiles, 1)[0] == 0, "no such row");
}

// Rows of which all ranks' negatives, some ranks', or none are far, and rows without a negative
// here.
void test_far_sums(bool sharded) {
    Shape shape;
    shape.sharded = sharded;
    RowHead head(shape, 9);
    allow_offsets(head);
    const uint32_t rows = head.block.rows, capacity = head.arrays.label_capacity;
    Forward forward(head);
    const double common = -64 * 1.4426950408889634;
    std::vector<float> shifts, best;
    std::vector<double> offsets;
    for (uint32_t row = 0; row < rows; ++row) {
        const bool own = row % 3 != 0, none = row % 7 == 6 && sharded;
        shifts.push_back(own && !none ? float(row % 3 == 1 ? 184 : 20 * head.uniform()) : float(common));
        offsets.push_back(own && !none ? -double(shifts[row]) / 1.4426950408889634 : 64.0);
        best.push_back(none ? kElsewhere : 0.0f);
        if (!head.ignored(row)) {
            forward.sums[row] = none ? 0.0f : 1.0f + float(row);
        }
        if (forward.logits[row] != 0) {
            forward.logits[row] = row % 2 ? -100.0f : 120.0f;
        }
    }
    forward.put(head);
    head.memory.put(head.arrays.shifts, shifts);
    head.memory.put(head.arrays.best_negatives, best);
    const auto zeros = [&](float* to) { head.fill(to, head.arrays.row_capacity, 0.0f); };
    zeros(head.arrays.factors);
    zeros(head.arrays.coefficients);
    std::vector<double> whole(rows);
    for (uint32_t row = 0; row < rows; ++row) {
        whole[row] = double(forward.sums[row]) * std::exp(offsets[row] - 64);
    }
    if (sharded) {
        const size_t count = 3 * capacity + kTotals;
        head.arrays.sums = head.memory.make<float>(count);
        pack(head, 256);
        std::vector<float> sums = head.memory.get(head.arrays.sums, count);
        for (uint32_t row = 0; row < capacity; ++row) {
            const bool own = row < rows && offsets[row] != 64;
            const float n = row < rows ? forward.sums[row] : 0.0f;
            const double apart = own ? n * std::exp(offsets[row] - 64 + 120) : 0;
            EXPECT(sums[row] == (own ? 0.0f : n), "near");
            EXPECT(close(sums[2 * capacity + kTotals + row], apart, 1e-6, 0), "far");
        }
        // Another rank's: near for some rows, far for others, and all there is for the rest.
        for (uint32_t row = 0; row < rows; ++row) {
            const float far_one = std::exp(float(int(row) % 40) - 20), near_one = row % 4 ? 0 : 3e-9f;
            sums[2 * capacity + kTotals + row] += far_one;
            sums[row] += near_one;
            whole[row] += double(near_one) + double(far_one) * std::exp(-120.0);
        }
        head.memory.put(head.arrays.sums, sums);
    } else {
        pack(head, 256);
    }
    double loss = 0;
    Finished truth;
    for (uint32_t row = 0; row < rows; ++row) {
        const bool ignored = forward.cosines[row] == kIgnored;
        const double over = double(forward.logits[row]) - 64, n = whole[row];
        const double denominator = n + std::exp(over), excess = std::log(n) - over;
        const double own = std::exp(offsets[row] - 64);
        const bool none = best[row] == kElsewhere;
        truth.factors.push_back(ignored || none ? 0 : 128 / denominator * own);
        truth.coefficients.push_back(
            ignored ? 0 : -128 * (n / denominator) * forward.derivatives[row]);
        loss += ignored ? 0 : std::max(excess, 0.0) + std::log1p(std::exp(-std::fabs(excess)));
    }
    if (sharded) {
        double* const cell = loss_cell(head);
        judge(head, {1, 128}, cell);
        const StepBlock block = head.get_block();
        EXPECT(block.status == kOk, "status");
        EXPECT(close(block.loss, loss / double(block.valid_rows), 1e-6), "loss");
    } else {
        const double sum = head.memory.get(head.arrays.replicated_sums, 1)[0];
        EXPECT(close(sum, loss, 1e-6), "loss");
    }
    const std::vector<float> factors = head.memory.get(head.arrays.factors, rows);
    const std::vector<float> coefficients = head.memory.get(head.arrays.coefficients, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        EXPECT(close(factors[row], truth.factors[row], 1e-6, 1e-37), "factor");
        EXPECT(close(coefficients[row], truth.coefficients[row], 1e-6, 1e-37), "coefficient");
    }
}

// Margins and weights of the rows' own: logits from angles, weighted losses, the margins' gradients,
// and values out of their ranges.
void test_row_terms(bool sharded, bool offsets, const Launch& launch) {
    Shape shape;
    shape.sharded = sharded;
    RowHead head(shape, 12);
    if (offsets) {
        allow_offsets(head);
        head.fill(head.arrays.shifts, head.arrays.row_capacity, float(-64 * 1.4426950408889634));
        head.fill(head.arrays.best_negatives, head.arrays.row_capacity, 0.5f);
    }
    head.allow_terms();
    const MarginSettings margin = head.arrays.margin;
    const uint32_t rows = head.block.rows, capacity = head.arrays.label_capacity;
    const uint32_t pitch = head.arrays.row_capacity;
    const Forward forward(head);
    forward.put(head);
    // This rank's rows have terms here, and rows whose class is here an angle.
    std::vector<float> terms(3 * pitch, 0.0f);
    std::vector<double> angles(pitch, 0.0);
    const auto draw = [&](uint32_t row) {
        const bool ignored = head.ignored(row);
        terms[row] = ignored ? NAN : head.uniform();  // some below 0
        terms[pitch + row] = ignored ? NAN : std::fabs(head.uniform());
        const float weight = row % 4 == 0 ? 0.0f : 2 * std::fabs(head.uniform());
        terms[2 * pitch + row] = ignored ? NAN : weight;
    };
    for (uint32_t row = 0; row < rows; ++row) {
        if (row - head.block.first_own < head.block.own_rows) {
            draw(row);
        }
        if (head.columns[head.global(row)] != kNone) {
            angles[row] = row % 11 == 0 ? 0.0 : 1.5 + head.uniform();
        }
    }
    head.memory.put(head.arrays.terms, terms);
    head.memory.put(head.arrays.angles, angles);
    pack(head, launch.block);
    double* const cell = loss_cell(head);
    const size_t start = (offsets ? 3 : 2) * size_t(capacity) + kTotals;
    std::vector<float> sums;
    std::vector<double> sent(rows);
    if (sharded) {
        sums = head.memory.get(head.arrays.sums, start + 3 * capacity);
        for (uint32_t row = 0; row < rows; ++row) {
            EXPECT(sums[capacity + row] == float(angles[row]), "angle");
            for (uint32_t term = 0; term < 3; ++term) {
                const float own = terms[term * pitch + row];
                const float found = sums[start + term * capacity + row];
                EXPECT(found == own || (found != found && own != own), "term");
            }
            // What the other ranks add.
            if (row - head.block.first_own >= head.block.own_rows) {
                draw(row);
            }
            for (uint32_t term = 0; term < 3; ++term) {
                sums[start + term * capacity + row] = terms[term * pitch + row];
            }
            if (head.columns[head.global(row)] == kNone) {
                sums[capacity + row] = 2.0f;
            }
            sent[row] = sums[capacity + row];
        }
        head.memory.put(head.arrays.sums, sums);
        judge(head, launch, cell);
    } else {
        for (uint32_t row = 0; row < rows; ++row) {
            sent[row] = float(angles[row]);
        }
    }
    Finished truth;
    std::vector<double> by_m2, by_m3;
    for (uint32_t row = 0; row < rows; ++row) {
        const bool here = forward.cosines[row] != kElsewhere;
        const double m2 = terms[row], m3 = terms[pitch + row], weight = terms[2 * pitch + row];
        const double turned = std::max(sent[row] + m2, 0.0), at = std::max(angles[row] + m2, 0.0);
        const double zt = margin.scale * (std::cos(turned) - m3), n = forward.sums[row];
        const double target = std::exp(zt - margin.offset), whole = n + target;
        const double slope = here ? std::sin(at) / std::max(std::sin(angles[row]), 1e-4) : 0.0;
        const bool counts = forward.cosines[row] != kIgnored;
        truth.factors.push_back(counts ? weight * margin.scale / whole : 0);
        by_m3.push_back(counts ? weight * margin.scale * n / whole : 0);
        by_m2.push_back(by_m3.back() * std::sin(counts ? turned : 0));
        truth.coefficients.push_back(counts ? -by_m3.back() * slope : 0);
        truth.loss += counts ? weight * std::log1p(n / target) : 0;
    }
    const std::vector<float> factors = head.memory.get(head.arrays.factors, rows);
    const std::vector<float> coefficients = head.memory.get(head.arrays.coefficients, rows);
    const std::vector<float> m2 = head.memory.get(head.arrays.margin_gradients, rows);
    const std::vector<float> m3 = head.memory.get(head.arrays.margin_gradients + pitch, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        EXPECT(close(factors[row], truth.factors[row], 1e-6), "factor with terms");
        EXPECT(close(coefficients[row], truth.coefficients[row], 1e-6), "coefficient with terms");
        EXPECT(close(m2[row], by_m2[row], 1e-6, 1e-6 * by_m3[row]), "by m2");
        EXPECT(close(m3[row], by_m3[row], 1e-6), "by m3");
    }
    if (sharded) {
        const StepBlock block = head.get_block();
        EXPECT(block.status == kOk, "status with terms");
        EXPECT(close(block.loss, truth.loss / double(block.valid_rows), 1e-9), "loss with terms");
    } else {
        EXPECT(close(head.memory.get(head.arrays.replicated_sums, 1)[0], truth.loss, 1e-9), "loss");
    }
    // Values out of their ranges: the least row counts, then its first term.
    uint32_t row = 10;
    while (head.ignored(row)) {
        ++row;
    }
    const float wrong[][2] = {{0, 3.2f}, {0, -3.2f}, {0, NAN},     {1, -0.1f},
                              {1, 2.1f}, {2, -1.0f}, {2, INFINITY}};
    for (const float* bad : wrong) {
        std::vector<float> spoiled = terms;
        const uint32_t term = uint32_t(bad[0]);
        spoiled[term * pitch + row] = bad[1];
        spoiled[2 * pitch + row + 1] = -5.0f;
        uint32_t bits = 0;
        std::memcpy(&bits, &bad[1], 4);
        head.put_block();
        head.put_ledger();
        if (sharded) {
            std::vector<float> all = sums;
            for (uint32_t i = 0; i < rows; ++i) {
                for (uint32_t t = 0; t < 3; ++t) {
                    all[start + t * capacity + i] = spoiled[t * pitch + i];
                }
            }
            head.memory.put(head.arrays.sums, all);
        } else {
            head.memory.put(head.arrays.terms, spoiled);
            pack(head, launch.block);
        }
        judge(head, launch, cell);
        const uint32_t place = sharded ? head.origins[row] : shape.rank * shape.max_batch + row;
        const StepBlock block = head.get_block();
        EXPECT(block.status == kInvalidArgument && block.fault == kFaultTerm, "a bad term");
        EXPECT(block.rank == int32_t(place / shape.max_batch), "its rank");
        EXPECT(block.row == int64_t(3 * (place % shape.max_batch) + term), "its row");
        EXPECT(uint32_t(block.value) == bits || bad[1] != bad[1], "its value");
    }
}

void test_sharded(const Launch& launch, bool only_target) {
    Shape shape;
    if (only_target) {
        shape.classes = 1;
    }
    RowHead head(shape, 3);
    head.arrays.margin.offset = 2.5;
    const Forward forward(head);
    forward.put(head);
    pack(head, launch.block);
    const uint32_t capacity = head.arrays.label_capacity, rows = head.block.rows;
    std::vector<float> sums = head.memory.get(head.arrays.sums, 2 * capacity + kTotals);
    double cosines = 0;
    for (uint32_t i = 0; i < capacity; ++i) {
        const bool row = i < rows;
        EXPECT(sums[i] == (row ? forward.sums[i] : 0.0f), "N");
        EXPECT(sums[capacity + i] == (row ? forward.logits[i] : 0.0f), "zt");
        cosines += row && std::fabs(forward.cosines[i]) < 2 ? forward.cosines[i] : 0.0f;
    }
    const float* totals = &sums[2 * capacity];
    EXPECT(close(totals[0], cosines, 1e-6) && totals[1] == -1 && totals[2] == 0, "totals");
    EXPECT(totals[3] == (only_target ? 1.0f : 2.0f), "classes");
    EXPECT(totals[3] == 1.0f || !only_target, "classes");

    double* const loss = loss_cell(head);
    judge(head, launch, loss);
    const StepBlock block = head.get_block();
    Finished truth = forward.finish(head);
    if (only_target) {
        truth.factors.assign(rows, 0.0);
        truth.coefficients.assign(rows, 0.0);
        truth.loss = 0;
    }
    EXPECT(block.status == kOk && block.only_target == (only_target ? 1u : 0u), "status");
    EXPECT(block.valid_rows == block.own_valid_rows, "valid rows");
    EXPECT(block.target_cosines == double(totals[0]), "cosines");
    const double mean = truth.loss / double(block.valid_rows);
    EXPECT(close(block.loss, mean, 1e-12, 1e-12), "loss");
    EXPECT(head.memory.get(loss, 1)[0] == block.loss, "loss cell");
    EXPECT(head.get_ledger().failed == 0, "failures");
    check_rows(head, truth, "sharded");
}

void expect_failure(RowHead& head, const double* loss, int32_t status, int32_t fault, int32_t rank,
                    int64_t row, int64_t value, uint64_t failed, const std::string& what) {
    const StepBlock block = head.get_block();
    EXPECT(block.status == status && block.fault == fault, what);
    EXPECT(block.rank == rank && block.row == row && block.value == value, what);
    EXPECT(block.loss != block.loss, what);
    const double cell = head.memory.get(loss, 1)[0];
    EXPECT(cell != cell, what);
    EXPECT(head.get_ledger().failed == failed, what);
}

// An update has left float32: the other ranks hear of it as of any failure.
void test_a_torn_row() {
    RowHead head((Shape()), 5);
    const Forward forward(head);
    forward.put(head);
    head.ledger.torn_row = 7;
    head.put_ledger();
    pack(head, 128, kOk, 0);
    const uint32_t capacity = head.arrays.label_capacity;
    const std::vector<float> sums = head.memory.get(head.arrays.sums, 2 * capacity + kTotals);
    EXPECT(sums[0] == 0.0f && sums[2 * capacity + 2] == 65536.0f + 2, "a torn row");
}

void test_sharded_failures() {
    RowHead head((Shape()), 5);
    const Forward forward(head);
    forward.put(head);
    double* const loss = loss_cell(head);
    const uint32_t capacity = head.arrays.label_capacity;
    // This rank fails: nothing but the error travels.
    pack(head, 128, 5, 0);
    std::vector<float> sums = head.memory.get(head.arrays.sums, 2 * capacity + kTotals);
    for (uint32_t i = 0; i < sums.size(); ++i) {
        EXPECT(sums[i] == (i == 2 * capacity + 2 ? 65536.0f + 2 : 0.0f), "own error");
    }
    judge(head, kLaunches[3], loss);
    expect_failure(head, loss, kRemote, kFaultForward, 1, 0, 65538, 1, "one error");
    // Two ranks fail.
    head.put_block();
    sums[2 * capacity + 2] = 2 * 65536 + 1 + 3;
    head.memory.put(head.arrays.sums, sums);
    judge(head, kLaunches[3], loss);
    expect_failure(head, loss, kRemote, kFaultForward, 0, 0, 2 * 65536 + 4, 2, "two errors");
    EXPECT(head.get_ledger().first_failure.value == 65538, "the first failure is kept");
    // Sums that leave float32: the least row counts.
    for (float bad : {0.0f, -1.0f, float(NAN), float(INFINITY), 1e-44f}) {
        Forward wrong = forward;
        uint32_t row = 40;
        while (head.ignored(row)) {
            ++row;
        }
        wrong.sums[row] = bad;
        wrong.logits[row] = bad == 1e-44f ? -200.0f : 1.0f;
        wrong.sums[row + 30] = NAN;
        wrong.cosines[row + 30] = 0.5f;
        wrong.put(head);
        head.put_block();
        head.put_ledger();
        pack(head, 96);
        judge(head, {1, 96}, loss);
        const uint32_t place = head.origins[row];
        expect_failure(head, loss, kNotFinite, kFaultSum, int32_t(place / head.arrays.max_batch),
                       place % head.arrays.max_batch, 0, 1, "sum " + std::to_string(bad));
    }
    // A verdict from before: zeros travel, it stays.
    head.block.status = kLabel;
    head.block.fault = kFaultLabel;
    head.block.row = 4;
    head.block.rows = 0;
    head.put_block();
    pack(head, 32, kOk, 1);
    sums = head.memory.get(head.arrays.sums, 2 * capacity + kTotals);
    EXPECT(sums[2 * capacity + 1] == 1, "the loss's place, all the same");
    sums[2 * capacity + 1] = 0;
    EXPECT(sums == std::vector<float>(sums.size(), 0.0f), "zeros");
    judge(head, {1, 32}, loss);
    expect_failure(head, loss, kLabel, kFaultLabel, 0, 4, 0, 2, "label");
    // Without a cell for the loss.
    judge(head, {1, 32}, nullptr);
    EXPECT(head.get_ledger().failed == 3, "no cell");
}

void test_replicated(const Launch& launch) {
    Shape shape;
    shape.sharded = false;
    RowHead head(shape, 6);
    head.block.digest = 12345;
    head.put_block();
    const Forward forward(head);
    forward.put(head);
    pack(head, launch.block);
    const size_t count = kTotals + kSlot * head.arrays.ranks;
    std::vector<double> sums = head.memory.get(head.arrays.replicated_sums, count);
    const Finished truth = forward.finish(head);
    double cosines = 0;
    for (float cosine : forward.cosines) {
        cosines += std::fabs(cosine) < 2 ? cosine : 0.0f;
    }
    EXPECT(close(sums[0], truth.loss, 1e-12), "loss");
    EXPECT(sums[1] == double(head.block.own_valid_rows), "valid");
    EXPECT(close(sums[2], cosines, 1e-12, 1e-12) && sums[3] == -1, "cosines");
    for (size_t i = kTotals; i < count; ++i) {
        const bool sample = i == kTotals + kSlot + 2, limit = i == kTotals + kSlot + 3;
        EXPECT(sums[i] == (sample ? 12345 : limit ? double(kSampleLimit) : 0.0), "slots");
    }
    check_rows(head, truth, "replicated");
    // The other ranks' terms.
    std::vector<double> all = sums;
    all[0] += 100;
    all[1] += 50;
    all[kTotals + 2] = all[kTotals + 2 * kSlot + 2] = 12345;
    head.memory.put(head.arrays.replicated_sums, all);
    double* const loss = loss_cell(head);
    judge(head, launch, loss);
    const StepBlock block = head.get_block();
    EXPECT(block.status == kOk && block.valid_rows == uint64_t(all[1]), "status");
    EXPECT(block.loss == all[0] / all[1] && block.target_cosines == all[2], "loss");
    EXPECT(head.memory.get(loss, 1)[0] == block.loss, "cell");

    const size_t other = kTotals + 2 * kSlot;
    const auto judged = [&](std::vector<double> with, const StepBlock& before) {
        head.memory.put(head.arrays.replicated_sums, with);
        head.memory.put(head.arrays.block, std::vector<StepBlock>{before});
        head.put_ledger();
        judge(head, launch, loss);
    };
    std::vector<double> bad = all;
    bad[other + 2] = 7;
    judged(bad, head.block);
    expect_failure(head, loss, kMismatch, kFaultSamples, 2, 0, 0, 1, "samples");
    bad[other] = 13;
    bad[other + 1] = -1 - 8;
    judged(bad, head.block);
    expect_failure(head, loss, kNotFinite, kFaultSum, 2, 8, 0, 1, "sum");
    bad[other + 1] = 8;
    judged(bad, head.block);
    expect_failure(head, loss, kNotFinite, kFaultEmbedding, 2, 8, 0, 1, "embedding");
    bad[kTotals] = 5;
    judged(bad, head.block);
    expect_failure(head, loss, kRemote, kFaultSums, 0, 0, 5, 1, "status");
    // This rank's own bad row is sent to the others, and judged with theirs.
    StepBlock own = head.block;
    own.status = kNotFinite;
    own.fault = kFaultEmbedding;
    own.rank = 1;
    own.row = 6;
    head.memory.put(head.arrays.block, std::vector<StepBlock>{own});
    pack(head, launch.block);
    std::vector<double> mine = head.memory.get(head.arrays.replicated_sums, count);
    EXPECT(mine[0] == 0 && mine[kTotals + kSlot] == 13 && mine[kTotals + kSlot + 1] == 6,
           "own row");
    EXPECT(mine[3] == -1, "place");
    EXPECT(mine[kTotals + kSlot + 2] == 0, "digest");
    EXPECT(mine[kTotals + kSlot + 3] == double(kSampleLimit), "sample limit");
    judged(mine, own);
    expect_failure(head, loss, kNotFinite, kFaultEmbedding, 1, 6, 0, 1, "own row");
    mine[kTotals] = 3;
    judged(mine, own);
    expect_failure(head, loss, kRemote, kFaultSums, 0, 0, 3, 1, "a lower rank's");
    // A sum of this rank that leaves float32.
    Forward wrong = forward;
    uint32_t row = 10;
    while (head.ignored(row)) {
        ++row;
    }
    wrong.sums[row] = 0;
    wrong.put(head);
    head.put_block();
    pack(head, launch.block);
    mine = head.memory.get(head.arrays.replicated_sums, count);
    EXPECT(mine[0] == 0 && mine[kTotals + kSlot] == 13, "own sum");
    EXPECT(mine[kTotals + kSlot + 1] == -1.0 - row, "own sum");
}

void test_scaling(bool split, uint32_t dim, const Launch& launch) {
    Shape shape;
    shape.dim = dim;
    shape.split = split;
    RowHead head(shape, dim);
    const uint32_t rows = head.block.rows, pitch = head.arrays.depth_pitch;
    std::vector<float> units(head.arrays.plane_rows, NAN), factors, coefficients, cosines;
    std::vector<float> tangents(head.arrays.plane_rows, NAN);
    for (uint32_t row = 0; row < rows; ++row) {
        factors.push_back(row % 5 == 0 ? 0.0f : std::exp(30 * head.uniform()));
        coefficients.push_back(row % 10 == 0 ? 0.0f : head.uniform());
        cosines.push_back(head.uniform());
        for (uint32_t i = 0; i < pitch; ++i) {
            units[size_t(row) * pitch + i] = i < dim ? head.uniform() : 0.0f;
            tangents[size_t(row) * pitch + i] = i < dim ? head.uniform() : 0.0f;
        }
    }
    head.memory.put(head.arrays.units, units);
    head.memory.put(head.arrays.factors, factors);
    head.memory.put(head.arrays.coefficients, coefficients);
    head.memory.put(head.arrays.target_cosines, cosines);
    head.memory.put(head.arrays.tangents, tangents);
    head.launch(launch, "scale_embeddings");
    const std::vector<float> turned = head.memory.get(head.arrays.tangents, rows * size_t(pitch));
    for (uint32_t row = 0; row < rows; ++row) {
        const bool pulled = coefficients[row] != 0 && head.columns[head.global(row)] != kNone;
        double squares = 0;
        for (uint32_t i = 0; i < pitch; ++i) {
            squares += double(tangents[size_t(row) * pitch + i]) * tangents[size_t(row) * pitch + i];
        }
        bool right = true;
        for (uint32_t i = 0; i < pitch; ++i) {
            const size_t at = size_t(row) * pitch + i;
            const double truth =
                pulled ? squares * units[at] - double(cosines[row]) * tangents[at] : tangents[at];
            right = right && close(turned[at], truth, 1e-6, 1e-6 * squares);
        }
        EXPECT(right, "tangent of row " + std::to_string(row));
    }
    const uint64_t plane = head.arrays.plane_rows;
    const std::vector<uint16_t> operand = head.memory.get(head.arrays.scaled_operand, 3 * plane);
    bool right = true;
    for (size_t i = 0; i < size_t(up(rows, 128)) * pitch; ++i) {
        const bool counts = i / pitch < rows && factors[i / pitch] != 0;
        const float truth = counts ? factors[i / pitch] * units[i] : 0.0f;
        if (split) {
            const double sum = double(of_bfloat(operand[i])) + of_bfloat(operand[i + plane]) +
                               of_bfloat(operand[i + 2 * plane]);
            right = right && sum == double(truth);
        } else {
            right = right && operand[i] == bfloat_of(truth);
        }
    }
    EXPECT(right, shape.text());
}

}  // namespace

int main() {
    test_reducing();
    for (const Launch& launch : kLaunches) {
        test_sharded(launch, false);
        test_replicated(launch);
    }
    test_sharded(kLaunches[0], true);
    test_a_torn_row();
    test_sharded_failures();
    test_far_rows(0.0);
    test_far_rows(0.01);
    test_far_sums(true);
    test_far_sums(false);
    for (const Launch& launch : kLaunches) {
        test_row_terms(true, launch.grid == 1, launch);
        test_row_terms(false, false, launch);
    }
    unsigned turn = 0;
    for (uint32_t dim : {1u, 3u, 65u, 130u}) {
        test_scaling(false, dim, kLaunches[turn % 4]);
        test_scaling(true, dim, kLaunches[turn++ % 4]);
    }
    return finish();
}
