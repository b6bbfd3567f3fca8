// The center gradient with its epilogue against float64 loops over the same rounded operands: dW^
// of a chunk and
// of a replicated head's whole sample, and the fused updates.
#include "gemm_case.h"

namespace {

enum class Mode { kChunk, kReplicated, kSgd, kAdamw };
const char* const kModeNames[] = {"chunk", "replicated", "sgd", "adamw"};
constexpr int kModes = 4;

struct Case {
    uint32_t rows, classes, dim, chunk;
    bool split;  // float32: three planes
    Mode mode;
    bool deep;
    uint32_t grid;
};

const double kLossWeight = 0.75;

void run(const Case& c, uint64_t seed) {
    char name[160];
    snprintf(name, sizeof name, "centers B %u S %u d %u chunk %u %s %s%s grid %u", c.rows,
             c.classes, c.dim, c.chunk, c.split ? "f32" : "half", kModeNames[int(c.mode)],
             c.deep ? " deep" : "", c.grid);
    case_name() = name;
    Draw random(seed);
    HeadArrays arrays = arrays_of(c.rows + 100, c.classes + 100, c.dim, c.chunk);
    arrays.split_operands = c.split;
    arrays.sharded = c.mode != Mode::kReplicated;
    arrays.optimizer.adamw = c.mode == Mode::kAdamw;
    const bool fuse = c.mode == Mode::kSgd || c.mode == Mode::kAdamw;
    const Kind kind = c.split ? Kind::kPlanes : Kind::kBfloat;
    const uint32_t row_end = round_up(c.rows, kTileRows);
    const uint32_t pitch = arrays.depth_pitch, master = arrays.master_pitch, dim = c.dim;

    // The batch: tangents, E' and the coefficients of the targets.
    const std::vector<float> tangents = random.units(c.rows, dim);
    std::vector<float> padded(size_t(arrays.row_capacity) * pitch, NAN);
    std::vector<float> scaled(tangents.size());
    std::vector<float> coefficients(arrays.row_capacity, NAN);
    for (uint32_t row = 0; row < c.rows; ++row) {
        coefficients[row] = -random.uniform() - 0.1f;
        for (uint32_t k = 0; k < pitch; ++k) {
            const float value = k < dim ? tangents[size_t(row) * dim + k] : 0.0f;
            padded[size_t(row) * pitch + k] = value;
            if (k < dim) scaled[size_t(row) * dim + k] = value * (1 + float(row % 7));
        }
    }
    const Operand right(kind, scaled, c.rows, dim, arrays.row_capacity, pitch, row_end, pitch);

    // Targets: some classes have several rows, and some rows are other ranks'.
    const uint32_t first_computed = 2, global = first_computed + c.rows + 3;
    std::vector<uint32_t> positive_of(arrays.sample_capacity, kNone), starts, sort_rows;
    std::vector<std::vector<uint32_t>> targets(c.classes);
    std::vector<uint32_t> class_of(global);
    for (uint32_t& column : class_of) {
        column = random.below(2 * c.classes);  // half of them nobody's here
    }
    for (uint32_t column = 0; column < c.classes; ++column) {
        const uint32_t start = uint32_t(sort_rows.size());
        for (uint32_t row = 0; row < global; ++row) {
            if (class_of[row] == column) {
                sort_rows.push_back(row);
                if (row >= first_computed && row < first_computed + c.rows) {
                    targets[column].push_back(row - first_computed);
                }
            }
        }
        if (sort_rows.size() > start) {
            positive_of[column] = uint32_t(starts.size());
            starts.push_back(start);
        }
    }
    starts.push_back(uint32_t(sort_rows.size()));
    sort_rows.push_back(kNone);

    // The shard: twice as many rows as the sample, every second one sampled.
    const uint32_t shard_rows = 2 * c.classes + 1;
    arrays.shard_rows = shard_rows;
    std::vector<uint32_t> sample(arrays.sample_capacity, kNone);
    for (uint32_t column = 0; column < c.classes; ++column) {
        sample[column] = 2 * column + 1;
    }
    auto master_rows = [&](float scale, bool square) {
        std::vector<float> all(size_t(shard_rows) * master, 0.0f);
        for (uint32_t row = 0; row < shard_rows; ++row) {
            for (uint32_t k = 0; k < dim; ++k) {
                const float value = scale * random.normal();
                all[size_t(row) * master + k] = square ? value * value : value;
            }
        }
        return all;
    };
    const std::vector<float> w = master_rows(0.5f, false), m = master_rows(0.1f, false);
    const std::vector<float> v = master_rows(0.3f, true);
    std::vector<float> inverse(arrays.sample_capacity, NAN);
    for (uint32_t column = 0; column < c.classes; ++column) {
        double squares = 0;
        for (uint32_t k = 0; k < dim; ++k) {
            squares += pow(w[size_t(sample[column]) * master + k], 2);
        }
        inverse[column] = float(1 / sqrt(squares));
    }

    Rule rule;
    memset(&rule, 0, sizeof rule);
    rule.momentum = 0.9f;
    rule.weight_decay = 0.01f;
    rule.learning_rate = 0.5f;
    rule.beta1 = 0.9f;
    rule.beta2 = 0.99f;
    rule.one_minus_beta1 = 0.1f;
    rule.one_minus_beta2 = 0.01f;
    rule.decay_factor = 0.02f;
    rule.corrected_rate = 0.3f;
    rule.sqrt_v_scale = 1.1f;
    rule.epsilon = 1e-3f;
    rule.factor = 1.0f;

    StepBlock block;
    memset(&block, 0, sizeof block);
    block.rows = c.rows;
    block.first_computed = first_computed;
    block.classes = c.classes;
    block.valid_rows = 5;
    const double weight = float(kLossWeight / 5.0);
    Device device(seed);
    arrays.block = device.upload(std::vector<StepBlock>{block});
    arrays.rule = device.upload(std::vector<Rule>{rule});
    arrays.tangents = device.upload(padded);
    arrays.scaled_operand = device.upload(right.bits);
    arrays.plane_rows = right.plane;
    arrays.coefficients = device.upload(coefficients);
    arrays.positive_of = device.upload(positive_of);
    arrays.positive_starts = device.upload(starts);
    arrays.sort_rows[0] = device.upload(sort_rows);
    arrays.sample = device.upload(sample);
    arrays.center_inverse_norms = device.upload(inverse);
    arrays.centers = device.upload(w);
    arrays.momentum = device.upload(m);
    arrays.second_moment = device.upload(v);
    arrays.center_squares = device.upload(std::vector<float>(arrays.sample_capacity, NAN));
    const size_t gradient_rows = c.mode == Mode::kReplicated ? arrays.sample_capacity : c.chunk;

    const int width = row_width(int(dim));
    char entry[64];
    snprintf(entry, sizeof entry, "gemm_center_gradient_%s_%d", c.split ? "f32" : "half", width);
    const GemmTile tile = gemm_tile(Gemm::kCenterGradient, width, c.deep);
    std::vector<double> truth(size_t(c.classes) * dim);  // dW^, or dW
    Distance gradient;
    for (uint32_t first = 0; first < c.classes; first += c.chunk) {
        const uint32_t count = c.classes - first < c.chunk ? c.classes - first : c.chunk;
        const uint32_t column_end = round_up(count, kTileColumns);
        std::vector<float> powers(size_t(c.rows) * count);
        for (float& power : powers) {
            power = random.below(8) == 0 ? 0.0f : 0.1f * expf(random.normal());
        }
        const Operand left(kind, powers, c.rows, count, arrays.row_capacity, c.chunk, row_end,
                           column_end);
        arrays.numerators = device.upload(left.tiled());
        arrays.plane_numerators = left.plane;
        if (first == 0 || c.mode != Mode::kReplicated) {
            arrays.center_gradient =
                device.upload(std::vector<float>(gradient_rows * dim + 8, NAN));
        }
        device.launch(entry, c.grid, tile.threads(),
                      gemm_shared_bytes(Gemm::kCenterGradient, width, c.deep), arrays, first,
                      kLossWeight, int32_t(fuse), uint32_t(tile.stages));
        const auto found = device.download(arrays.center_gradient, gradient_rows * dim + 8);
        for (uint32_t column = first; column < first + count; ++column) {
            double* const g = &truth[size_t(column) * dim];
            for (uint32_t row = 0; row < c.rows; ++row) {
                const double power = left.at(row, column - first);
                for (uint32_t k = 0; k < dim; ++k) {
                    g[k] += power * right.at(row, k);
                }
            }
            for (uint32_t row : targets[column]) {
                for (uint32_t k = 0; k < dim; ++k) {
                    g[k] += double(coefficients[row]) * tangents[size_t(row) * dim + k];
                }
            }
            const size_t slot = c.mode == Mode::kReplicated ? column : column - first;
            double along = 0;
            std::vector<double> u(dim);
            for (uint32_t k = 0; k < dim; ++k) {
                u[k] = double(w[size_t(sample[column]) * master + k]) * inverse[column];
                along += g[k] * u[k];
            }
            for (uint32_t k = 0; k < dim; ++k) {
                if (fuse) {
                    g[k] = (g[k] - along * u[k]) * inverse[column] * weight;
                } else {
                    gradient.add(found[slot * dim + k], g[k] * weight);
                }
            }
        }
        for (size_t at = 0; at < found.size(); ++at) {
            const size_t column = at / dim + (c.mode == Mode::kReplicated ? 0 : first);
            if (fuse || column >= first + count) {
                require(isnan(found[at]), "a gradient was written where there is none");
            }
        }
    }
    gradient.check(1e-5, "dW^");

    const auto new_w = device.download(arrays.centers, w.size());
    const auto new_m = device.download(arrays.momentum, m.size());
    const auto new_v = device.download(arrays.second_moment, v.size());
    const auto squares = device.download(arrays.center_squares, arrays.sample_capacity);
    auto same = [](float a, float b) { return memcmp(&a, &b, 4) == 0; };
    Distance moved, momentum, second, sums;
    for (uint32_t row = 0; row < shard_rows; ++row) {
        const uint32_t column = row / 2;
        double sum = 0;
        for (uint32_t k = 0; k < master; ++k) {
            const size_t at = size_t(row) * master + k;
            if (!fuse || row % 2 == 0 || k >= dim) {
                require(same(new_w[at], w[at]) && same(new_m[at], m[at]), "a row was touched");
                require(same(new_v[at], v[at]), "a second moment was touched");
                continue;
            }
            const double g = truth[size_t(column) * dim + k];
            sum += g * g;
            double next_m, next_v = v[at], step;
            if (c.mode == Mode::kSgd) {
                next_m = rule.momentum * double(m[at]) + g + rule.weight_decay * double(w[at]);
                step = rule.learning_rate * next_m;
                require(same(new_v[at], v[at]), "SGD has no second moment");
            } else {
                next_m = rule.beta1 * double(m[at]) + rule.one_minus_beta1 * g;
                next_v = rule.beta2 * double(v[at]) + rule.one_minus_beta2 * g * g;
                step = rule.decay_factor * double(w[at]) +
                       rule.corrected_rate * next_m /
                           (sqrt(next_v) * rule.sqrt_v_scale + rule.epsilon);
            }
            moved.add(double(new_w[at]) - w[at], -step);
            momentum.add(new_m[at], next_m);
            second.add(new_v[at], next_v);
        }
        // Where d is 1 the sum of squares is that of roundings.
        if (fuse && row % 2 == 1 && dim > 1) {
            sums.add(sum > 0 ? squares[column] / sum : 1 + squares[column], 1);
        }
    }
    if (fuse) {
        // At d = 1 the gradient is what roundings leave of dW^ - dW^.
        const double limit = dim == 1 ? 1e-4 : 1e-5;
        moved.check(limit, "W");
        momentum.check(limit, "m");
        second.check(limit, "v");
        sums.check(3e-5, "squares");
    }
    for (uint32_t column = fuse ? c.classes : 0; column < arrays.sample_capacity; ++column) {
        require(isnan(squares[column]), "a sum of squares was written where there is none");
    }
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
            run({rows[i], classes[j], dims[(i + j) % 5], chunk, (2 * i + j) % 3 == 0,
                 Mode((i + 3 * j) % kModes), false, uint32_t(1 + (i + j) % 4)},
                ++seed);
        }
    }
    for (int mode = 0; mode < kModes; ++mode) {
        run({40, 130, 512, 256, mode == 1, Mode(mode), mode % 2 == 1, 3}, 100 + mode);
        run({20, 70, 600, 128, mode == 2, Mode(mode), mode % 2 == 0, 2}, 110 + mode);
    }
    run({33, 40, 1024, 128, false, Mode::kSgd, false, 2}, 120);
    run({33, 140, 255, 128, true, Mode::kAdamw, false, 2}, 121);
    puts("gemm_center_gradient: all right");
    return 0;
}
