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
        memory.launch("gemm_cosines", how.grid, 256, 49152, arrays, rows, count, uint64_t(first),
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
                  static_cast<const float*>(arrays.row_sums), static_cast<const float*>(logits_at));
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

}  // namespace

int main() {
    test_cosines(1, 1, 1, 128, kLaunches[0], 1);
    test_cosines(130, 129, 67, 128, kLaunches[1], 2);
    test_cosines(5, 300, 3, 256, kLaunches[2], 3);
    test_cosines(128, 128, 64, 128, kLaunches[0], 4);
    test_sums(kLaunches[0], 5);
    test_sums(kLaunches[2], 6);
    return finish();
}
