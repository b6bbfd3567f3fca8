// kernels/gradient.cu and collective.cu against plain double arithmetic.
#include "../../../kernels/collective.h"
#include "dense.h"

namespace {

// What the forward and the verdict left for the gradient.
struct Setting {
    std::vector<float> weighted, units, tangents, factors, coefficients, norms, scales;

    explicit Setting(RowHead& head) {
        const uint32_t d = head.shape.dim, pitch = head.arrays.depth_pitch;
        const uint32_t capacity = head.arrays.row_capacity;
        weighted.assign(size_t(head.arrays.splits) * capacity * pitch, NAN);
        units.assign(size_t(capacity) * pitch, 0.0f);
        tangents.assign(size_t(capacity) * pitch, NAN);
        for (uint32_t row = 0; row < head.block.rows; ++row) {
            double squares = 0;
            for (uint32_t i = 0; i < pitch; ++i) {
                for (uint32_t split = 0; split < head.arrays.splits; ++split) {
                    weighted[(size_t(split) * capacity + row) * pitch + i] =
                        i < d ? head.uniform() : 0.0f;
                }
                const float value = i < d ? head.uniform() : 0.0f;
                tangents[size_t(row) * pitch + i] = i < d ? head.uniform() : 0.0f;
                units[size_t(row) * pitch + i] = value;
                squares += double(value) * value;
            }
            for (uint32_t i = 0; i < d; ++i) {
                units[size_t(row) * pitch + i] *= float(1 / std::sqrt(squares));
            }
            factors.push_back(row % 6 == 0 ? 0.0f : 3 + 2 * head.uniform());
            // Without a negative here a row may have a target's pull alone, and without any no pull.
            coefficients.push_back(row % 12 == 0 ? 0.0f : 5 * head.uniform());
            norms.push_back(row % 11 == 1 ? 0.0f : 1 + 0.5f * head.uniform());
        }
        for (uint32_t i = 0; i < head.block.own_rows; ++i) {
            scales.push_back(std::ldexp(1.0f, int(head.random() % 5) - 2));
        }
        if (head.arrays.send_scales != nullptr) {
            head.memory.put(head.arrays.send_scales, scales);
        }
        head.memory.put(head.arrays.weighted_centers, weighted);
        head.memory.put(head.arrays.units, units);
        head.memory.put(head.arrays.tangents, tangents);
        head.memory.put(head.arrays.factors, factors);
        head.memory.put(head.arrays.coefficients, coefficients);
        head.memory.put(head.arrays.inverse_norms, norms);
    }

    double unit_gradient(const RowHead& head, uint32_t row, uint32_t i) const {
        double sum = 0;
        for (uint32_t split = 0; split < head.arrays.splits; ++split) {
            const size_t part = size_t(split) * head.arrays.row_capacity + row;
            sum += weighted[part * head.arrays.depth_pitch + i];
        }
        sum *= factors[row];
        const uint32_t column = head.columns[head.global(row)];
        if (column != kNone) {
            sum += double(coefficients[row]) *
                   tangents[size_t(row) * head.arrays.depth_pitch + i];
        }
        return sum;
    }
};

void test_embedding_gradient(const Shape& shape, bool failed, const Launch& launch) {
    const std::string what = shape.text() + (failed ? " failed" : "");
    RowHead head(shape, shape.dim + 2);
    const Setting setting(head);
    head.block.status = failed ? kNotFinite : kOk;
    head.put_block();
    const uint32_t d = shape.dim;
    const uint32_t places = shape.sharded ? head.arrays.label_capacity : head.arrays.max_batch;
    float* const gradient = shape.sharded ? head.arrays.gradient_send : head.arrays.gradient_recv;
    head.launch(launch, "embedding_gradient");
    const std::vector<float> found = head.memory.get(gradient, size_t(places) * d);
    std::vector<double> truth(found.size(), 0.0);
    for (uint32_t row = 0; row < head.block.rows && !failed; ++row) {
        const uint32_t place = shape.sharded ? head.origins[row] : row;
        for (uint32_t i = 0; i < d; ++i) {
            truth[size_t(place) * d + i] = setting.unit_gradient(head, row, i);
        }
    }
    bool right = true;
    for (size_t i = 0; i < truth.size(); ++i) {
        right = right && close(found[i], truth[i], 1e-6, truth[i] == 0 ? 0 : 2e-5);
    }
    EXPECT(right, what);
}

void test_finishing(const Shape& shape, int32_t dtype, bool failed, const Launch& launch) {
    const std::string what = shape.text() + " to " + std::to_string(dtype);
    RowHead head(shape, shape.dim + 4);
    const Setting setting(head);
    head.block.status = failed ? kNotFinite : kOk;
    head.block.valid_rows = 37;
    head.put_block();
    const uint32_t d = shape.dim, own = head.block.own_rows, pitch = head.arrays.depth_pitch;
    std::vector<float> gradient(size_t(own) * d);
    for (float& value : gradient) {
        value = head.uniform();
    }
    head.memory.put(head.arrays.gradient_recv, gradient);
    const double factor = 2.5;
    const MatrixView out = head.matrix(std::vector<float>(gradient.size(), NAN), d + 1, dtype);
    head.launch(launch, "finish_gradient", factor, out);
    const std::vector<uint8_t> bytes = head.memory.get(out.data, own * (d + 1) * size_of(dtype));
    const std::vector<float> squares = head.memory.get(head.arrays.squares, own);
    const double error = dtype == kF32 ? 1e-6 : dtype == kF16 ? 6e-4 : 5e-3;
    double total = 0;
    for (uint32_t row = 0; row < own; ++row) {
        const float* unit = &setting.units[size_t(head.block.first_own + row) * pitch];
        double along = 0, sum = 0;
        for (uint32_t i = 0; i < d; ++i) {
            along += double(gradient[size_t(row) * d + i]) * unit[i];
        }
        bool right = true;
        for (uint32_t i = 0; i < d; ++i) {
            const double scale = head.arrays.send_scales ? setting.scales[row] : 1;
            const double length = setting.norms[head.block.first_own + row] * scale * factor / 37;
            const double g = gradient[size_t(row) * d + i];
            const double truth = failed ? 0 : (g - along * unit[i]) * length;
            const double value = element(bytes, size_t(row) * (d + 1) + i, dtype);
            right = right && close(value, truth, error, failed ? 0 : 1e-7);
            sum += truth * truth;
        }
        total += sum;
        EXPECT(right && close(squares[row], sum, 1e-5, 1e-12), what);
    }
    // The squares alone.
    head.fill(head.arrays.squares, own, -1.0f);
    MatrixView none{};
    head.launch(launch, "finish_gradient", factor, none);
    EXPECT(head.memory.get(head.arrays.squares, own) == squares, what);
    head.launch({1, launch.block}, "sum_squares", int32_t(0));
    const double summed = head.get_block().grad_embeddings;
    EXPECT(close(summed, failed ? 0 : total, 1e-5, 1e-12), what);
    // A batch without valid rows has no gradient.
    head.block.valid_rows = 0;
    head.put_block();
    head.launch(launch, "finish_gradient", factor, out);
    for (float square : head.memory.get(head.arrays.squares, own)) {
        EXPECT(square == 0, what);
    }
}

void test_margins(bool sharded, bool failed, const Launch& launch) {
    Shape shape;
    shape.sharded = sharded;
    RowHead head(shape, 3);
    head.allow_terms();
    head.block.valid_rows = 37;
    head.block.status = failed ? kNotFinite : kOk;
    head.put_block();
    const uint32_t own = head.block.own_rows, pitch = head.arrays.row_capacity;
    std::vector<float> gradients;
    for (uint32_t i = 0; i < 2 * pitch; ++i) {
        gradients.push_back(head.uniform());
    }
    head.memory.put(head.arrays.margin_gradients, gradients);
    float* const out[2] = {head.memory.make<float>(own + 1), head.memory.make<float>(own + 1)};
    for (unsigned wanted = 0; wanted < 4; ++wanted) {
        for (float* to : out) {
            head.fill(to, own + 1, -5.0f);
        }
        float* const none = nullptr;
        head.launch(launch, "margin_gradients", 2.5, wanted & 1 ? out[0] : none,
                    wanted & 2 ? out[1] : none);
        for (unsigned which = 0; which < 2; ++which) {
            const std::vector<float> found = head.memory.get(out[which], own + 1);
            for (uint32_t i = 0; i < own; ++i) {
                const float from = gradients[which * pitch + head.block.first_own + i];
                const double truth = failed ? 0 : from * 2.5 / 37;
                EXPECT(wanted >> which & 1 ? close(found[i], truth, 1e-7) : found[i] == -5.0f,
                       "margin " + std::to_string(which));
            }
            EXPECT(found[own] == -5.0f, "beyond the rows");
        }
    }
}

void test_squares_of_centers() {
    RowHead head((Shape()), 8);
    std::vector<float> squares;
    double sum = 0;
    for (uint32_t i = 0; i < head.block.classes; ++i) {
        squares.push_back(std::exp(10 * head.uniform()));
        sum += squares.back();
    }
    head.memory.put(head.arrays.center_squares, squares);
    for (const Launch& launch : kLaunches) {
        head.put_block();
        head.launch({1, 4 * launch.block}, "sum_squares", int32_t(1));
        EXPECT(close(head.get_block().grad_centers, sum, 1e-13), "squares of centers");
    }
}

template <class T>
void test_reduction(int32_t dtype, int32_t op, const std::vector<std::vector<T>>& values,
                    bool in_place, const std::vector<T>& truth) {
    DeviceMemory memory;
    RankPointers sources{}, destinations{};
    const size_t count = truth.size();
    std::vector<T*> into;
    for (size_t rank = 0; rank < values.size(); ++rank) {
        T* const source = memory.make<T>(count);
        memory.put(source, values[rank]);
        sources.of[rank] = source;
        into.push_back(in_place ? source : memory.make<T>(count));
        memory.put(into.back(), values[rank]);
        destinations.of[rank] = into.back();
    }
    // From the second number on, and not the last.
    memory.launch("reduce_ranks", 3, 96, 0, sources, destinations, uint64_t(1), uint64_t(count - 2),
                  dtype, op, uint32_t(values.size()));
    for (size_t rank = 0; rank < values.size(); ++rank) {
        std::vector<T> expected = truth;
        expected.front() = values[rank].front();
        expected.back() = values[rank].back();
        const std::vector<T> found = memory.get(into[rank], count);
        EXPECT(std::memcmp(found.data(), expected.data(), count * sizeof(T)) == 0,
               "reduction of " + std::to_string(dtype) + " by " + std::to_string(op));
    }
}

template <class T>
void test_reductions(int32_t dtype) {
    std::mt19937 random(3);
    const size_t count = 1000;
    for (size_t ranks : {1, 2, 5}) {
        std::vector<std::vector<T>> values(ranks, std::vector<T>(count));
        std::vector<T> sum(count), most(count);
        for (size_t i = 0; i < count; ++i) {
            for (size_t rank = 0; rank < ranks; ++rank) {
                const T value = T(int32_t(random())) / T(rank % 2 ? 7 : 1);
                values[rank][i] = value;
                // Unsigned sums wrap as they should; floats add in rank order.
                if (T(0.5) != T(0)) {
                    sum[i] = rank == 0 ? value : sum[i] + value;
                } else {
                    sum[i] = T(uint64_t(sum[i]) + uint64_t(value));
                }
                most[i] = rank == 0 ? value : std::max(most[i], value);
            }
        }
        test_reduction<T>(dtype, kReduceSum, values, ranks == 2, sum);
        test_reduction<T>(dtype, kReduceMax, values, ranks == 5, most);
    }
}

}  // namespace

int main() {
    unsigned turn = 0;
    for (uint32_t dim : {1u, 3u, 65u, 130u}) {
        for (int kind = 0; kind < 6; ++kind, ++turn) {
            Shape shape;
            shape.dim = dim;
            shape.sharded = kind % 2;
            shape.gather = kind < 4 ? kF16 : kF32;  // a replicated head's rows do not travel
            shape.dense = kind / 2 > 0;
            shape.adamw = kind / 2 > 1;
            test_embedding_gradient(shape, false, kLaunches[turn % 4]);
            test_finishing(shape, kF32 + kind / 2, false, kLaunches[turn % 4]);
        }
        Shape shape;
        shape.dim = dim;
        test_embedding_gradient(shape, true, kLaunches[turn % 4]);
        test_finishing(shape, kBf16, true, kLaunches[turn % 4]);
    }
    for (const Launch& launch : kLaunches) {
        test_margins(true, false, launch);
        test_margins(false, launch.grid == 1, launch);
    }
    test_squares_of_centers();
    test_reductions<float>(kElementF32);
    test_reductions<double>(kElementF64);
    test_reductions<int32_t>(kElementI32);
    test_reductions<int64_t>(kElementI64);
    const float nan = NAN;
    test_reduction<float>(kElementF32, kReduceMax, {{0, nan, 1, 2, 0}, {0, 1, nan, 3, 0}}, false,
                          {0, nan, nan, 3, 0});
    return finish();
}
