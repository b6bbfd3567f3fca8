// The weighted centers against float64 loops over the same rounded operands: chunks, splits, and
// what stays as it was.
#include "gemm_case.h"

namespace {

struct Case {
    uint32_t rows, classes, dim, chunk, splits;
    bool split;  // float32: three planes
    uint32_t grid;
    bool flat = false;  // numerators alike, so that a sum grows all the way
};

void run(const Case& c, uint64_t seed) {
    char name[160];
    snprintf(name, sizeof name, "weighted B %u S %u d %u chunk %u splits %u %s grid %u", c.rows,
             c.classes, c.dim, c.chunk, c.splits, c.split ? "f32" : "half", c.grid);
    case_name() = name;
    Draw random(seed);
    HeadArrays arrays = arrays_of(c.rows + 100, c.classes + 100, c.dim, c.chunk);
    arrays.splits = c.splits;
    arrays.split_operands = c.split;
    const Kind kind = c.split ? Kind::kPlanes : Kind::kBfloat;
    const uint32_t row_end = round_up(c.rows, kTileRows);
    const uint32_t pitch = arrays.depth_pitch;

    StepBlock block;
    memset(&block, 0, sizeof block);
    block.rows = c.rows;
    block.classes = c.classes;
    Device device(seed);
    arrays.block = device.upload(std::vector<StepBlock>{block});
    const size_t part = size_t(arrays.row_capacity) * pitch;
    arrays.weighted_centers = device.upload(std::vector<float>(c.splits * part, NAN));
    const uint32_t share = round_up((c.chunk + c.splits - 1) / c.splits, kTileColumns);

    std::vector<double> truth(c.splits * part, 0.0);
    // A sample of no classes still leaves zeros.
    for (uint32_t first = 0; first == 0 || first < c.classes; first += c.chunk) {
        const uint32_t count = c.classes - first < c.chunk ? c.classes - first : c.chunk;
        const uint32_t column_end = round_up(count, kTileColumns);
        std::vector<float> powers(size_t(c.rows) * count);
        for (float& power : powers) {
            power = c.flat                ? 0.5f + 0.5f * random.uniform()
                    : random.below(8) == 0 ? 0.0f
                                           : expf(20 * random.normal());
        }
        // Columns differ by orders of magnitude, rows do not: each row's error is its own.
        const Operand numerators(kind, powers, c.rows, count, arrays.row_capacity, c.chunk, row_end,
                                 column_end);
        const Operand centers(kind, random.units(count, c.dim), count, c.dim, c.chunk, pitch,
                              column_end, pitch);
        arrays.numerators = device.upload(numerators.tiled());
        arrays.plane_numerators = numerators.plane;
        arrays.center_wide = device.upload(centers.bits);
        arrays.plane_centers = centers.plane;
        device.launch(c.split ? "gemm_weighted_centers_f32" : "gemm_weighted_centers_half", c.grid,
                      gemm_tile(Gemm::kWeightedCenters).threads(),
                      gemm_shared_bytes(Gemm::kWeightedCenters), arrays, first);
        for (uint32_t row = 0; row < c.rows; ++row) {
            for (uint32_t column = 0; column < count; ++column) {
                double* const to = &truth[column / share * part + size_t(row) * pitch];
                const double power = numerators.at(row, column);
                for (uint32_t k = 0; k < c.dim; ++k) {
                    to[k] += power * centers.at(column, k);
                }
            }
        }
    }
    const auto found = device.download(arrays.weighted_centers, c.splits * part);
    Distance distance;
    for (uint32_t split = 0; split < c.splits; ++split) {
        for (uint32_t row = 0; row < arrays.row_capacity; ++row) {
            const size_t at = split * part + size_t(row) * pitch;
            double size = 0;
            for (uint32_t k = 0; k < pitch; ++k) {
                size += truth[at + k] * truth[at + k];
            }
            size = size > 0 ? sqrt(size) : 1;
            for (uint32_t k = 0; k < pitch; ++k) {
                if (row >= row_end) {
                    require(isnan(found[at + k]), "a row beyond was written");
                } else if (row >= c.rows || k >= c.dim) {
                    require(found[at + k] == 0, "nothing is not 0");
                } else {
                    distance.add(found[at + k] / size, truth[at + k] / size);
                }
            }
        }
    }
    distance.check(!c.flat ? 1e-5 : c.split ? 5e-6 : 6e-5, "P W^");
    device.finish();
}

}  // namespace

int main() {
    const uint32_t rows[] = {1, 5, 128, 130, 300}, classes[] = {1, 7, 128, 200, 400};
    const uint32_t dims[] = {1, 3, 64, 65, 130};
    uint64_t seed = 0;
    for (int i = 0; i < 5; ++i) {
        for (int j = 0; j < 5; ++j) {
            const uint32_t chunk = j % 2 ? 128 : 512;
            run({rows[i], classes[j], dims[(i + j) % 5], chunk, uint32_t(1 + (i + 2 * j) % 4),
                 (2 * i + j) % 3 == 0, uint32_t(1 + (i + j) % 4)},
                ++seed);
        }
    }
    run({7, 0, 65, 256, 2, false, 3}, 100);
    run({130, 200, 512, 256, 2, false, 3}, 101);
    run({40, 130, 600, 256, 1, true, 3}, 102);
    // In one chain the accumulators' cuts would add up to more.
    run({3, 12288, 3, 12288, 1, true, 1, true}, 103);
    run({3, 65536, 3, 65536, 1, false, 1, true}, 104);
    puts("gemm_weighted_centers: all right");
    return 0;
}
