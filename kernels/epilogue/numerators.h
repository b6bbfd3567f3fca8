// The epilogue of the numerators. It turns a tile of cosines into exponentials, row sums, largest
// negatives, and P in bf16.
//
// p = exp(scale cos - c) = 2^(cos scale log2(e) - c log2(e)), one fused multiply-add and one ex2 an
// element. |scale cos| <= scale bounds it, so that no running maximum is needed; a row that is far
// from all its negatives has an offset of its own in place of c (far.h). p is 0 and outside
// the sum for a row's target, columns beyond the sample, ignored rows and rows beyond the batch. A
// negative above the filter counts as cosine 0 in the sum and is stored as 0. The sum takes p
// before it is rounded.
#pragma once

#include "epilogue/planes.h"
#include "far.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "tile/numerators.h"
#include "shared_structs.h"

namespace epilogue {

// The columns of a tile that count in a row: those below `limit`, but not `target`.
struct alignas(4) RowMask {
    uint16_t target;  // column of the tile, or kNoTarget
    uint16_t limit;
};

constexpr uint16_t kNoTarget = 0xffff;

// The mask of row `row` in a tile that begins at column `column` and of which `columns` exist.
PFC_DEVICE RowMask row_mask(const HeadArrays& head, uint32_t row, uint32_t column,
                            uint32_t columns) {
    const StepBlock& block = *head.block;
    if (row >= block.rows || head.target_cosines[row] == kIgnored) {
        return {kNoTarget, 0};
    }
    const uint32_t target = head.columns[row + block.first_computed];
    const bool within = target >= column && target - column < kTileColumns;
    return {within ? uint16_t(target - column) : kNoTarget,
            uint16_t(columns < kTileColumns ? columns : kTileColumns)};
}

// In shared memory from the kernel's beginning: that saves the mainloop four registers.
struct Softmax {
    float slope, shift;   // exponent of 2 = cosine * slope + shift
    float filter, floor;  // a cosine above filter adds floor
};

// Shared memory beside the pipeline.
template <int kRows>
struct BesidePipeline {
    RowMask masks[kRows];
    Softmax softmax;
};

PFC_DEVICE Softmax softmax_of(const MarginSettings& margin) {
    Softmax softmax;
    softmax.slope = float(margin.scale * far::kLog2E);
    softmax.shift = far::common_shift(margin);
    softmax.filter = margin.filter > 0.0 ? float(margin.filter) : INFINITY;
    softmax.floor = ptx::exp2_approximate(softmax.shift);
    return softmax;
}

// What the warps have of the rows, in the pipeline's memory, which the epilogue owns from the end of
// the mainloop to its own last barrier.
template <class Mainloop>
struct RowSums {
    static constexpr uint32_t kRows = Mainloop::kM, kWarps = Mainloop::kWarpsN;
    float sums[kWarps][kRows];
    float best[kWarps][kRows];
};

// Turns the cosines in the accumulators into p, and writes P: the tile at `row` and at column `local`
// of the chunk. A thread's accumulators of four column tiles are neighbors (tile::mixed_row), so that
// P leaves from registers in vectors of 16 bytes, and a quad writes two whole sectors. Each warp's
// sum and maximum of a row go to `found`. `shifts`: with kOwnOffsets those of the tile's rows.
template <bool kOwnOffsets, int kPlanes, class Mainloop>
PFC_DEVICE void write_numerators(const HeadArrays& head, Mainloop& mainloop,
                                 RowSums<Mainloop>& found,
                                 const BesidePipeline<Mainloop::kM>& beside, const float* shifts,
                                 uint32_t row, uint32_t local) {
    constexpr int kTilesOfVector = tile::kMixedRows / 8;
    static_assert(Mainloop::kM == tile::Numerators::kRows, "tiles of P side by side");
    static_assert(Mainloop::kWarpN % tile::kMixedRows == 0, "");
    const Softmax softmax = beside.softmax;
    const uint32_t lane = ptx::lane();
    const uint32_t warp_row = Mainloop::warp_row() + lane / 4;
    const uint32_t warp_column = Mainloop::warp_column() + tile::kVector * (lane % 4);
    uint16_t* const out =
        head.numerators +
        tile::Numerators::at(row + warp_row, local + warp_column, head.chunk_capacity);
#pragma unroll
    for (int i = 0; i < Mainloop::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t at = warp_row + 16 * i + 8 * h;
            // Row by row: the compiler would keep values of all rows in registers.
            ptx::sync_warp();
            // Relative to the thread's first column, so that its columns are constants.
            const RowMask mask = beside.masks[at];
            const uint32_t target = mask.target - warp_column;
            const int32_t limit = int32_t(mask.limit) - int32_t(warp_column);
            const float shift = kOwnOffsets ? shifts[at] : softmax.shift;
            float row_sum = 0.0f, row_best = kElsewhere;
#pragma unroll
            for (int first = 0; first < Mainloop::kColumnTiles; first += kTilesOfVector) {
#pragma unroll
                for (int j = first; j < first + kTilesOfVector; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& cell = mainloop.sum[i][j][2 * h + e];
                        const int column = 8 * first + 2 * (j - first) + e;
                        const bool keep = column < limit && uint32_t(column) != target;
                        const float cosine = cell;
                        const float power =
                            ptx::exp2_approximate(fmaf(cosine, softmax.slope, shift));
                        const bool filtered = cosine > softmax.filter;
                        cell = keep && !filtered ? power : 0.0f;
                        row_sum += keep ? (filtered ? softmax.floor : power) : 0.0f;
                        row_best = keep && cosine > row_best ? cosine : row_best;
                    }
                }
                const uint64_t place =
                    uint64_t(16 * i + 8 * h) * tile::Numerators::kColumns + 8 * first;
#pragma unroll
                for (int plane = 0; plane < kPlanes; ++plane) {
                    uint32_t words[kTilesOfVector];
#pragma unroll
                    for (int j = 0; j < kTilesOfVector; ++j) {
                        float* const cells = &mainloop.sum[i][first + j][2 * h];
                        words[j] = take_plane(cells[0], cells[1]);
                    }
                    *reinterpret_cast<ptx::Word4*>(out + plane * head.plane_numerators + place) = {
                        words[0], words[1], words[2], words[3]};
                }
            }
#pragma unroll
            for (int across = 1; across <= 2; across *= 2) {
                row_sum += ptx::shuffle_xor(row_sum, across);
                const float other = ptx::shuffle_xor(row_best, across);
                row_best = other > row_best ? other : row_best;
            }
            if (lane % 4 == 0) {
                const uint32_t warp = Mainloop::warp_column() / Mainloop::kWarpN;
                found.sums[warp][at] = row_sum;
                found.best[warp][at] = row_best;
            }
        }
    }
}

// Adds up what the warps have of each row, for the tile at `row` and at column `column` of the sample.
template <class Mainloop>
PFC_DEVICE void write_row_sums(const HeadArrays& head, const RowSums<Mainloop>& found, uint32_t row,
                               uint32_t column) {
    for (uint32_t at = threadIdx.x; at < RowSums<Mainloop>::kRows; at += Mainloop::kThreads) {
        float row_sum = 0.0f, row_best = kElsewhere;
#pragma unroll
        for (uint32_t warp = 0; warp < RowSums<Mainloop>::kWarps; ++warp) {
            row_sum += found.sums[warp][at];
            const float other = found.best[warp][at];
            row_best = other > row_best ? other : row_best;
        }
        const uint64_t to = uint64_t(column / kTileColumns) * head.row_capacity + row + at;
        head.partial_sums[to] = row_sum;
        head.partial_best[to] = row_best;
    }
}

}  // namespace epilogue
