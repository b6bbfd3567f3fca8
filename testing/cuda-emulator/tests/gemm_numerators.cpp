// The numerators against float64 loops over the same rounded operands.
#include "far.h"
#include "gemm_case.h"

namespace {

struct Case {
    uint32_t rows, classes, dim, chunk;
    bool split;      // float32: three planes
    double filter;
    double scale;
    uint32_t grid;
    bool own = false;  // rows have offsets of their own
};

void run(const Case& c, uint64_t seed) {
    char name[160];
    snprintf(name, sizeof name,
             "numerators B %u S %u d %u chunk %u %s filter %g scale %g grid %u own %d", c.rows,
             c.classes, c.dim, c.chunk, c.split ? "f32" : "half", c.filter, c.scale, c.grid, c.own);
    case_name() = name;
    Draw random(seed);
    HeadArrays arrays = arrays_of(c.rows + 100, c.classes + 100, c.dim, c.chunk);
    arrays.margin.scale = c.scale;
    arrays.margin.offset = c.scale > 64 ? c.scale - 64 : 0;
    arrays.margin.filter = c.filter;
    arrays.split_operands = c.split;
    const Kind kind = c.split ? Kind::kPlanes : Kind::kHalf;
    const uint32_t planes = c.split ? 3 : 1;
    const uint32_t row_end = round_up(c.rows, kTileRows);

    const Operand units(kind, random.units(c.rows, c.dim), c.rows, c.dim, arrays.row_capacity,
                        arrays.depth_pitch, row_end, arrays.depth_pitch);
    const std::vector<float> centers = random.units(c.classes, c.dim);
    const uint32_t first_computed = 3;
    std::vector<uint32_t> columns(first_computed + arrays.row_capacity, 0);
    std::vector<float> cosines(arrays.row_capacity, NAN);
    for (uint32_t row = 0; row < c.rows; ++row) {
        const uint32_t what = random.below(4);
        cosines[row] = what == 0 ? kIgnored : what == 1 ? kElsewhere : 0.25f;
        columns[row + first_computed] = what < 2 ? kNone : random.below(c.classes);
    }

    StepBlock block;
    memset(&block, 0, sizeof block);
    block.rows = c.rows;
    block.first_computed = first_computed;
    block.classes = c.classes;
    Device device(seed);
    arrays.block = device.upload(std::vector<StepBlock>{block});
    arrays.unit_operand = device.upload(units.bits);
    arrays.plane_rows = units.plane;
    arrays.columns = device.upload(columns);
    arrays.target_cosines = device.upload(cosines);
    // Every third row has an offset of its own, but for the second tile of rows.
    std::vector<float> shifts(arrays.row_capacity, float(-arrays.margin.offset * far::kLog2E));
    std::vector<uint32_t> far_tiles(arrays.row_capacity / kTileRows, 0);
    for (uint32_t row = 0; c.own && row < c.rows; row += 3) {
        if (row / kTileRows != 1) {
            shifts[row] = 1.5f - float(row % 7);
            far_tiles[row / kTileRows] = 1;
        }
    }
    if (c.own) {
        arrays.shifts = device.upload(shifts);
        arrays.far_tiles = device.upload(far_tiles);
    }
    const size_t partials = size_t(arrays.column_tiles) * arrays.row_capacity;
    arrays.partial_sums = device.upload(std::vector<float>(partials, NAN));
    arrays.partial_best = device.upload(std::vector<float>(partials, NAN));
    arrays.plane_numerators = uint64_t(arrays.row_capacity) * arrays.chunk_capacity + 64;

    Distance stored, summed;
    for (uint32_t first = 0; first < c.classes; first += c.chunk) {
        const uint32_t count = c.classes - first < c.chunk ? c.classes - first : c.chunk;
        const uint32_t column_end = round_up(count, kTileColumns);
        const std::vector<float> part(centers.begin() + size_t(first) * c.dim,
                                      centers.begin() + size_t(first + count) * c.dim);
        const Operand operand(kind, part, count, c.dim, c.chunk, arrays.depth_pitch, column_end,
                              arrays.depth_pitch);
        arrays.center_operand = device.upload(operand.bits);
        arrays.plane_centers = operand.plane;
        arrays.numerators =
            device.upload(std::vector<uint16_t>(planes * arrays.plane_numerators, kNaN16));
        const unsigned threads = gemm_tile(Gemm::kNumerators).threads();
        const unsigned bytes = gemm_shared_bytes(Gemm::kNumerators);
        if (c.own) {
            const char* const entry = c.split ? "gemm_numerators_f32_far" : "gemm_numerators_half_far";
            device.launch(entry, c.grid, threads, bytes, arrays, first, int32_t(1));
            const auto left = device.download(arrays.numerators, arrays.plane_numerators);
            const auto sums = device.download(arrays.partial_sums, partials);
            for (uint32_t row = 0; row < row_end; ++row) {
                const bool taken = far_tiles[row / kTileRows] != 0;
                require((left[numerator_at(row, 0, c.chunk)] != kNaN16) == taken, "tiles without such rows");
                require(isnan(sums[uint64_t(first / kTileColumns) * arrays.row_capacity + row]) != taken,
                        "sums of tiles without such rows");
            }
            device.launch(entry, c.grid, threads, bytes, arrays, first, int32_t(0));
        } else {
            device.launch(c.split ? "gemm_numerators_f32" : "gemm_numerators_half", c.grid, threads,
                          bytes, arrays, first);
        }
        const auto found = device.download(arrays.numerators, planes * arrays.plane_numerators);
        const auto sums = device.download(arrays.partial_sums, partials);
        const auto best = device.download(arrays.partial_best, partials);

        for (uint32_t row = 0; row < arrays.row_capacity; ++row) {
            std::vector<double> tile_sum(column_end / kTileColumns, 0.0);
            std::vector<double> tile_best(column_end / kTileColumns, kElsewhere);
            for (uint32_t column = 0; column < arrays.chunk_capacity; ++column) {
                double value = 0;
                for (uint32_t plane = 0; plane < planes; ++plane) {
                    const uint16_t bits = found[plane * arrays.plane_numerators +
                                                numerator_at(row, column, arrays.chunk_capacity)];
                    value += from_bfloat(bits);
                }
                if (row >= row_end || column >= column_end) {
                    require(isnan(value), "P was written where there is nothing");
                    continue;
                }
                if (row >= c.rows || column >= count || cosines[row] == kIgnored ||
                    columns[row + first_computed] == first + column) {
                    require(value == 0, "what does not count is not 0");
                    continue;
                }
                double cosine = 0;
                for (uint32_t k = 0; k < c.dim; ++k) {
                    cosine += units.at(row, k) * operand.at(column, k);
                }
                double& sum = tile_sum[column / kTileColumns];
                double& most = tile_best[column / kTileColumns];
                most = cosine > most ? cosine : most;
                const double power = exp(c.scale * cosine + double(shifts[row]) / far::kLog2E);
                if (c.filter > 0 && fabs(cosine - c.filter) < 1e-6) {
                    sum = NAN;  // either side of the filter is right
                    continue;
                }
                if (c.filter > 0 && cosine > c.filter) {
                    require(value == 0, "a filtered negative is stored");
                    sum += exp(-arrays.margin.offset);
                    continue;
                }
                sum += power;
                // Relative to its own size: large numerators would hide the small ones.
                const double truth = c.split ? power : from_bfloat(to_bfloat(float(power)));
                if (power > 1e-30) stored.add(value / power, truth / power);
            }
            for (uint32_t tile = 0; tile < column_end / kTileColumns; ++tile) {
                const size_t at = size_t(first / kTileColumns + tile) * arrays.row_capacity + row;
                if (row >= row_end) {
                    require(isnan(sums[at]) && isnan(best[at]), "a row beyond was summed");
                    continue;
                }
                const bool counts = row < c.rows && cosines[row] != kIgnored;
                if (!counts) {
                    require(sums[at] == 0 && best[at] == kElsewhere, "a masked row has a sum");
                } else if (!isnan(tile_sum[tile])) {
                    const double size = tile_sum[tile] > 0 ? tile_sum[tile] : 1;
                    summed.add(sums[at] / size, tile_sum[tile] / size);
                    require(fabs(best[at] - tile_best[tile]) < 2e-6, "best negative");
                }
            }
        }
    }
    stored.check(c.split ? 1e-5 : 3e-4, "P");
    summed.check(1e-5, "row sums");
    device.finish();
}

}  // namespace

int main() {
    const uint32_t rows[] = {1, 5, 128, 130, 300}, classes[] = {1, 7, 128, 200, 400};
    const uint32_t dims[] = {1, 3, 64, 65, 130};
    uint64_t seed = 0;
    for (int i = 0; i < 5; ++i) {
        for (int j = 0; j < 5; ++j) {
            // Every pair of B and S once, with d, chunks, precision and the rest taking turns.
            const uint32_t dim = dims[(i + j) % 5];
            const bool split = (2 * i + j) % 3 == 0;
            const uint32_t chunk = j % 2 ? 128 : 512;
            run({rows[i], classes[j], dim, chunk, split, (i + 2 * j) % 4 == 0 ? 0.3 : 0.0,
                 j == 3 ? 90.0 : 64.0, uint32_t(1 + (i + j) % 4)},
                ++seed);
        }
    }
    run({300, 200, 65, 128, false, 0.0, 90.0, 3, true}, 98);
    run({260, 200, 64, 256, true, 0.0, 90.0, 2, true}, 99);
    run({130, 200, 512, 256, false, 0.0, 64.0, 3}, 100);
    run({40, 130, 600, 256, true, 0.1, 64.0, 3}, 101);
    puts("gemm_numerators: all right");
    return 0;
}
