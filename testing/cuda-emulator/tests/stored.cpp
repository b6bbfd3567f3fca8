// kernels/stored.h in the kernels that have it: rows in bf16 beside rows in float32 that begin each
// update where they do. What such an update leaves is rounded here, and is what the others hold, bit
// for bit.
#include "philox.h"
#include "rows.h"

namespace {

constexpr uint64_t kSeed = (5ull << 40) + 11;

// src/rounding.rs and src/random.rs `rounding_key`, written out.
float at_random(uint64_t number, uint64_t update, uint32_t purpose, uint32_t column, float value) {
    const uint32_t last = uint32_t(update >> 32) + (purpose << 24);
    const uint32_t key =
        philox_of({uint32_t(number), uint32_t(number >> 32), uint32_t(update), last}, kSeed)[0];
    uint32_t word = key + (column / 32 * 16 + column % 16) * 0x9E3779B9u;
    word = (word ^ (word >> 16)) * 0x7feb352du;
    word = (word ^ (word >> 15)) * 0x846ca68bu;
    word ^= word >> 16;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return of_bfloat(uint16_t((bits + (column % 32 < 16 ? word & 0xffff : word >> 16)) >> 16));
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

class Pair {
  public:
    RowHead wide, bf16;
    std::string what;

    Pair(const Shape& shape, const Launch& launch)
        : wide(float_shape(shape)), bf16(shape), what(shape.text()), launch_(launch) {
        for (RowHead* head : {&wide, &bf16}) {
            head->arrays.seed = kSeed;
            head->arrays.first_class = (1ull << 33) + 5;
        }
        begin_alike();
    }

    template <class... A>
    void both(const char* name, const A&... parameters) {
        wide.launch(launch_, name, parameters...);
        bf16.launch(launch_, name, parameters...);
    }

    // The rows in float32 take what those in bf16 hold.
    void begin_alike() {
        for (int32_t tensor = 0; tensor < wide.tensors(); ++tensor) {
            wide.put_rows(tensor, bf16.get_rows(tensor));
        }
    }

    // A sample, with gradients and norms that are good enough for both.
    void draw() {
        const uint32_t rows = wide.shape.shard_rows, d = wide.shape.dim;
        // The last rows are drawn at first alone: dense ones fall behind.
        const uint32_t drawn = draws_++ < 1 ? rows : rows - rows / 4;
        std::vector<uint32_t> all(drawn);
        for (uint32_t i = 0; i < drawn; ++i) {
            all[i] = i;
        }
        std::shuffle(all.begin(), all.end(), wide.random);
        sample.assign(all.begin(), all.begin() + wide.shape.classes);
        std::sort(sample.begin(), sample.end());
        std::vector<float> gradient, inverse_norms;
        for (uint32_t slot = 0; slot < sample.size(); ++slot) {
            inverse_norms.push_back(20.0f + wide.uniform());
            for (uint32_t i = 0; i < d; ++i) {
                gradient.push_back(0.01f * wide.uniform());
            }
        }
        for (RowHead* head : {&wide, &bf16}) {
            head->memory.put(head->arrays.sample, sample);
            head->memory.put(head->arrays.center_inverse_norms, inverse_norms);
            head->memory.put(head->arrays.center_gradient, gradient);
            head->put_block();
        }
    }

    void begin_update(const Accumulated* wide_kept, const Accumulated* bf16_kept) {
        const auto begin = [&](RowHead& head, const Accumulated* kept) {
            const uint32_t* const counts = kept != nullptr ? kept->counts : nullptr;
            head.launch(launch_, "begin_update", 0.05, 1.0, int32_t(0), 0u, counts);
        };
        begin(wide, wide_kept);
        begin(bf16, bf16_kept);
    }

    void end_update() {
        both("advance_history");
        both("end_update");
        updates_ += 1;
    }

    // What the rows in float32 came to, rounded as those of update `updates_`, is what the others hold.
    void check(const char* after) {
        const uint32_t pitch = wide.arrays.master_pitch, d = wide.shape.dim;
        for (int32_t tensor = 0; tensor < wide.tensors(); ++tensor) {
            std::vector<float> expected = wide.get_rows(tensor);
            for (size_t i = 0; bf16.is_bf16(tensor) && i < expected.size(); ++i) {
                const uint32_t column = i % pitch, purpose = tensor == 0 ? 2 : 3;
                if (column < d) {
                    const uint64_t number = wide.arrays.first_class + i / pitch;
                    expected[i] = tensor == 1
                                      ? of_bfloat(bfloat_of(expected[i]))
                                      : at_random(number, updates_, purpose, column, expected[i]);
                }
            }
            const std::vector<float> held = bf16.get_rows(tensor);
            EXPECT(same_bits(held, expected),
                   what + " tensor " + std::to_string(tensor) + " after " + after);
        }
    }

    // What callers and products see of rows that may be behind.
    void check_readers() {
        const uint32_t d = wide.shape.dim;
        for (int32_t tensor = 0; tensor < wide.tensors(); ++tensor) {
            const auto read = [&](RowHead& head) {
                const size_t count = size_t(head.shape.shard_rows) * d;
                const MatrixView out = head.matrix(std::vector<float>(count, NAN), d, kF32);
                head.launch(launch_, "read_rows", tensor, 0u, out);
                return head.memory.get(out.data, 4 * count);
            };
            EXPECT(read(wide) == read(bf16), what + " read_rows");
        }
        both("gather_centers", 0u);
        const auto operand = [](RowHead& head) {
            return head.memory.get(head.arrays.center_operand, head.arrays.plane_centers);
        };
        EXPECT(operand(wide) == operand(bf16), what + " gather_centers");
    }

    std::vector<uint32_t> sample;

  private:
    Launch launch_;
    uint64_t updates_ = 0;
    uint32_t draws_ = 0;

    static Shape float_shape(Shape shape) {
        shape.bf16_weight = shape.bf16_state = false;
        return shape;
    }
};

Accumulated accumulated(RowHead& head) {
    const uint32_t rows = head.shape.shard_rows;
    Accumulated kept;
    kept.gradients = head.memory.make<float>(size_t(rows) * head.shape.dim);
    kept.classes = head.memory.make<uint32_t>(rows);
    kept.places = head.memory.make<uint32_t>(rows);
    kept.squares = head.memory.make<float>(rows);
    kept.counts = head.memory.make<uint32_t>(2);
    head.fill(kept.gradients, size_t(rows) * head.shape.dim, 0.0f);
    head.fill(kept.places, rows, 0u);
    head.fill(kept.counts, 2, 0u);
    return kept;
}

void test_updates(const Shape& shape, const Launch& launch) {
    Pair pair(shape, launch);
    const Accumulated wide_kept = accumulated(pair.wide), bf16_kept = accumulated(pair.bf16);
    const std::vector<float> before = pair.bf16.get_rows(0);
    for (int update = 0; update < 6; ++update) {
        pair.draw();
        pair.check_readers();
        pair.begin_alike();
        const bool accumulates = update % 2 == 1;
        if (accumulates) {
            const auto accumulate = [&](RowHead& head, const Accumulated& kept) {
                head.launch(launch, "place_rows", kept);
                head.launch(launch, "accumulate_rows", kept, 0u, shape.chunk);
            };
            accumulate(pair.wide, wide_kept);
            accumulate(pair.bf16, bf16_kept);
            pair.begin_update(&wide_kept, &bf16_kept);
            pair.wide.launch(launch, "apply_accumulated", wide_kept);
            pair.bf16.launch(launch, "apply_accumulated", bf16_kept);
            pair.wide.launch(launch, "finish_accumulated", wide_kept);
            pair.bf16.launch(launch, "finish_accumulated", bf16_kept);
        } else {
            pair.begin_update(nullptr, nullptr);
            pair.both("update_rows", 0u, shape.chunk);
            const auto squares = [&](RowHead& head) {
                return head.memory.get(head.arrays.center_squares, shape.classes);
            };
            EXPECT(same_bits(squares(pair.wide), squares(pair.bf16)), pair.what + " squares");
        }
        pair.end_update();
        pair.check(accumulates ? "accumulated gradients" : "an update");
        pair.begin_alike();
    }
    EXPECT(!same_bits(before, pair.bf16.get_rows(0)), pair.what + " has moved");
    pair.both("catch_up_rows", ~0ull);
    pair.check("catching up");
    EXPECT(pair.bf16.get_ledger().torn_row == kNone, pair.what);
}

// Start values and what a caller writes: the nearest.
void test_nearest(const Shape& shape, const Launch& launch) {
    Pair pair(shape, launch);
    const uint32_t d = shape.dim;
    pair.both("start_values", 0.05);
    std::vector<float> start = pair.wide.get_rows(0);
    for (float& value : start) {
        value = pair.bf16.is_bf16(0) ? of_bfloat(bfloat_of(value)) : value;
    }
    EXPECT(same_bits(pair.bf16.get_rows(0), start), pair.what + " start_values");
    for (int32_t tensor = 0; tensor < pair.wide.tensors(); ++tensor) {
        std::vector<float> rows(7 * size_t(d));
        for (float& value : rows) {
            value = std::fabs(pair.wide.uniform());
        }
        RowHead& head = pair.bf16;
        head.launch(launch, "write_rows", tensor, 3u, head.matrix(rows, d, kF32));
        const std::vector<float> held = head.get_rows(tensor);
        bool right = true;
        for (size_t i = 0; i < rows.size(); ++i) {
            const float value = head.is_bf16(tensor) ? of_bfloat(bfloat_of(rows[i])) : rows[i];
            right = right && held[(3 + i / d) * head.arrays.master_pitch + i % d] == value;
        }
        EXPECT(right, pair.what + " write_rows " + std::to_string(tensor));
    }
}

// Finite in float32, and no more in bf16: told, by the first such row.
void test_beyond_bf16() {
    Shape shape;
    shape.bf16_weight = shape.bf16_state = true;
    Pair pair(shape, kLaunches[0]);
    pair.draw();
    std::vector<float> rows = pair.bf16.get_rows(1);
    const uint32_t row = pair.sample[9];
    rows[size_t(row) * pair.bf16.arrays.master_pitch + 4] = of_bfloat(0x7f7f);
    pair.bf16.put_rows(1, rows);
    pair.bf16.arrays.optimizer.momentum = 1.003;
    pair.begin_update(nullptr, nullptr);
    pair.bf16.launch(kLaunches[0], "update_rows", 0u, shape.chunk);
    EXPECT(pair.bf16.get_ledger().torn_row == row, "beyond bf16");
}

}  // namespace

int main() {
    unsigned turn = 0;
    for (const uint32_t dim : {3u, 65u, 131u}) {
        for (int kind = 0; kind < 4; ++kind, ++turn) {
            Shape shape;
            shape.dim = dim;
            shape.adamw = kind % 2;
            shape.dense = kind / 2;
            shape.classes = shape.chunk = 128;
            shape.shard_rows = 200;
            // All three mixtures in turn.
            shape.bf16_weight = turn % 3 != 1;
            shape.bf16_state = turn % 3 != 2;
            test_updates(shape, kLaunches[turn % 4]);
            test_nearest(shape, kLaunches[(turn + 1) % 4]);
        }
    }
    test_beyond_bf16();
    return finish();
}
