// kernels/embeddings.cu against plain double arithmetic.
#include "rows.h"

namespace {

const uint32_t kDims[] = {1, 3, 65, 130};

// Rows of all norms there are, some without a direction, some with a NaN or an infinity.
std::vector<float> draw_to_send(RowHead& head, uint32_t batch, int32_t dtype) {
    const int exponents[] = {0, -126, 127, -60, -40, -35, -17, 16, 100, 126};
    const uint32_t dim = head.shape.dim;
    std::vector<float> values(size_t(batch) * dim);
    for (uint32_t row = 0; row < batch; ++row) {
        const float size = std::ldexp(1.0f, exponents[row % 10]);
        for (uint32_t i = 0; i < dim; ++i) {
            float& value = values[size_t(row) * dim + i];
            value = row % 10 == 7 && i == 0 ? size : size * head.uniform();
            value = row % 13 == 5 ? 0.0f : rounded(value, dtype);
        }
        if (row % 13 == 8) {
            values[size_t(row) * dim + row % dim] = row % 2 ? NAN : -INFINITY;
        }
    }
    return values;
}

// What a row is multiplied by to travel, in long double arithmetic.
float scale_of(const float* row, uint32_t dim) {
    long double largest = 0, squares = 0;
    for (uint32_t i = 0; i < dim; ++i) {
        if (!std::isfinite(row[i])) {
            return 1;
        }
        largest = std::max<long double>(largest, std::fabs(row[i]));
        squares += (long double)row[i] * row[i];
    }
    int exponent = 0;
    std::frexp(largest, &exponent);  // largest is in [0.5, 1) times 2^exponent
    return squares < 1e-24L ? 0.0f : std::ldexp(1.0f, -std::min(exponent - 1, 126));
}

bool same(float a, float b) { return a == b || (a != a && b != b); }

void test_packing() {
    for (uint32_t dim : kDims) {
        for (int32_t from : {kF32, kF16, kBf16}) {
            for (int32_t to : {kF32, kF16, kBf16}) {
                Shape shape;
                shape.dim = dim;
                shape.gather = to;
                RowHead head(shape);
                const uint32_t batch = head.block.own_rows;
                const std::vector<float> values = draw_to_send(head, batch, from);
                head.block.status = kLabel;  // packs all the same
                head.put_block();
                const MatrixView source = head.matrix(values, dim + 3, from);
                head.launch(kLaunches[dim % 4], "pack_embeddings", source, uint64_t(batch));
                const size_t count = size_t(head.arrays.max_batch) * dim;
                const std::vector<uint8_t> sent =
                    head.memory.get(head.arrays.embeddings_send, count * size_of(to));
                bool right = true;
                for (size_t i = 0; i < count; ++i) {
                    const bool held = i < values.size();
                    const float* const row = held ? &values[i / dim * dim] : nullptr;
                    const float scale = held && to == kF16 ? scale_of(row, dim) : 1.0f;
                    const float truth = held ? rounded(scale * values[i], to) : 0.0f;
                    right = right && same(element(sent, i, to), truth);
                }
                EXPECT(right, shape.text() + " from " + std::to_string(from));
                if (to != kF16) {
                    continue;
                }
                const std::vector<float> scales = head.memory.get(head.arrays.send_scales, batch);
                for (uint32_t row = 0; row < batch; ++row) {
                    float largest = 0;
                    for (uint32_t i = 0; i < dim; ++i) {
                        const float value = element(sent, size_t(row) * dim + i, to);
                        largest = !std::isfinite(value) ? NAN : std::max(largest, std::fabs(value));
                    }
                    right = right && scales[row] == scale_of(&values[size_t(row) * dim], dim);
                    // 2 by rounding up, more where the inverse of the scale would be denormal.
                    right = right && (!(largest > 0) || (largest >= 1 && largest <= 4));
                    right = right && (largest <= 2 || largest != largest || row % 10 == 2);
                }
                EXPECT(right, shape.text() + " scales from " + std::to_string(from));
            }
        }
    }
}

struct Truth {
    double cosine, logit, derivative;
};

Truth target_of(const MarginSettings& margin, const float* e, const float* w, uint32_t dim) {
    long double ee = 0, ww = 0, minus = 0, plus = 0;
    for (uint32_t i = 0; i < dim; ++i) {
        ee += (long double)e[i] * e[i];
        ww += (long double)w[i] * w[i];
    }
    const long double pi = 3.14159265358979323846264338L;
    long double theta = pi / 2;
    const bool direction = ee > 0 && ww > 0;
    if (direction) {
        for (uint32_t i = 0; i < dim; ++i) {
            const long double a = e[i] / sqrtl(ee), b = w[i] / sqrtl(ww);
            minus += (a - b) * (a - b);
            plus += (a + b) * (a + b);
        }
        theta = 2 * atan2l(sqrtl(minus), sqrtl(plus));
    }
    const long double turned = margin.m1 * theta + margin.m2;
    long double psi = cosl(turned), derivative = 1;
    if (margin.guard && turned > pi) {
        const long double shift =
            margin.m1 == 1.0
                ? std::min<long double>(-margin.m2 * sinl(margin.m2), cosl(margin.m2) - 1)
                : -1 - cosl((pi - margin.m2) / margin.m1);
        psi = cosl(theta) + shift;
    } else if (!margin.straight_through) {
        derivative = margin.m1 * sinl(turned) / std::max<long double>(sinl(theta), 1e-4L);
    }
    return Truth{direction ? double(cosl(theta)) : 0.0, double(margin.scale * (psi - margin.m3)),
                 double(derivative)};
}

void check_operand(RowHead& head, const std::vector<uint16_t>& operand,
                   const std::vector<float>& units, const std::string& what) {
    bool right = true;
    for (size_t i = 0; i < units.size(); ++i) {
        if (head.shape.split) {
            const uint64_t plane = head.arrays.plane_rows;
            const double sum = double(of_bfloat(operand[i])) + of_bfloat(operand[i + plane]) +
                               of_bfloat(operand[i + 2 * plane]);
            right = right && sum == double(units[i]);
        } else {
            right = right && operand[i] == half_of(units[i]);
        }
    }
    EXPECT(right, what);
}

// E with rows that have no direction, rows along and against their class center, and, if asked,
// rows that are no numbers.
std::vector<float> draw(RowHead& head, bool bad, int32_t dtype) {
    const uint32_t dim = head.shape.dim;
    std::vector<float> e(size_t(head.block.rows) * dim);
    for (uint32_t row = 0; row < head.block.rows; ++row) {
        const uint32_t column = head.columns[head.global(row)];
        for (uint32_t i = 0; i < dim; ++i) {
            float& value = e[size_t(row) * dim + i];
            value = 10 * head.uniform();
            if (column != kNone && row % 9 < 2) {
                const size_t at = size_t(head.sample[column]) * head.arrays.master_pitch + i;
                value = (row % 9 == 0 ? 4.0f : -2.0f) * head.w[at];
            }
            if (row % 9 == 5) {
                value = 0.0f;
            }
            if (bad && (row == 17 || row == 9) && i == dim - 1) {
                value = row == 9 ? INFINITY : NAN;
            }
            if (head.ignored(row) && i == 0) {
                value = NAN;  // nobody looks at it
            }
            value = bad && value != value ? value : rounded(value, dtype);
        }
    }
    return e;
}

void test_a_batch(const Shape& shape, const MarginSettings& margin, int32_t dtype, bool bad,
                  const Launch& launch) {
    const std::string what = shape.text() + (bad ? " bad" : "");
    RowHead head(shape, shape.dim + 7);
    head.arrays.margin = margin;
    const uint32_t dim = shape.dim, rows = head.block.rows;
    if (bad) {
        // The rows that are no numbers count.
        for (uint32_t row : {9u, 17u}) {
            head.labels[head.global(row)] = 7;
            head.columns[head.global(row)] = kNone;
        }
        head.memory.put(head.arrays.labels, head.labels);
        head.memory.put(head.arrays.columns, head.columns);
    }
    const int32_t held = shape.sharded ? shape.gather : dtype;
    const std::vector<float> e = draw(head, bad, held);
    MatrixView source{};
    if (shape.sharded) {
        std::vector<float> gathered(size_t(head.arrays.label_capacity) * dim, 0.0f);
        for (uint32_t row = 0; row < rows; ++row) {
            std::copy(&e[size_t(row) * dim], &e[size_t(row) * dim] + dim,
                      &gathered[size_t(head.origins[row]) * dim]);
        }
        head.memory.put(head.arrays.embeddings_recv, packed(gathered, dim, dim, held));
    } else {
        source = head.matrix(e, dim + 1, held);
    }
    head.launch(launch, "normalize_embeddings", source);
    // The first kernel of the sums message gives the verdict.
    if (!shape.sharded) {
        head.launch(launch, "finish_rows", int32_t(kOk));
    }
    head.launch({1, launch.block}, "pack_sums", int32_t(kOk), int32_t(1), uint64_t(shape.shard_rows));

    const StepBlock block = head.get_block();
    if (bad) {
        const uint32_t place = shape.sharded ? head.origins[9] : 9;
        EXPECT(block.status == kNotFinite && block.fault == kFaultEmbedding, what);
        EXPECT(block.bad_row == 9, what);
        EXPECT(block.rank == int32_t(shape.sharded ? place / shape.max_batch : shape.rank), what);
        EXPECT(block.row == int64_t(shape.sharded ? place % shape.max_batch : 9), what);
    } else {
        EXPECT(block.status == kOk && block.fault == kNoFault && block.bad_row == kNone, what);
    }
    const uint32_t padded = up(rows, 128), pitch = head.arrays.depth_pitch;
    const std::vector<float> units = head.memory.get(head.arrays.units, size_t(padded) * pitch);
    const std::vector<float> tangents = head.memory.get(head.arrays.tangents, size_t(padded) * pitch);
    const std::vector<float> norms = head.memory.get(head.arrays.inverse_norms, padded);
    const std::vector<float> logits = head.memory.get(head.arrays.target_logits, padded);
    const std::vector<float> cosines = head.memory.get(head.arrays.target_cosines, padded);
    const std::vector<float> derivatives = head.memory.get(head.arrays.derivatives, padded);
    for (uint32_t row = 0; row < padded; ++row) {
        const bool counts = row < rows && !head.ignored(row);
        double squares = 0;
        for (uint32_t i = 0; counts && i < dim; ++i) {
            squares += double(e[size_t(row) * dim + i]) * e[size_t(row) * dim + i];
        }
        const bool finite = std::isfinite(squares);
        const double inverse = finite && squares > 0 ? 1 / std::sqrt(squares) : 0.0;
        bool right = close(norms[row], inverse, 1e-7);
        for (uint32_t i = 0; i < pitch; ++i) {
            const bool held = counts && finite && i < dim;
            const double truth = held ? e[size_t(row) * dim + i] * inverse : 0.0;
            right = right && close(units[size_t(row) * pitch + i], truth, 3e-7);
        }
        EXPECT(right, what + " row " + std::to_string(row));
        const uint32_t column = row < rows ? head.columns[head.global(row)] : kNone;
        if (!counts || column == kNone || !finite) {
            EXPECT(logits[row] == 0 && derivatives[row] == 0, what);
            EXPECT(cosines[row] == (counts ? kElsewhere : kIgnored), what);
            continue;
        }
        const float* w = &head.w[size_t(head.sample[column]) * head.arrays.master_pitch];
        const Truth truth = target_of(margin, &e[size_t(row) * dim], w, dim);
        EXPECT(close(logits[row], truth.logit, 2e-7, 1e-5), what);
        EXPECT(close(cosines[row], truth.cosine, 2e-7, 1e-9), what);
        // At theta = 0 and pi the sine is floored: what is left of it is noise of the last digits.
        EXPECT(close(derivatives[row], truth.derivative, 1e-6, 1e-5), what);
        // The tangent: W^ - cos E^, in digits of its own size.
        double ww = 0, largest = 0;
        for (uint32_t i = 0; i < dim; ++i) {
            ww += double(w[i]) * w[i];
        }
        std::vector<double> across(pitch, 0.0);
        for (uint32_t i = 0; i < dim && ww > 0 && squares > 0; ++i) {
            across[i] = w[i] / std::sqrt(ww) - truth.cosine * (e[size_t(row) * dim + i] * inverse);
            largest = std::max(largest, std::fabs(across[i]));
        }
        bool same = true;
        for (uint32_t i = 0; i < pitch; ++i) {
            same = same && close(tangents[size_t(row) * pitch + i], across[i], 1e-6, 1e-7 * largest + 1e-15);
        }
        EXPECT(same, what + " tangent of row " + std::to_string(row));
    }
    check_operand(head, head.memory.get(head.arrays.unit_operand, 3 * head.arrays.plane_rows),
                  units,
                  what);
}

// The terms of this rank's rows, some given and the others the options'; angles in place of logits.
void test_terms(bool sharded, unsigned given, const Launch& launch) {
    Shape shape;
    shape.sharded = sharded;
    RowHead head(shape, 4 + given);
    head.allow_terms();
    head.arrays.margin.m3 = 0.25;
    const uint32_t rows = head.block.rows, own = head.block.own_rows;
    const uint32_t pitch = head.arrays.row_capacity;
    const float defaults[3] = {0.5f, 0.25f, 1.0f};
    std::vector<float> values[3];
    const float* there[3] = {nullptr, nullptr, nullptr};
    for (unsigned term = 0; term < 3; ++term) {
        for (uint32_t i = 0; i < own; ++i) {
            values[term].push_back(given >> term & 1 ? head.uniform() : defaults[term]);
        }
        if (given >> term & 1) {
            float* const copy = head.memory.make<float>(own);
            head.memory.put(copy, values[term]);
            there[term] = copy;
        }
    }
    head.launch(launch, "take_terms", there[0], there[1], there[2]);
    const std::vector<float> taken = head.memory.get(head.arrays.terms, 3 * pitch);
    for (unsigned term = 0; term < 3; ++term) {
        for (uint32_t row = 0; row < pitch; ++row) {
            const uint32_t number = row - head.block.first_own;
            const float truth = number < own ? values[term][number] : 0.0f;
            EXPECT(taken[term * pitch + row] == truth, "term");
        }
    }
    const std::vector<float> e = draw(head, false, kF32);
    MatrixView source{};
    if (sharded) {
        std::vector<float> gathered(size_t(head.arrays.label_capacity) * shape.dim, 0.0f);
        for (uint32_t row = 0; row < rows; ++row) {
            std::copy(&e[size_t(row) * shape.dim], &e[size_t(row) * shape.dim] + shape.dim,
                      &gathered[size_t(head.origins[row]) * shape.dim]);
        }
        head.memory.put(head.arrays.embeddings_recv, packed(gathered, shape.dim, shape.dim, kF32));
    } else {
        source = head.matrix(e, shape.dim, kF32);
    }
    head.launch(launch, "normalize_embeddings", source);
    const std::vector<double> angles = head.memory.get(head.arrays.angles, pitch);
    const std::vector<float> cosines = head.memory.get(head.arrays.target_cosines, rows);
    const std::vector<float> logits = head.memory.get(head.arrays.target_logits, rows);
    for (uint32_t row = 0; row < pitch; ++row) {
        const bool here = row < rows && std::fabs(cosines[row]) <= 1;
        EXPECT(close(std::cos(angles[row]), here ? cosines[row] : 1.0, 2e-7, 1e-7), "angle");
        EXPECT(row >= rows || logits[row] == 0, "no logit");
    }
}

void test_a_failed_step_is_left_alone() {
    RowHead head((Shape()));
    head.block.status = kLabel;
    head.put_block();
    head.fill(head.arrays.units, 64, 3.0f);
    head.fill(head.arrays.target_cosines, head.arrays.row_capacity, 3.0f);
    head.launch(kLaunches[0], "normalize_embeddings", MatrixView{});
    EXPECT(head.memory.get(head.arrays.units, 64) == std::vector<float>(64, 3.0f), "units");
    EXPECT(head.memory.get(head.arrays.target_cosines, 4) == std::vector<float>(4, 3.0f),
           "cosines");
    EXPECT(head.get_block().status == kLabel, "status");
}

}  // namespace

int main() {
    test_packing();
    const MarginSettings margins[] = {{64, 1, 0.5, 0, 0, 0, 0, 0}, {64, 1, 0, 0.35, 0, 0, 1, 0},
                                  {30, 1.35, 0.2, 0.1, 0, 0, 0, 1}, {64, 1, 0.5, 0, 0, 0, 0, 1},
                                  {10, 16, 3.1, 2, 0, 0, 0, 0},     {64, 1, 3.0, 0, 0, 0, 0, 1}};
    unsigned turn = 0;
    for (uint32_t dim : kDims) {
        for (int32_t dtype : {kF32, kF16, kBf16}) {
            for (int kind = 0; kind < 4; ++kind, ++turn) {
                Shape shape;
                shape.dim = dim;
                shape.gather = dtype;
                shape.sharded = kind % 2;
                shape.split = kind / 2;
                test_a_batch(shape, margins[turn % 6], dtype, false, kLaunches[turn % 4]);
                test_a_batch(shape, margins[0], dtype, true, kLaunches[turn % 4]);
            }
        }
    }
    for (unsigned given = 0; given < 8; ++given) {
        test_terms(given % 2 == 0, given, kLaunches[given % 4]);
        test_terms(given % 2 == 1, given, kLaunches[given % 4]);
    }
    test_a_failed_step_is_left_alone();
    return finish();
}
