// kernels/stateless.cu, fused.cu and gemm_cosines.cu where tests in Rust, which call them through
// the C interface, do not see: operands' pads and planes, edges of tiles, factors, sums of chunks.
#include <algorithm>

#include "arrays.h"
#include "gemm_case.h"

namespace {

// A caller's float32 rows with something between them.
struct Given {
    uint32_t rows, columns, stride;
    std::vector<float> values;
    float* at;

    Given(Memory& memory, Random& random, uint32_t rows, uint32_t columns, uint32_t gap)
        : rows(rows), columns(columns), stride(columns + gap),
          values(size_t(rows) * stride, NAN),
          at(memory.make<float>(values.size())) {
        for (uint32_t row = 0; row < rows; ++row) {
            // Of many lengths; every seventh has none.
            const double length = row % 7 == 6 ? 0.0 : pow(10.0, int(random.below(7)) - 3);
            for (uint32_t k = 0; k < columns; ++k) {
                values[size_t(row) * stride + k] = float(length * random.normal());
            }
        }
        memory.put(at, values);
    }

    MatrixView view() const {
        return {reinterpret_cast<uint8_t*>(at), rows, columns, stride, kF32, 0};
    }

    std::vector<double> unit(uint32_t row) const {
        const float* const from = &values[size_t(row) * stride];
        double squares = 0;
        for (uint32_t k = 0; k < columns; ++k) squares += double(from[k]) * from[k];
        std::vector<double> unit(columns, 0.0);
        for (uint32_t k = 0; k < columns && squares > 1e-24; ++k) unit[k] = from[k] / sqrt(squares);
        return unit;
    }
};

double operand_at(const std::vector<uint16_t>& planes, uint64_t plane, uint64_t at) {
    return double(from_bfloat(planes[at])) + from_bfloat(planes[at + plane]) +
           from_bfloat(planes[at + 2 * plane]);
}

void test_cosines(uint32_t rows, uint32_t classes, uint32_t dim, uint32_t chunk, const Launch& how,
                  uint64_t seed) {
    const std::string what = "cosines " + std::to_string(rows) + " x " + std::to_string(classes) +
                             " x " + std::to_string(dim);
    Random random(seed);
    Memory memory;
    Given e(memory, random, rows, dim, 1), w(memory, random, classes, dim, 2);
    HeadArrays arrays = arrays_of(rows, classes, dim, chunk);
    arrays.plane_rows = uint64_t(arrays.row_capacity) * arrays.depth_pitch;
    arrays.plane_centers = uint64_t(chunk) * arrays.depth_pitch;
    arrays.unit_operand = memory.make<uint16_t>(3 * arrays.plane_rows);
    arrays.center_operand = memory.make<uint16_t>(3 * arrays.plane_centers);
    arrays.inverse_norms = memory.make<float>(rows);
    arrays.units = memory.make<float>(arrays.plane_rows);
    const uint32_t stride = classes + 5;
    float* const out = memory.make<float>(size_t(rows) * stride);
    memory.put(out, std::vector<float>(size_t(rows) * stride, -9.0f));
    const MatrixView cosines = {reinterpret_cast<uint8_t*>(out), rows, classes, stride, kF32, 0};

    memory.launch("write_unit_operands", how.grid, how.block, 0, arrays, e.view(), uint64_t(0),
                  rows, 0);
    const auto planes = memory.get(arrays.unit_operand, 3 * arrays.plane_rows);
    const auto units = memory.get(arrays.units, arrays.plane_rows);
    for (uint32_t row = 0; row < round_up(rows, kTileRows); ++row) {
        const std::vector<double> truth = row < rows ? e.unit(row) : std::vector<double>(dim, 0.0);
        for (uint32_t k = 0; k < arrays.depth_pitch; ++k) {
            const uint64_t at = uint64_t(row) * arrays.depth_pitch + k;
            const double unit = k < dim ? truth[k] : 0.0;
            EXPECT(fabs(units[at] - unit) <= 3e-7 * fabs(unit), what);
            EXPECT(fabs(operand_at(planes, arrays.plane_rows, at) - units[at]) <=
                       1.2e-7 * fabs(units[at]),
                   what);
        }
    }
    for (uint32_t first = 0; first < classes; first += chunk) {
        const uint32_t count = std::min(chunk, classes - first);
        memory.launch("write_unit_operands", how.grid, how.block, 0, arrays, w.view(),
                      uint64_t(first), count, 1);
        memory.launch("gemm_cosines", how.grid, gemm_tile(Gemm::kNumerators).threads(), 49152, arrays, rows, count, uint64_t(first),
                      cosines);
    }
    const auto found = memory.get(out, size_t(rows) * stride);
    for (uint32_t i = 0; i < rows; ++i) {
        const std::vector<double> unit = e.unit(i);
        for (uint32_t j = 0; j < stride; ++j) {
            const float cell = found[size_t(i) * stride + j];
            if (j >= classes) {
                EXPECT(cell == -9.0f, what + ": written between the rows");
                continue;
            }
            const std::vector<double> center = w.unit(j);
            double cosine = 0;
            for (uint32_t k = 0; k < dim; ++k) cosine += unit[k] * center[k];
            EXPECT(fabs(cell - cosine) <= 1e-6, what);
        }
    }
}

// Sums over two chunks' tiles, and what the sums over the ranks make of a row.
void test_sums(const Launch& how, uint64_t seed) {
    const uint32_t rows = 150, first_tiles = 3, last_tiles = 2;
    Random random(seed);
    Memory memory;
    HeadArrays arrays = arrays_of(rows, 128 * first_tiles, 4, 128 * first_tiles);
    arrays.margin.scale = 100;
    arrays.margin.offset = 36;
    StepBlock block{};
    block.rows = rows;
    arrays.block = memory.make<StepBlock>(1);
    memory.put(arrays.block, {block});
    arrays.partial_sums = memory.make<float>(size_t(first_tiles) * arrays.row_capacity);
    arrays.row_sums = memory.make<float>(rows);
    arrays.derivatives = memory.make<float>(rows);
    arrays.factors = memory.make<float>(rows);
    arrays.coefficients = memory.make<float>(rows);
    double* const totals = memory.make<double>(rows);
    float* const logits_at = memory.make<float>(rows);

    std::vector<double> truth(rows, 0.0);
    for (uint32_t tiles : {first_tiles, last_tiles}) {
        std::vector<float> partial(size_t(first_tiles) * arrays.row_capacity);
        for (float& sum : partial) sum = float(random.uniform());
        for (uint32_t tile = 0; tile < tiles; ++tile) {
            // The first row is without negatives.
            partial[size_t(tile) * arrays.row_capacity] = 0.0f;
            for (uint32_t row = 0; row < rows; ++row) {
                truth[row] += partial[size_t(tile) * arrays.row_capacity + row];
            }
        }
        memory.put(arrays.partial_sums, partial);
        memory.launch("add_row_sums", how.grid, how.block, 0, arrays, tiles,
                      int32_t(tiles == first_tiles), totals);
    }
    const auto sums = memory.get(arrays.row_sums, rows);
    CHECK(near(sums, truth, 1e-7));

    std::vector<float> logits(rows), derivatives(rows);
    for (float& logit : logits) logit = float(36 + 3 * random.normal());
    for (float& derivative : derivatives) derivative = float(random.normal());
    memory.put(logits_at, logits);
    memory.put(arrays.derivatives, derivatives);
    memory.launch("weigh_rows", how.grid, how.block, 0, arrays,
                  static_cast<const float*>(arrays.row_sums), static_cast<const float*>(logits_at),
                  static_cast<const float*>(nullptr));
    const auto factors = memory.get(arrays.factors, rows);
    const auto coefficients = memory.get(arrays.coefficients, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        const double whole = double(sums[row]) + exp(double(logits[row]) - 36);
        const double factor = row == 0 ? 0.0 : 100 / whole;
        const double coefficient = -100 * (sums[row] / whole) * derivatives[row];
        CHECK(fabs(factors[row] - factor) <= 1e-6 * factor);
        CHECK(fabs(coefficients[row] - coefficient) <= 1e-6 * fabs(coefficient));
    }
}

// Offsets of rows: written, read again, and what a row's factor and coefficient make of them.
void test_offsets(const Launch& how, unsigned seed) {
    const uint32_t rows = 300;
    Random random(seed);
    Memory memory;
    HeadArrays arrays = arrays_of(rows, 128, 4, 128);
    arrays.margin.scale = 128;
    arrays.margin.offset = 64;
    StepBlock block{};
    block.rows = rows;
    arrays.block = memory.make<StepBlock>(1);
    memory.put(arrays.block, {block});
    for (float** array : {&arrays.shifts, &arrays.best_negatives, &arrays.row_sums,
                          &arrays.derivatives, &arrays.factors, &arrays.coefficients}) {
        *array = memory.make<float>(arrays.row_capacity);
    }
    arrays.far_tiles = memory.make<uint32_t>(arrays.row_capacity / kTileRows);
    float* const offsets_at = memory.make<float>(rows);
    float* const sum_offsets_at = memory.make<float>(rows);
    float* const logits_at = memory.make<float>(rows);
    std::vector<float> best, sums, logits, derivatives, sum_offsets;
    for (uint32_t row = 0; row < rows; ++row) {
        best.push_back(row % 4 == 0 ? kElsewhere : row % 4 == 1 ? 0.5f : -float(random.uniform()));
        sums.push_back(row % 4 == 0 ? 0.0f : 1 + float(random.uniform()));
        logits.push_back(float(row % 3 == 0 ? -100 + random.normal() : 20 * random.normal()));
        derivatives.push_back(float(random.normal()));
    }
    memory.put(arrays.best_negatives, best);
    memory.put(arrays.row_sums, sums);
    memory.launch("find_far_rows", how.grid, how.block, 256, arrays);
    const auto shifts = memory.get(arrays.shifts, rows);
    memory.launch("write_row_offsets", how.grid, how.block, 0, arrays, offsets_at);
    const auto offsets = memory.get(offsets_at, rows);
    const auto moved = memory.get(arrays.row_sums, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        const bool own = row % 4 > 1 && 128.0 * best[row] - 64 < -60;
        CHECK(offsets[row] == (row % 4 == 0 ? -128.0f : own ? float(128.0 * best[row]) : 64.0f));
        CHECK(fabs(moved[row] - sums[row]) <= 2e-5 * sums[row]);
        // Another rank's sum is at most as far.
        sum_offsets.push_back(row % 5 == 0 ? 64.0f : offsets[row]);
    }
    memory.put(arrays.shifts, std::vector<float>(arrays.row_capacity, NAN));
    memory.launch("set_shifts", how.grid, how.block, 0, arrays,
                  static_cast<const float*>(offsets_at));
    const auto again = memory.get(arrays.shifts, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        CHECK(row % 4 == 0 || again[row] == shifts[row]);
    }
    memory.put(arrays.row_sums, sums);
    memory.put(logits_at, logits);
    memory.put(arrays.derivatives, derivatives);
    memory.put(sum_offsets_at, sum_offsets);
    memory.launch("weigh_rows", how.grid, how.block, 0, arrays,
                  static_cast<const float*>(arrays.row_sums), static_cast<const float*>(logits_at),
                  static_cast<const float*>(sum_offsets_at));
    const auto factors = memory.get(arrays.factors, rows);
    const auto coefficients = memory.get(arrays.coefficients, rows);
    for (uint32_t row = 0; row < rows; ++row) {
        const double whole = double(sums[row]) * exp(double(sum_offsets[row]) - 64);
        const double denominator = whole + exp(double(logits[row]) - 64);
        const double factor =
            row % 4 == 0 ? 0.0 : 128 / denominator * exp(double(offsets[row]) - 64);
        const double coefficient = -128 * (whole / denominator) * derivatives[row];
        CHECK(fabs(factors[row] - factor) <= 2e-5 * factor + 1e-37);
        CHECK(fabs(coefficients[row] - coefficient) <= 1e-6 * fabs(coefficient) + 1e-37);
    }
}

}  // namespace

int main() {
    test_cosines(1, 1, 1, 128, kLaunches[0], 1);
    test_cosines(130, 129, 67, 128, kLaunches[1], 2);
    test_cosines(5, 300, 3, 256, kLaunches[2], 3);
    test_cosines(128, 128, 64, 128, kLaunches[0], 4);
    test_sums(kLaunches[0], 5);
    test_sums(kLaunches[2], 6);
    test_offsets(kLaunches[0], 7);
    test_offsets(kLaunches[1], 8);
    return finish();
}
