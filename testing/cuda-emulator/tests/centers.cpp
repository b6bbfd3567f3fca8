// kernels/centers.cu and start.cu: start values as Rust has them, gathered operands, rows read and
// written.
#include "dense.h"

namespace {

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// What src/random.rs start_values gives.
void test_start_values() {
    struct Known {
        uint64_t seed, number;
        double std;
        std::vector<uint32_t> bits;
    };
    const Known known[] = {
        {3,
         12345,
         0.01,
         {0xbbaf7f60, 0x3be47568, 0x3c87894e, 0xbbc34e72, 0xbbe61dbe, 0x3c22f223, 0x3bf2fed4,
          0x3bef08db, 0xbc4dfb6c, 0x3a4646a6, 0xbbb7e777, 0xb92de5fd}},
        {(1ull << 63) + 77,
         (1ull << 33) + 5,
         1.0,
         {0x3f2d143b, 0xbed44db8, 0xbe0c2aa8, 0x4039ac00, 0x3f0f012f, 0x3f64c40a, 0x3f24dd69,
          0xbfb82db9}}};
    for (const Known& each : known) {
        for (uint32_t dim : {1u, 3u, 7u, 8u}) {
            Shape shape;
            shape.dim = dim;
            RowHead head(shape);
            head.arrays.seed = each.seed;
            head.arrays.first_class = each.number - 2;
            head.launch(kLaunches[dim % 4], "start_values", each.std);
            const uint32_t pitch = head.arrays.master_pitch;
            const std::vector<float> rows =
                head.memory.get(head.arrays.centers, size_t(300) * pitch);
            for (uint32_t i = 0; i < pitch; ++i) {
                const float truth = i < dim ? float_of(each.bits[i]) : 0.0f;
                EXPECT(bits_of(rows[2 * pitch + i]) == bits_of(truth), "start values");
            }
        }
    }
    // 300 rows of 64 columns in one number.
    Shape shape;
    shape.dim = 64;
    RowHead head(shape);
    head.arrays.seed = 42 + (7ull << 32);
    head.launch(kLaunches[0], "start_values", 0.05);
    uint64_t hash = 0xcbf29ce484222325u;
    for (float value : head.memory.get(head.arrays.centers, size_t(300) * 64)) {
        hash = (hash ^ bits_of(value)) * 0x100000001b3u;
    }
    EXPECT(hash == 0x57db79993d847518u, "start values");
}

// Gathers every chunk and compares it with the rows in double precision, `current` [rows][d].
void check_gather(RowHead& head, const std::vector<double>& current, double tolerance,
                  const Launch& launch, const std::string& what) {
    const uint32_t d = head.shape.dim, pitch = head.arrays.depth_pitch;
    const uint64_t plane = head.arrays.plane_centers;
    for (uint32_t first = 0; first < head.block.classes; first += head.shape.chunk) {
        head.launch(launch, "gather_centers", first);
        const uint32_t count = std::min(head.shape.chunk, head.block.classes - first);
        const std::vector<uint16_t> operand =
            head.memory.get(head.arrays.center_operand, 3 * plane);
        const std::vector<uint16_t> wide = head.memory.get(head.arrays.center_wide, plane);
        const std::vector<float> norms =
            head.memory.get(head.arrays.center_inverse_norms + first, count);
        bool right = true;
        for (uint32_t slot = 0; slot < up(count, 128); ++slot) {
            const double* row = nullptr;
            double squares = 0;
            if (slot < count) {
                row = &current[size_t(head.sample[first + slot]) * d];
                for (uint32_t i = 0; i < d; ++i) {
                    squares += row[i] * row[i];
                }
            }
            const double inverse = squares > 0 ? 1 / std::sqrt(squares) : 0.0;
            // Of short rows the norm is known as well as their elements, its inverse is not.
            const double norm = slot < count && norms[slot] != 0 ? 1.0 / norms[slot] : 0.0;
            right =
                right && close(norm, std::sqrt(squares), 1e-7, tolerance == 2e-7 ? 1e-30 : 1e-7);
            for (uint32_t i = 0; i < pitch; ++i) {
                const double truth = row != nullptr && i < d ? row[i] * inverse : 0.0;
                const size_t at = size_t(slot) * pitch + i;
                if (head.shape.split) {
                    const double sum = double(of_bfloat(operand[at])) +
                                       of_bfloat(operand[at + plane]) +
                                       of_bfloat(operand[at + 2 * plane]);
                    right = right && close(sum, truth, tolerance, tolerance);
                } else {
                    right = right && close(of_half(operand[at]), truth, 5e-4, 1e-7 + tolerance);
                    right = right && close(of_bfloat(wide[at]), truth, 4e-3, tolerance);
                }
                right = right && (truth != 0 || operand[at] == 0);
            }
        }
        EXPECT(right, what + " chunk at " + std::to_string(first));
    }
}

void test_gathering(const Shape& shape, const Launch& launch) {
    RowHead head(shape, shape.dim);
    // A row without direction.
    std::vector<float> centers = head.w;
    const size_t start = size_t(head.sample[5]) * head.arrays.master_pitch;
    std::fill(&centers[start], &centers[start] + head.arrays.master_pitch, 0.0f);
    head.w = centers;
    head.memory.put(head.arrays.centers, centers);
    Training training(head);
    check_gather(head, training.w, 2e-7, launch, shape.text());
    for (int i = 0; i < 6; ++i) {
        training.update(launch);
    }
    const std::vector<float> before = head.memory.get(head.arrays.centers, centers.size());
    check_gather(head, training.w, 4e-6, launch, shape.text() + " trained");
    EXPECT(before == head.memory.get(head.arrays.centers, centers.size()), shape.text());
}

void test_a_failed_step_is_not_gathered() {
    RowHead head((Shape()));
    head.block.status = kLabel;
    head.put_block();
    head.fill(head.arrays.center_inverse_norms, head.shape.classes, 3.0f);
    head.launch(kLaunches[0], "gather_centers", 0u);
    EXPECT(head.memory.get(head.arrays.center_inverse_norms, 4) == std::vector<float>(4, 3.0f), "");
}

// Rows of one tensor are overwritten; the others are as if nothing had been written.
void test_writing(const Shape& shape, int32_t tensor, int32_t dtype, const Launch& launch) {
    RowHead head(shape, shape.dim + 9);
    Training training(head);
    for (int i = 0; i < 7; ++i) {
        training.update(launch);
    }
    const uint32_t d = shape.dim, first = 40, count = 200;
    std::vector<float> values(size_t(count) * d);
    std::vector<double>& truth = tensor == 0 ? training.w : tensor == 1 ? training.m : training.v;
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = rounded(std::fabs(head.uniform()), dtype);
        truth[size_t(first) * d + i] = values[i];
    }
    head.launch(launch, "write_rows", tensor, first, head.matrix(values, d + 1, dtype));
    for (int32_t other = 0; other < (shape.adamw ? 3 : 2); ++other) {
        training.check(other, shape.text() + " written " + std::to_string(tensor), launch);
    }
    // What the rows go on to be comes from what was written.
    for (int i = 0; i < 3; ++i) {
        training.update(launch);
    }
    training.check(0, shape.text() + " trained on", launch);
}

void test_reading_types() {
    for (int32_t dtype : {kF32, kF16, kBf16}) {
        Shape shape;
        shape.dim = 67;
        RowHead head(shape);
        const MatrixView out = head.matrix(std::vector<float>(size_t(30) * 67), 70, dtype);
        head.launch(kLaunches[0], "read_rows", int32_t(0), 100u, out);
        const std::vector<uint8_t> bytes = head.memory.get(out.data, 30 * 70 * size_of(dtype));
        bool right = true;
        for (uint32_t row = 0; row < 30; ++row) {
            for (uint32_t i = 0; i < 67; ++i) {
                const float held = head.w[size_t(100 + row) * head.arrays.master_pitch + i];
                right = right && element(bytes, row * 70 + i, dtype) == rounded(held, dtype);
            }
        }
        EXPECT(right, "read as " + std::to_string(dtype));
    }
}

}  // namespace

int main() {
    test_start_values();
    unsigned turn = 0;
    for (uint32_t dim : {1u, 3u, 65u, 130u}) {
        for (int kind = 0; kind < 8; kind += 1, ++turn) {
            Shape shape;
            shape.dim = dim;
            shape.split = kind % 2;
            shape.dense = kind / 2 % 2;
            shape.adamw = kind / 4;
            test_gathering(shape, kLaunches[turn % 4]);
        }
    }
    test_a_failed_step_is_not_gathered();
    for (int kind = 0; kind < 4; ++kind) {
        Shape shape;
        shape.dim = 9;
        shape.dense = kind % 2;
        shape.adamw = kind / 2;
        for (int32_t tensor = 0; tensor < (shape.adamw ? 3 : 2); ++tensor) {
            test_writing(shape, tensor, kF32 + (tensor + kind) % 3, kLaunches[kind]);
        }
    }
    test_reading_types();
    return finish();
}
