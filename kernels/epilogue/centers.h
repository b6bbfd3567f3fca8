// What becomes of the gradients dW^ of a tile of classes, whole rows of it in a CTA's accumulators:
// the targets' part, the backward of the normalisation, and the row's update (or the gradient).
//
//   dW^[j] += coef_i E^[i] for the rows i of the batch whose target is class j, in row order
//   u = W[j] / |W[j]|;  dW[j] = (dW^[j] - (dW^[j] . u) u) / |W[j]| * loss weight / valid rows
//   SGD, AdamW: src/optimizer.rs `StepRule`, each operation rounded by itself as there
//
// Rows' dot products are added by quad shuffle, then over the eight warps in order, through shared
// memory. W is read twice, for the dot and for the update; the second time it is in the cache.
// Dense rows lag behind in memory: their direction u is taken from the operands of this chunk (W^
// of the rows caught up), which the gather has left in center_operand.
//
// Nothing runs beside this on an SM that one CTA fills, so that it must not wait for one value after
// the other: rows come through the pipeline's memory, see epilogue/window.h.
#pragma once

#include "epilogue/planes.h"
#include "epilogue/window.h"
#include "ptx/arithmetic.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "view.h"

namespace epilogue {

enum class Finish {
    kGradient,       // dW to center_gradient
    kDenseGradient,  // the same, with u from center_operand
    kSgd,            // the rows and their state, in place
    kAdamw,
};

// A Finish as a type, for a generic lambda.
template <Finish kFinish>
struct Finishing {
    static constexpr Finish kValue = kFinish;
};

// What the epilogue knows of a tile's classes, in shared memory.
template <int kClasses>
struct Classes {
    uint32_t rows[kClasses];       // of the shard; of a dense head the rows of center_operand
    float inverse_norms[kClasses];
    uint32_t positives[kClasses];  // or kNone
};

// A tile of classes: its first column in the sample, how many columns exist from there on, and its
// place in center_gradient.
struct Tile {
    uint32_t column, columns, slot;
    float weight;
};

PFC_DEVICE void apply_sgd(const Rule& rule, float& w, float& m, float g) {
    m = ptx::add(ptx::multiply(rule.momentum, m), ptx::add(g, ptx::multiply(rule.weight_decay, w)));
    w = ptx::subtract(w, ptx::multiply(rule.learning_rate, m));
}

PFC_DEVICE void apply_adamw(const Rule& rule, float& w, float& m, float& v, float g) {
    m = ptx::add(ptx::multiply(rule.beta1, m), ptx::multiply(rule.rest1, g));
    v = ptx::add(ptx::multiply(rule.beta2, v), ptx::multiply(rule.rest2, ptx::multiply(g, g)));
    const float below = ptx::add(ptx::multiply(ptx::square_root(v), rule.root), rule.epsilon);
    const float moved = ptx::divide(ptx::multiply(rule.rate, m), below);
    w = ptx::subtract(w, ptx::add(ptx::multiply(rule.decay, w), moved));
}

// dW^ += coef E^ over the targets of each class.
template <class Product, int kClasses>
PFC_DEVICE void add_targets(const HeadView& view, Product& product,
                            const Classes<kClasses>& classes) {
    const uint32_t rows = view.block->rows, first_computed = view.block->first_computed;
    const uint32_t lane = ptx::lane();
    const uint32_t place = Product::warp_column() + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t positive = classes.positives[lane / 4 + 16 * i + 8 * h];
            if (positive != kNone) {
                const uint32_t end = view.positive_starts[positive + 1];
#pragma unroll 1
                for (uint32_t at = view.positive_starts[positive]; at < end; ++at) {
                    // Rows of other ranks: not computed here where the head is replicated.
                    const uint32_t row = view.sort_rows[0][at] - first_computed;
                    if (row >= rows) {
                        continue;
                    }
                    const float coefficient = view.coefficients[row];
                    const float* const unit = view.units + uint64_t(row) * view.depth_pitch + place;
#pragma unroll
                    for (int j = 0; j < Product::kColumnTiles; ++j) {
                        if (place + 8 * j < view.depth_pitch) {
                            const Two value = *reinterpret_cast<const Two*>(unit + 8 * j);
                            float* const cells = &product.sum[i][j][2 * h];
                            cells[0] += coefficient * value.x;
                            cells[1] += coefficient * value.y;
                        }
                    }
                }
            }
        }
    }
}

// Adds a row's parts over the lanes of a quad, and leaves the warp's in parts[warp][class].
template <int kClasses>
PFC_DEVICE void share_part(float* parts, uint32_t index, float part) {
    part += ptx::shuffle_xor(part, 1);
    part += ptx::shuffle_xor(part, 2);
    if (ptx::lane() % 4 == 0) {
        parts[ptx::warp() * kClasses + index] = part;
    }
}

// The sum of the warps' parts of class threadIdx.x, in warp order.
template <int kClasses>
PFC_DEVICE float sum_of_parts(const float* parts) {
    float sum = 0.0f;
#pragma unroll
    for (uint32_t warp = 0; warp < 8; ++warp) {
        sum += parts[warp * kClasses + threadIdx.x];
    }
    return sum;
}

// `scratch` is the pipeline's memory, free on entry and on return.
template <Finish kFinish, int kPlanes, class Product, int kClasses>
PFC_DEVICE void finish_centers(const HeadView& view, Product& product,
                               const Classes<kClasses>& classes, unsigned char* scratch,
                               const Tile& tile) {
    constexpr bool kDense = kFinish == Finish::kDenseGradient;
    constexpr bool kUpdates = kFinish == Finish::kSgd || kFinish == Finish::kAdamw;
    // A unit: some of the columns of 8 of the warp's rows.
    constexpr int kTiles = Product::kColumnTiles < 4 ? Product::kColumnTiles : 4;
    constexpr int kUnitsOfRow = Product::kColumnTiles / kTiles;
    constexpr int kUnits = 2 * Product::kRowTiles * kUnitsOfRow;
    static_assert(Product::kWarpM == kClasses && Product::kWarpsN == 8, "whole rows");
    using Floats = Window<float, kTiles>;
    using Operands = Window<uint16_t, kTiles>;
    constexpr uint32_t kDirection = kDense ? kPlanes * Operands::kBytes : Floats::kBytes;
    constexpr uint32_t kState = kFinish == Finish::kAdamw  ? 2 * Floats::kBytes
                                : kFinish == Finish::kSgd ? Floats::kBytes
                                                          : 0;
    constexpr uint32_t kParts = 4 * (8 * kClasses + kClasses);
    constexpr uint32_t kOwn = (Product::kPipelineBytes - kParts) / 8 / 128 * 128;  // a warp's
    using Directions = Ring<kUnits, (kOwn / kDirection < 4 ? kOwn / kDirection : 4)>;
    constexpr uint32_t kSlot = kDirection + kState;
    using Rows = Ring<kUnits, (kOwn / kSlot < 4 ? kOwn / kSlot : 4)>;

    float* const parts = reinterpret_cast<float*>(scratch);  // [8][kClasses]
    float* const along = parts + 8 * kClasses;               // [kClasses]
    unsigned char* const own = scratch + (kParts + 127) / 128 * 128 + ptx::warp() * kOwn;
    static_assert((kParts + 127) / 128 * 128 + 8 * kOwn <= Product::kPipelineBytes, "");
    const uint32_t lane = ptx::lane();
    const uint32_t dim = view.dim;

    auto first_of = [](int unit) -> uint32_t { return unit / kUnitsOfRow * 8; };  // class
    auto tile_of = [](int unit) -> int { return unit % kUnitsOfRow * kTiles; };
    // The unit's part of rows `pitch` values apart, of which `end` count.
    auto load = [&](auto kind, int unit, unsigned char* window, const auto* tensor, uint32_t pitch,
                    uint32_t end) {
        const uint32_t begin = Product::warp_column() + 8 * tile_of(unit);
        const auto* const none = decltype(tensor)(nullptr);
        decltype(kind)::load(window, begin < end ? end - begin : 0, [&](uint32_t row) {
            const uint32_t index = first_of(unit) + row;
            return index < tile.columns ? tensor + uint64_t(classes.rows[index]) * pitch + begin
                                        : none;
        });
    };
    auto load_direction = [&](int unit, unsigned char* window) {
        if constexpr (kDense) {
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) {
                load(Operands(), unit, window + plane * Operands::kBytes,
                     view.center_operand + plane * view.plane_centers, view.depth_pitch,
                     view.depth_pitch);
            }
        } else {
            load(Floats(), unit, window, view.centers, view.master_pitch, dim);
        }
    };
    // What the gradient must be orthogonal to: W, or its direction.
    auto direction = [&](const unsigned char* window, int j) -> Two {
        if constexpr (!kDense) {
            return *reinterpret_cast<const Two*>(Floats::mine(window, j));
        } else if constexpr (kPlanes == 1) {
            const uint32_t two = *reinterpret_cast<const uint32_t*>(Operands::mine(window, j));
            return {ptx::from_half(uint16_t(two)), ptx::from_half(uint16_t(two >> 16))};
        } else {
            Two sum = {0.0f, 0.0f};
#pragma unroll
            for (int plane = 2; plane >= 0; --plane) {
                const uint32_t two = *reinterpret_cast<const uint32_t*>(
                    Operands::mine(window + plane * Operands::kBytes, j));
                sum.x += ptx::from_bfloat(uint16_t(two));
                sum.y += ptx::from_bfloat(uint16_t(two >> 16));
            }
            return sum;
        }
    };
    auto load_rows = [&](int unit, int slot) {
        unsigned char* const window = own + slot * kSlot;
        load_direction(unit, window);
        if constexpr (kUpdates) {
            load(Floats(), unit, window + kDirection, view.momentum, view.master_pitch, dim);
        }
        if constexpr (kFinish == Finish::kAdamw) {
            load(Floats(), unit, window + kDirection + Floats::kBytes, view.second_moment,
                 view.master_pitch, dim);
        }
    };
    auto load_directions = [&](int unit, int slot) {
        load_direction(unit, own + slot * kDirection);
    };

    Directions::begin(load_directions);
    float dot = 0.0f;
    Directions::run(load_directions, [&](int unit, int slot) {
        const int row = unit / kUnitsOfRow, i = row / 2, h = row % 2, first = tile_of(unit);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const Two w = direction(own + slot * kDirection, j);
            dot += product.sum[i][first + j][2 * h] * w.x;
            dot += product.sum[i][first + j][2 * h + 1] * w.y;
        }
        if (first + kTiles == Product::kColumnTiles) {
            share_part<kClasses>(parts, first_of(unit) + lane / 4, dot);
            dot = 0.0f;
        }
    });
    Rows::begin(load_rows);
    __syncthreads();
    if (threadIdx.x < kClasses) {
        const float inverse = classes.inverse_norms[threadIdx.x];
        const float sum = sum_of_parts<kClasses>(parts);
        along[threadIdx.x] = kDense ? sum : sum * inverse * inverse;
    }
    __syncthreads();

    Rule rule;
    if constexpr (kUpdates) {
        rule = *view.rule;
    }
    float squares = 0.0f;
    Rows::run(load_rows, [&](int unit, int slot) {
        const int row = unit / kUnitsOfRow, i = row / 2, h = row % 2, first = tile_of(unit);
        const unsigned char* const window = own + slot * kSlot;
        const uint32_t index = first_of(unit) + lane / 4;
        const uint32_t place = Product::warp_column() + 8 * first + 2 * (lane % 4);
        const float subtract = along[index];
        const float factor = classes.inverse_norms[index] * tile.weight;
        const bool exists = index < tile.columns;
        const uint64_t master = uint64_t(classes.rows[index]) * view.master_pitch + place;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            if (!exists || place + 8 * j >= dim) {
                continue;
            }
            const float* const cells = &product.sum[i][first + j][2 * h];
            Two w = direction(window, j);
            const Two g = {(cells[0] - subtract * w.x) * factor,
                           (cells[1] - subtract * w.y) * factor};
            squares += g.x * g.x + g.y * g.y;
            if constexpr (kUpdates) {
                // A row's padding is zero, and stays so.
                const unsigned char* const state = window + kDirection;
                Two m = *reinterpret_cast<const Two*>(Floats::mine(state, j));
                if constexpr (kFinish == Finish::kSgd) {
                    apply_sgd(rule, w.x, m.x, g.x);
                    apply_sgd(rule, w.y, m.y, g.y);
                } else {
                    Two v =
                        *reinterpret_cast<const Two*>(Floats::mine(state + Floats::kBytes, j));
                    apply_adamw(rule, w.x, m.x, v.x, g.x);
                    apply_adamw(rule, w.y, m.y, v.y, g.y);
                    *reinterpret_cast<Two*>(view.second_moment + master + 8 * j) = v;
                }
                *reinterpret_cast<Two*>(view.momentum + master + 8 * j) = m;
                *reinterpret_cast<Two*>(view.centers + master + 8 * j) = w;
            } else {
                // Rows of d floats, at no even address where d is odd.
                const uint32_t at = place + 8 * j;
                float* const to =
                    view.center_gradient + uint64_t(tile.slot + index) * dim + at;
                if (dim % 2 == 0) {
                    *reinterpret_cast<Two*>(to) = g;
                } else {
                    to[0] = g.x;
                    if (at + 1 < dim) {
                        to[1] = g.y;
                    }
                }
            }
        }
        if constexpr (kUpdates) {
            if (first + kTiles == Product::kColumnTiles) {
                share_part<kClasses>(parts, index, squares);
                squares = 0.0f;
            }
        }
    });
    __syncthreads();
    if constexpr (kUpdates) {
        if (threadIdx.x < kClasses && threadIdx.x < tile.columns) {
            view.center_squares[tile.column + threadIdx.x] = sum_of_parts<kClasses>(parts);
        }
        __syncthreads();
    }
}

}  // namespace epilogue
