// The epilogue of the center gradient. A CTA's accumulators hold whole rows of dW^ for a tile of
// classes. It adds the targets' gradient, then does the backward of the normalization and the
// update of the rows, or stores dW^.
//
//   dW^[j] += coef_i (E^[i] - cos W^[j]) for the rows i of the batch whose target is class j, in
//   row order
//   u = W[j] / |W[j]|;  dW[j] = (dW^[j] - (dW^[j] . u) u) / |W[j]| * loss weight / valid rows
//   SGD, AdamW: rule.h
//
// Rows' dot products are added by quad shuffle, then over the eight warps in order, through shared
// memory. W is read twice, for the dot and for the update; the second time it is in the cache.
// It stores dW^ * loss weight / valid rows without the backward of the normalization, in three
// cases. Dense rows lag behind, so that the current row is not in memory here. Rows in bf16 are
// rounded by the kernel that updates them. Replicated ranks add up their dW^ first.
//
// One CTA fills the SM, so that nothing hides this epilogue's latency. It must not wait for one
// value after the other: rows come through the pipeline's memory, see epilogue/row_pipeline.h.
#pragma once

#include "epilogue/row_pipeline.h"
#include "integers.h"
#include "ptx/arithmetic.h"
#include "ptx/atomic.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "rule.h"
#include "shared_structs.h"

namespace epilogue {

// The classes of a tile, in shared memory.
template <int kClasses>
struct Classes {
    uint32_t rows[kClasses];       // of the shard
    float inverse_norms[kClasses];
    uint32_t positives[kClasses];  // or kNone
};

// A tile of classes: its first column in the sample, how many columns exist from there on, and its
// first row in center_gradient.
struct Tile {
    uint32_t column, columns, slot;
    float weight;
};

// dW^ += coef (E^ - cos W^) over the targets of each class. What is left out of E^ lies along W^ and
// would be taken off again; without it the digits stay where the two nearly agree.
template <class Mainloop, int kClasses>
PFC_DEVICE void add_targets(const HeadArrays& head, Mainloop& mainloop,
                            const Classes<kClasses>& classes) {
    const uint32_t rows = head.block->rows, first_computed = head.block->first_computed;
    const uint32_t lane = ptx::lane();
    const uint32_t column = Mainloop::warp_column() + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Mainloop::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t positive = classes.positives[lane / 4 + 16 * i + 8 * h];
            if (positive != kNone) {
                const uint32_t end = head.positive_starts[positive + 1];
#pragma unroll 1
                for (uint32_t at = head.positive_starts[positive]; at < end; ++at) {
                    // Rows of other ranks: not computed here where the head is replicated.
                    const uint32_t row = head.sort_rows[0][at] - first_computed;
                    if (row >= rows) {
                        continue;
                    }
                    const float coefficient = head.coefficients[row];
                    const float* const tangent =
                        head.tangents + uint64_t(row) * head.depth_pitch + column;
#pragma unroll
                    for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
                        if (column + 8 * j < head.depth_pitch) {
                            const ptx::Float2 value =
                                *reinterpret_cast<const ptx::Float2*>(tangent + 8 * j);
                            float* const cells = &mainloop.sum[i][j][2 * h];
                            cells[0] += coefficient * value.x;
                            cells[1] += coefficient * value.y;
                        }
                    }
                }
            }
        }
    }
}

// Adds a row's partial sum over the lanes of a quad, and writes it to partial[warp][class].
template <int kClasses>
PFC_DEVICE void write_partial_sum(float* partial, uint32_t index, float sum) {
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    if (ptx::lane() % 4 == 0) {
        partial[ptx::warp() * kClasses + index] = sum;
    }
}

// Adds the warps' partial sums of class threadIdx.x, in warp order.
template <int kClasses>
PFC_DEVICE float add_partial_sums(const float* partial) {
    float sum = 0.0f;
#pragma unroll
    for (uint32_t warp = 0; warp < 8; ++warp) {
        sum += partial[warp * kClasses + threadIdx.x];
    }
    return sum;
}

// dW^ * loss weight / valid rows to center_gradient.
template <class Mainloop>
PFC_DEVICE void store_gradients(const HeadArrays& head, const Mainloop& mainloop,
                                const Tile& tile) {
    const uint32_t lane = ptx::lane(), dim = head.dim;
    const uint32_t column = Mainloop::warp_column() + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Mainloop::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t index = lane / 4 + 16 * i + 8 * h;
            if (index >= tile.columns) {
                continue;
            }
            float* const row = head.center_gradient + uint64_t(tile.slot + index) * dim + column;
#pragma unroll
            for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
                if (column + 8 * j >= dim) {
                    continue;
                }
                const float* const cells = &mainloop.sum[i][j][2 * h];
                const ptx::Float2 g = {cells[0] * tile.weight, cells[1] * tile.weight};
                float* const to = row + 8 * j;
                // A row has d floats: where d is odd, rows begin at odd addresses too.
                if (dim % 2 == 0) {
                    *reinterpret_cast<ptx::Float2*>(to) = g;
                } else {
                    to[0] = g.x;
                    if (column + 8 * j + 1 < dim) {
                        to[1] = g.y;
                    }
                }
            }
        }
    }
}

// Updates the rows and their state by *rule, in column, and writes center_squares. `scratch` is the
// pipeline's memory: no thread uses it on entry or, after a barrier, on return.
template <bool kAdamw, class Mainloop, int kClasses>
PFC_DEVICE void update_centers(const HeadArrays& head, const Mainloop& mainloop,
                               const Classes<kClasses>& classes, unsigned char* scratch,
                               const Tile& tile) {
    // A unit of work is some of the columns of 8 of the warp's rows.
    constexpr int kTiles = Mainloop::kColumnTiles < 4 ? Mainloop::kColumnTiles : 4;
    constexpr int kUnitsOfRow = Mainloop::kColumnTiles / kTiles;
    constexpr int kUnits = 2 * Mainloop::kRowTiles * kUnitsOfRow;
    static_assert(Mainloop::kWarpM == kClasses && Mainloop::kWarpsN == 8, "whole rows");
    using Window = RowWindow<kTiles>;
    constexpr uint32_t kWindow = Window::kBytes;
    constexpr uint32_t kSums = 4 * (8 * kClasses + kClasses);
    constexpr uint32_t kOwn = (Mainloop::kPipelineBytes - kSums) / 8 / 128 * 128;  // of a warp
    using Centers = RowPipeline<kUnits, (kOwn / kWindow < 4 ? kOwn / kWindow : 4)>;
    constexpr uint32_t kSlot = (kAdamw ? 3 : 2) * kWindow;
    using Rows = RowPipeline<kUnits, (kOwn / kSlot < 4 ? kOwn / kSlot : 4)>;

    float* const partial = reinterpret_cast<float*>(scratch);  // [8][kClasses]
    float* const along = partial + 8 * kClasses;               // [kClasses]
    unsigned char* const own = scratch + round_up(kSums, 128) + ptx::warp() * kOwn;
    static_assert(round_up(kSums, 128) + 8 * kOwn <= Mainloop::kPipelineBytes, "");
    const uint32_t lane = ptx::lane();
    const uint32_t dim = head.dim;

    auto first_of = [](int unit) -> uint32_t { return unit / kUnitsOfRow * 8; };  // class
    auto tile_of = [](int unit) -> int { return unit % kUnitsOfRow * kTiles; };
    // Begins the copies of the unit's columns of a tensor's rows.
    auto load = [&](int unit, unsigned char* window, const float* tensor) {
        const uint32_t begin = Mainloop::warp_column() + 8 * tile_of(unit);
        const uint32_t first = first_of(unit);
        Window::load(window, tensor, tile.columns > first ? tile.columns - first : 0,
                     begin < dim ? dim - begin : 0, [&](uint32_t row) {
                         return uint64_t(classes.rows[first + row]) * head.master_pitch + begin;
                     });
    };
    auto load_centers = [&](int unit, int slot) { load(unit, own + slot * kWindow, head.centers); };
    auto load_rows = [&](int unit, int slot) {
        unsigned char* const window = own + slot * kSlot;
        load(unit, window, head.centers);
        load(unit, window + kWindow, head.momentum);
        if constexpr (kAdamw) {
            load(unit, window + 2 * kWindow, head.second_moment);
        }
    };

    Centers::begin(load_centers);
    float dot = 0.0f;
    Centers::run(load_centers, [&](int unit, int slot) {
        const int row = unit / kUnitsOfRow, i = row / 2, h = row % 2, first = tile_of(unit);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const ptx::Float2 w = Window::lane_values(own + slot * kWindow, j);
            dot += mainloop.sum[i][first + j][2 * h] * w.x;
            dot += mainloop.sum[i][first + j][2 * h + 1] * w.y;
        }
        if (first + kTiles == Mainloop::kColumnTiles) {
            write_partial_sum<kClasses>(partial, first_of(unit) + lane / 4, dot);
            dot = 0.0f;
        }
    });
    Rows::begin(load_rows);
    __syncthreads();
    if (threadIdx.x < kClasses) {
        const float inverse = classes.inverse_norms[threadIdx.x];
        along[threadIdx.x] = add_partial_sums<kClasses>(partial) * inverse * inverse;
    }
    __syncthreads();

    const Rule rule = *head.rule;
    float squares = 0.0f, torn = 0.0f;
    Rows::run(load_rows, [&](int unit, int slot) {
        const int row = unit / kUnitsOfRow, i = row / 2, h = row % 2, first = tile_of(unit);
        const unsigned char* const window = own + slot * kSlot;
        const uint32_t index = first_of(unit) + lane / 4;
        const uint32_t column = Mainloop::warp_column() + 8 * first + 2 * (lane % 4);
        const float subtract = along[index];
        const float factor = classes.inverse_norms[index] * (tile.weight * rule.factor);
        const bool exists = index < tile.columns;
        const uint64_t master = uint64_t(classes.rows[index]) * head.master_pitch + column;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            if (!exists || column + 8 * j >= dim) {
                continue;
            }
            const float* const cells = &mainloop.sum[i][first + j][2 * h];
            ptx::Float2 w = Window::lane_values(window, j);
            ptx::Float2 m = Window::lane_values(window + kWindow, j);
            const ptx::Float2 g = {(cells[0] - subtract * w.x) * factor,
                                   (cells[1] - subtract * w.y) * factor};
            squares += g.x * g.x + g.y * g.y;
            // A row's padding is zero, and stays so.
            if constexpr (kAdamw) {
                ptx::Float2 v = Window::lane_values(window + 2 * kWindow, j);
                rule::adamw(rule, w, m, v, g);
                torn = rule::probe(torn, v);
                *reinterpret_cast<ptx::Float2*>(head.second_moment + master + 8 * j) = v;
            } else {
                rule::sgd(rule, w, m, g);
            }
            torn = rule::probe(rule::probe(torn, w), m);
            *reinterpret_cast<ptx::Float2*>(head.momentum + master + 8 * j) = m;
            *reinterpret_cast<ptx::Float2*>(head.centers + master + 8 * j) = w;
        }
        if (first + kTiles == Mainloop::kColumnTiles) {
            write_partial_sum<kClasses>(partial, index, squares);
            if (torn != 0.0f) {
                ptx::atomic_min(&head.ledger->torn_row, classes.rows[index]);
            }
            squares = torn = 0.0f;
        }
    });
    __syncthreads();
    if (threadIdx.x < kClasses && threadIdx.x < tile.columns) {
        head.center_squares[tile.column + threadIdx.x] = add_partial_sums<kClasses>(partial);
    }
}

}  // namespace epilogue
