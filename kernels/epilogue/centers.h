// What becomes of the gradients dW^ of a tile of classes, whole rows of it in a CTA's accumulators:
// the targets' part, then the backward of the normalisation and the row's update; or dW^ is stored.
//
//   dW^[j] += coef_i E^[i] for the rows i of the batch whose target is class j, in row order
//   u = W[j] / |W[j]|;  dW[j] = (dW^[j] - (dW^[j] . u) u) / |W[j]| * loss weight / valid rows
//   SGD, AdamW: rule.h
//
// Rows' dot products are added by quad shuffle, then over the eight warps in order, through shared
// memory. W is read twice, for the dot and for the update; the second time it is in the cache.
// Stored is dW^ * loss weight / valid rows: who reads it knows the row, which is not in memory here
// where dense rows lag behind, and which other ranks add to before the normalisation where the head
// is replicated.
//
// Nothing runs beside this on an SM that one CTA fills, so that it must not wait for one value after
// the other: rows come through the pipeline's memory, see epilogue/window.h.
#pragma once

#include "epilogue/planes.h"
#include "epilogue/window.h"
#include "ptx/arithmetic.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "rule.h"
#include "view.h"

namespace epilogue {

// What the epilogue knows of a tile's classes, in shared memory.
template <int kClasses>
struct Classes {
    uint32_t rows[kClasses];       // of the shard
    float inverse_norms[kClasses];
    uint32_t positives[kClasses];  // or kNone
};

// A tile of classes: its first column in the sample, how many columns exist from there on, and its
// place in center_gradient.
struct Tile {
    uint32_t column, columns, slot;
    float weight;
};

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

// dW^ * loss weight / valid rows to center_gradient.
template <class Product>
PFC_DEVICE void store_gradients(const HeadView& view, const Product& product, const Tile& tile) {
    const uint32_t lane = ptx::lane(), dim = view.dim;
    const uint32_t place = Product::warp_column() + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t index = lane / 4 + 16 * i + 8 * h;
            if (index >= tile.columns) {
                continue;
            }
            float* const row = view.center_gradient + uint64_t(tile.slot + index) * dim + place;
#pragma unroll
            for (int j = 0; j < Product::kColumnTiles; ++j) {
                if (place + 8 * j >= dim) {
                    continue;
                }
                const float* const cells = &product.sum[i][j][2 * h];
                const Two g = {cells[0] * tile.weight, cells[1] * tile.weight};
                float* const to = row + 8 * j;
                // Rows of d floats, at no even address where d is odd.
                if (dim % 2 == 0) {
                    *reinterpret_cast<Two*>(to) = g;
                } else {
                    to[0] = g.x;
                    if (place + 8 * j + 1 < dim) {
                        to[1] = g.y;
                    }
                }
            }
        }
    }
}

// The rows and their state by *rule, in place, and center_squares. `scratch` is the pipeline's
// memory, free on entry and, after a barrier, on return.
template <bool kAdamw, class Product, int kClasses>
PFC_DEVICE void update_centers(const HeadView& view, const Product& product,
                               const Classes<kClasses>& classes, unsigned char* scratch,
                               const Tile& tile) {
    // A unit: some of the columns of 8 of the warp's rows.
    constexpr int kTiles = Product::kColumnTiles < 4 ? Product::kColumnTiles : 4;
    constexpr int kUnitsOfRow = Product::kColumnTiles / kTiles;
    constexpr int kUnits = 2 * Product::kRowTiles * kUnitsOfRow;
    static_assert(Product::kWarpM == kClasses && Product::kWarpsN == 8, "whole rows");
    using Part = Window<kTiles>;
    constexpr uint32_t kWindow = Part::kBytes;
    constexpr uint32_t kParts = 4 * (8 * kClasses + kClasses);
    constexpr uint32_t kOwn = (Product::kPipelineBytes - kParts) / 8 / 128 * 128;  // a warp's
    using Centers = Ring<kUnits, (kOwn / kWindow < 4 ? kOwn / kWindow : 4)>;
    constexpr uint32_t kSlot = (kAdamw ? 3 : 2) * kWindow;
    using Rows = Ring<kUnits, (kOwn / kSlot < 4 ? kOwn / kSlot : 4)>;

    float* const parts = reinterpret_cast<float*>(scratch);  // [8][kClasses]
    float* const along = parts + 8 * kClasses;               // [kClasses]
    unsigned char* const own = scratch + (kParts + 127) / 128 * 128 + ptx::warp() * kOwn;
    static_assert((kParts + 127) / 128 * 128 + 8 * kOwn <= Product::kPipelineBytes, "");
    const uint32_t lane = ptx::lane();
    const uint32_t dim = view.dim;

    auto first_of = [](int unit) -> uint32_t { return unit / kUnitsOfRow * 8; };  // class
    auto tile_of = [](int unit) -> int { return unit % kUnitsOfRow * kTiles; };
    // The unit's part of a tensor's rows.
    auto load = [&](int unit, unsigned char* window, const float* tensor) {
        const uint32_t begin = Product::warp_column() + 8 * tile_of(unit);
        Part::load(window, begin < dim ? dim - begin : 0, [&](uint32_t row) -> const float* {
            const uint32_t index = first_of(unit) + row;
            return index < tile.columns
                       ? tensor + uint64_t(classes.rows[index]) * view.master_pitch + begin
                       : nullptr;
        });
    };
    auto load_centers = [&](int unit, int slot) { load(unit, own + slot * kWindow, view.centers); };
    auto load_rows = [&](int unit, int slot) {
        unsigned char* const window = own + slot * kSlot;
        load(unit, window, view.centers);
        load(unit, window + kWindow, view.momentum);
        if constexpr (kAdamw) {
            load(unit, window + 2 * kWindow, view.second_moment);
        }
    };

    Centers::begin(load_centers);
    float dot = 0.0f;
    Centers::run(load_centers, [&](int unit, int slot) {
        const int row = unit / kUnitsOfRow, i = row / 2, h = row % 2, first = tile_of(unit);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const Two w = Part::mine(own + slot * kWindow, j);
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
        along[threadIdx.x] = sum_of_parts<kClasses>(parts) * inverse * inverse;
    }
    __syncthreads();

    const Rule step = *view.rule;
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
            Two w = Part::mine(window, j), m = Part::mine(window + kWindow, j);
            const Two g = {(cells[0] - subtract * w.x) * factor,
                           (cells[1] - subtract * w.y) * factor};
            squares += g.x * g.x + g.y * g.y;
            // A row's padding is zero, and stays so.
            if constexpr (kAdamw) {
                Two v = Part::mine(window + 2 * kWindow, j);
                rule::adamw(step, w.x, m.x, v.x, g.x);
                rule::adamw(step, w.y, m.y, v.y, g.y);
                *reinterpret_cast<Two*>(view.second_moment + master + 8 * j) = v;
            } else {
                rule::sgd(step, w.x, m.x, g.x);
                rule::sgd(step, w.y, m.y, g.y);
            }
            *reinterpret_cast<Two*>(view.momentum + master + 8 * j) = m;
            *reinterpret_cast<Two*>(view.centers + master + 8 * j) = w;
        }
        if (first + kTiles == Product::kColumnTiles) {
            share_part<kClasses>(parts, index, squares);
            squares = 0.0f;
        }
    });
    __syncthreads();
    if (threadIdx.x < kClasses && threadIdx.x < tile.columns) {
        view.center_squares[tile.column + threadIdx.x] = sum_of_parts<kClasses>(parts);
    }
}

}  // namespace epilogue
