// A head's arrays for tests of the row kernels, filled by plain code: labels, a sample, rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../../kernels/shared_structs.h"
#include "harness.h"

// A check that says which case it is of.
#define EXPECT(condition, what)                                                         \
    do {                                                                                \
        if (!(condition)) {                                                             \
            ++failures;                                                                 \
            fprintf(stderr, "%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #condition, \
                    std::string(what).c_str());                                         \
        }                                                                               \
    } while (0)

// Device memory that lives as long as a case. Never written until a case writes it, so that a
// kernel that reads what nobody wrote is found.
class DeviceMemory {
  public:
    DeviceMemory() = default;
    DeviceMemory(const DeviceMemory&) = delete;
    ~DeviceMemory() {
        for (CUdeviceptr at : arrays_) {
            cuMemFree_v2(at);
        }
    }

    template <class T>
    T* make(size_t count) {
        module();
        CUdeviceptr at = 0;
        MUST(cuMemAlloc_v2(&at, count * sizeof(T)));
        arrays_.push_back(at);
        return reinterpret_cast<T*>(at);
    }

    template <class T>
    void put(T* at, const std::vector<T>& values) {
        upload(at, values);
    }

    template <class T>
    std::vector<T> get(const T* at, size_t count) {
        return download(at, count);
    }

    template <class... A>
    void launch(const char* name, unsigned grid, unsigned block, unsigned shared,
                const A&... arguments) {
        ::launch(name, grid, block, shared, arguments...);
    }

  private:
    std::vector<CUdeviceptr> arrays_;
};

struct Launch {
    unsigned grid, block;
};
const Launch kLaunches[] = {{3, 256}, {1, 32}, {12, 96}, {4, 224}};
constexpr unsigned kSharedBytes = 1024;  // enough for every kernel of these

struct Shape {
    uint32_t dim = 65;
    bool sharded = true, split = false, adamw = false, dense = false;
    bool bf16_weight = false, bf16_state = false;
    int32_t gather = kF32;
    uint32_t ranks = 3, rank = 1, max_batch = 40, shard_rows = 300, classes = 200, chunk = 128;
    uint32_t splits = 2, history = 16;

    std::string text() const {
        return "d " + std::to_string(dim) + (sharded ? " sharded" : " replicated") +
               (split ? " split" : " half") + (adamw ? " adamw" : " sgd") +
               (dense ? " dense" : " lazy") + " gather " + std::to_string(gather) +
               (bf16_weight ? " W in bf16" : "") + (bf16_state ? " state in bf16" : "");
    }
};

inline uint32_t up(uint32_t value, uint32_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// 16-bit values by the compiler's own conversions, and by hand.
inline uint16_t half_of(float value) {
    const _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline float of_half(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}
inline uint16_t bfloat_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float of_bfloat(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
inline float rounded(float value, int32_t dtype) {
    return dtype == kF32   ? value
           : dtype == kF16 ? of_half(half_of(value))
                           : of_bfloat(bfloat_of(value));
}
inline size_t size_of(int32_t dtype) { return dtype == kF32 ? 4 : 2; }

// Values as `dtype`, rows `stride` elements apart.
inline std::vector<uint8_t> packed(const std::vector<float>& values, uint32_t dim, uint32_t stride,
                                   int32_t dtype) {
    const size_t rows = values.size() / dim;
    std::vector<uint8_t> bytes(rows * stride * size_of(dtype), 0xff);
    for (size_t i = 0; i < values.size(); ++i) {
        const size_t at = (i / dim * stride + i % dim) * size_of(dtype);
        const uint16_t narrow = dtype == kF16 ? half_of(values[i]) : bfloat_of(values[i]);
        if (dtype == kF32) {
            std::memcpy(&bytes[at], &values[i], 4);
        } else {
            std::memcpy(&bytes[at], &narrow, 2);
        }
    }
    return bytes;
}
inline float element(const std::vector<uint8_t>& bytes, size_t index, int32_t dtype) {
    float value;
    uint16_t narrow;
    if (dtype == kF32) {
        std::memcpy(&value, &bytes[4 * index], 4);
        return value;
    }
    std::memcpy(&narrow, &bytes[2 * index], 2);
    return dtype == kF16 ? of_half(narrow) : of_bfloat(narrow);
}

inline bool close(double value, double truth, double relative, double floor = 1e-30) {
    return std::fabs(value - truth) <= relative * std::fabs(truth) + floor;
}

// As start_values leaves it.
inline Ledger ledger_at_start() {
    Ledger ledger{};
    ledger.torn_row = kNone;
    return ledger;
}

class RowHead {
  public:
    DeviceMemory memory;
    HeadArrays arrays{};
    Shape shape;
    StepBlock block{};
    Ledger ledger = ledger_at_start();
    std::mt19937 random;
    std::vector<uint32_t> batches;
    std::vector<int64_t> labels;
    std::vector<uint32_t> origins, sample, columns;
    std::vector<float> w, m, v;  // [shard_rows][master_pitch]

    explicit RowHead(const Shape& shape, uint32_t seed = 1) : shape(shape), random(seed) {
        const uint32_t d = shape.dim;
        arrays.ranks = shape.ranks;
        arrays.rank = shape.rank;
        arrays.max_batch = shape.max_batch;
        arrays.label_capacity = shape.ranks * shape.max_batch;
        arrays.row_capacity = up(shape.sharded ? arrays.label_capacity : shape.max_batch, 128);
        arrays.dim = d;
        arrays.depth_pitch = up(d, 64);
        arrays.master_pitch = up(d, 4);
        arrays.shard_rows = shape.shard_rows;
        arrays.sample_capacity = up(shape.classes, 128);
        arrays.chunk_capacity = shape.chunk;
        arrays.column_tiles = arrays.sample_capacity / 128;
        arrays.splits = shape.splits;
        arrays.history_capacity = shape.history;
        arrays.sharded = shape.sharded;
        arrays.split_operands = shape.split;
        arrays.gather_dtype = shape.gather;
        arrays.ignore_label = -1;
        arrays.first_class = 1000;
        arrays.num_classes = 5000;
        arrays.plane_rows = uint64_t(arrays.row_capacity) * arrays.depth_pitch;
        arrays.plane_centers = uint64_t(arrays.chunk_capacity) * arrays.depth_pitch;
        arrays.margin = MarginSettings{64.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0, 0};
        arrays.optimizer = shape.adamw
                               ? OptimizerSettings{0, 0.01, 0.9, 0.999, 1e-8, 161, 1, shape.dense}
                               : OptimizerSettings{0.9, 5e-4, 0, 0, 0, 0, 0, shape.dense};
        static uint64_t made = 0;
        simt_seed(++made);  // another order of blocks and threads for each case
        allocate();
        draw_step();
        draw_rows();
    }

    float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random); }

    template <class... A>
    void launch(const Launch& launch, const char* name, const A&... parameters) {
        memory.launch(name, launch.grid, launch.block, kSharedBytes, arrays, parameters...);
    }

    template <class T>
    void fill(T* array, size_t count, T value) {
        memory.put(array, std::vector<T>(count, value));
    }

    void put_block() { memory.put(arrays.block, std::vector<StepBlock>{block}); }
    void put_ledger() { memory.put(arrays.ledger, std::vector<Ledger>{ledger}); }
    StepBlock get_block() { return memory.get(arrays.block, 1)[0]; }
    Ledger get_ledger() { return memory.get(arrays.ledger, 1)[0]; }

    // W, momentum and for AdamW the second moment, by number.
    int32_t tensors() const { return shape.adamw ? 3 : 2; }
    bool is_bf16(int32_t tensor) const { return tensor == 0 ? shape.bf16_weight : shape.bf16_state; }
    float** float_rows(int32_t tensor) {
        return tensor == 0 ? &arrays.centers : tensor == 1 ? &arrays.momentum : &arrays.second_moment;
    }
    uint16_t** bf16_rows(int32_t tensor) {
        return tensor == 0   ? &arrays.centers_bf16
               : tensor == 1 ? &arrays.momentum_bf16
                             : &arrays.second_moment_bf16;
    }

    // A tensor as it is stored, [shard_rows][master_pitch]; given to the nearest.
    std::vector<float> get_rows(int32_t tensor) {
        const size_t count = size_t(shape.shard_rows) * arrays.master_pitch;
        if (!is_bf16(tensor)) {
            return memory.get(*float_rows(tensor), count);
        }
        std::vector<float> values;
        for (const uint16_t bits : memory.get(*bf16_rows(tensor), count)) {
            values.push_back(of_bfloat(bits));
        }
        return values;
    }
    void put_rows(int32_t tensor, const std::vector<float>& values) {
        if (!is_bf16(tensor)) {
            memory.put(*float_rows(tensor), values);
            return;
        }
        std::vector<uint16_t> bits;
        for (const float value : values) {
            bits.push_back(bfloat_of(value));
        }
        memory.put(*bf16_rows(tensor), bits);
    }

    // Global row of row i.
    uint32_t global(uint32_t row) const { return block.first_computed + row; }
    bool ignored(uint32_t row) const { return labels[global(row)] == arrays.ignore_label; }

    MatrixView matrix(const std::vector<float>& values, uint32_t stride, int32_t dtype) {
        const std::vector<uint8_t> bytes = packed(values, shape.dim, stride, dtype);
        // The caller's memory need not be aligned to more than its elements.
        uint8_t* data = memory.make<uint8_t>(bytes.size() + 16) + size_of(dtype);
        memory.put(data, bytes);
        return MatrixView{data, values.size() / shape.dim, shape.dim, stride, dtype, 0};
    }

    // Rows may have margins and weights of their own.
    void allow_terms() {
        arrays.terms = memory.make<float>(3 * arrays.row_capacity);
        arrays.angles = memory.make<double>(arrays.row_capacity);
        arrays.margin_gradients = memory.make<float>(2 * arrays.row_capacity);
        arrays.sums = memory.make<float>(6 * arrays.label_capacity + kTotals);
    }

  private:
    void allocate() {
        const uint32_t d = shape.dim;
        const size_t places = arrays.label_capacity, rows = arrays.row_capacity;
        const size_t columns = arrays.sample_capacity, pitch = arrays.depth_pitch;
        const size_t centers = size_t(shape.shard_rows) * arrays.master_pitch;
        arrays.block = memory.make<StepBlock>(1);
        arrays.ledger = memory.make<Ledger>(1);
        arrays.labels = memory.make<int64_t>(places);
        arrays.origins = memory.make<uint32_t>(places);
        arrays.sample = memory.make<uint32_t>(columns);
        arrays.columns = memory.make<uint32_t>(places);
        arrays.embeddings_send = memory.make<uint8_t>(size_t(shape.max_batch) * d * 4);
        arrays.embeddings_recv = memory.make<uint8_t>(places * d * 4);
        const bool scaled = shape.sharded && shape.gather == kF16;
        arrays.send_scales = scaled ? memory.make<float>(shape.max_batch) : nullptr;
        arrays.units = memory.make<float>(rows * pitch);
        arrays.tangents = memory.make<float>(rows * pitch);
        arrays.unit_operand = memory.make<uint16_t>(3 * rows * pitch);
        arrays.scaled_operand = memory.make<uint16_t>(3 * rows * pitch);
        for (float** array :
             {&arrays.inverse_norms, &arrays.target_logits, &arrays.target_cosines,
              &arrays.derivatives,
              &arrays.coefficients, &arrays.factors, &arrays.row_sums, &arrays.best_negatives}) {
            *array = memory.make<float>(rows);
        }
        arrays.row_losses = memory.make<double>(rows);
        arrays.partial_sums = memory.make<float>(arrays.column_tiles * rows);
        arrays.partial_best = memory.make<float>(arrays.column_tiles * rows);
        arrays.center_operand = memory.make<uint16_t>(3 * arrays.plane_centers);
        arrays.center_wide = memory.make<uint16_t>(arrays.plane_centers);
        arrays.center_inverse_norms = memory.make<float>(columns);
        arrays.weighted_centers = memory.make<float>(arrays.splits * rows * pitch);
        arrays.sums = memory.make<float>(2 * places + kTotals);
        arrays.replicated_sums = memory.make<double>(kTotals + kSlot * arrays.ranks);
        arrays.gradient_send = memory.make<float>(places * d);
        arrays.gradient_recv = memory.make<float>(size_t(shape.max_batch) * d);
        arrays.center_gradient = memory.make<float>(columns * d);
        arrays.squares = memory.make<float>(rows);
        arrays.center_squares = memory.make<float>(columns);
        for (int32_t tensor = 0; tensor < tensors(); ++tensor) {
            if (is_bf16(tensor)) {
                *bf16_rows(tensor) = memory.make<uint16_t>(centers);
            } else {
                *float_rows(tensor) = memory.make<float>(centers);
            }
        }
        arrays.last_update = shape.dense ? memory.make<uint32_t>(shape.shard_rows) : nullptr;
        arrays.rule = memory.make<Rule>(1);
        arrays.missed_updates = memory.make<MissedUpdates>(arrays.history_capacity);
        memory.put(arrays.missed_updates, std::vector<MissedUpdates>(arrays.history_capacity));
        if (shape.dense) {
            fill(arrays.last_update, shape.shard_rows, 0u);
        }
    }

    // Batches that are not full, targets here, in other shards, outside the sample, and ignored.
    void draw_step() {
        for (uint32_t rank = 0; rank < arrays.ranks; ++rank) {
            batches.push_back(arrays.max_batch - (rank * 7 + 3) % arrays.max_batch);
            for (uint32_t i = 0; i < batches.back(); ++i) {
                origins.push_back(rank * arrays.max_batch + i);
            }
        }
        std::vector<uint32_t> all(shape.shard_rows);
        for (uint32_t i = 0; i < all.size(); ++i) {
            all[i] = i;
        }
        std::shuffle(all.begin(), all.end(), random);
        sample.assign(all.begin(), all.begin() + shape.classes);
        std::sort(sample.begin(), sample.end());
        for (uint32_t i = 0; i < origins.size(); ++i) {
            const uint32_t column = random() % shape.classes;
            const uint32_t kind = i == 2 ? 1 : i == 3 ? 0 : random() % 8;
            columns.push_back(kind < 2 ? kNone : column);
            labels.push_back(kind == 1   ? arrays.ignore_label
                             : kind == 0 ? 7
                                         : int64_t(arrays.first_class) + sample[column]);
        }
        block.global_rows = uint32_t(origins.size());
        block.own_rows = batches[arrays.rank];
        uint32_t before = 0;
        for (uint32_t rank = 0; rank < arrays.rank; ++rank) {
            before += batches[rank];
        }
        block.rows = shape.sharded ? block.global_rows : block.own_rows;
        block.first_computed = shape.sharded ? 0 : before;
        block.first_own = shape.sharded ? before : 0;
        block.classes = shape.classes;
        block.bad_row = kNone;
        for (uint32_t row = 0; row < block.rows; ++row) {
            block.own_valid_rows += ignored(row) ? 0 : 1;
        }
        memory.put(arrays.labels, labels);
        memory.put(arrays.origins, origins);
        memory.put(arrays.columns, columns);
        memory.put(arrays.sample, sample);
        put_block();
        put_ledger();
    }

    void draw_rows() {
        const size_t count = size_t(shape.shard_rows) * arrays.master_pitch;
        for (size_t i = 0; i < count; ++i) {
            w.push_back(i % arrays.master_pitch < shape.dim ? 0.05f * uniform() : 0.0f);
        }
        m.assign(count, 0.0f);
        v.assign(count, 0.0f);
        const std::vector<float>* const all[] = {&w, &m, &v};
        for (int32_t tensor = 0; tensor < tensors(); ++tensor) {
            put_rows(tensor, *all[tensor]);
        }
    }
};
