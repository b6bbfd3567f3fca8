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

// How the epilogue divides the pipeline's memory, which it owns from the end of the mainloop to its
// own last barrier.
template <class Mainloop>
struct NumeratorScratch {
    static constexpr uint32_t kRows = Mainloop::kM, kColumns = Mainloop::kN;
    static constexpr uint32_t kWarps = Mainloop::kWarpsN;
    using Stage = tile::Layout<kRows, kColumns>;
    static_assert(Stage::kBytes + 4 * kRows * 2 * kWarps <= Mainloop::kPipelineBytes, "");

    // Takes one plane from two of a thread's accumulators; see Mainloop::sum.
    static PFC_DEVICE void stage(Mainloop& mainloop, unsigned char* scratch, int i, int h, int j) {
        const uint32_t lane = ptx::lane();
        const uint32_t at = Stage::at(Mainloop::warp_row() + lane / 4,
                                      (Mainloop::warp_column() + 8 * j) / tile::kVector) +
                            (16 * i + 8 * h) * Stage::kRowBytes;
        float* const cells = &mainloop.sum[i][j][2 * h];
        *reinterpret_cast<uint32_t*>(scratch + at + 4 * (lane % 4)) =
            take_plane(cells[0], cells[1]);
    }

    static PFC_DEVICE float* sums(unsigned char* scratch) {  // [kWarps][kRows]
        return reinterpret_cast<float*>(scratch + Stage::kBytes);
    }
    static PFC_DEVICE float* best(unsigned char* scratch) {  // [kWarps][kRows]
        return sums(scratch) + kWarps * kRows;
    }
};

// Turns the cosines in the accumulators into p. The first plane of p goes to shared memory, and so
// do each warp's sum and maximum of a row. `shifts`: with kOwnOffsets those of the tile's rows.
template <bool kOwnOffsets, class Mainloop>
PFC_DEVICE void exponentiate(Mainloop& mainloop, unsigned char* scratch,
                             const BesidePipeline<Mainloop::kM>& beside, const float* shifts) {
    using Scratch = NumeratorScratch<Mainloop>;
    float* const sums = Scratch::sums(scratch);
    float* const best = Scratch::best(scratch);
    const Softmax softmax = beside.softmax;
    const uint32_t lane = ptx::lane();
    const uint32_t warp_row = Mainloop::warp_row() + lane / 4;
    const uint32_t warp_column = Mainloop::warp_column() + 2 * (lane % 4);
    const uint32_t own = Mainloop::warp_column() / Mainloop::kWarpN * Scratch::kRows;
#pragma unroll
    for (int i = 0; i < Mainloop::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t at = warp_row + 16 * i + 8 * h;
            // Relative to the thread's first column, so that its columns are constants. Read from
            // shared memory row by row: the compiler would keep values of all rows in registers.
            const RowMask mask = beside.masks[at];
            const uint32_t target = mask.target - warp_column;
            const int32_t limit = int32_t(mask.limit) - int32_t(warp_column);
            const float shift = kOwnOffsets ? shifts[at] : softmax.shift;
            float row_sum = 0.0f, row_best = kElsewhere;
#pragma unroll
            for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& cell = mainloop.sum[i][j][2 * h + e];
                    const int column = 8 * j + e;
                    const bool keep = column < limit && uint32_t(column) != target;
                    const float cosine = cell;
                    const float power = ptx::exp2_approximate(fmaf(cosine, softmax.slope, shift));
                    const bool filtered = cosine > softmax.filter;
                    cell = keep && !filtered ? power : 0.0f;
                    row_sum += keep ? (filtered ? softmax.floor : power) : 0.0f;
                    row_best = keep && cosine > row_best ? cosine : row_best;
                }
            }
#pragma unroll
            for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
                Scratch::stage(mainloop, scratch, i, h, j);
            }
#pragma unroll
            for (int across = 1; across <= 2; across *= 2) {
                row_sum += ptx::shuffle_xor(row_sum, across);
                const float other = ptx::shuffle_xor(row_best, across);
                row_best = other > row_best ? other : row_best;
            }
            if (lane % 4 == 0) {
                sums[own + at] = row_sum;
                best[own + at] = row_best;
            }
        }
    }
}

// Writes P and the rows' sums to memory: the tile at `row` and at column `local` of the chunk,
// `column` of the sample. P goes through shared memory, so that it leaves in vectors of 16 bytes.
template <class Mainloop, int kPlanes>
PFC_DEVICE void write_numerators(const HeadArrays& head, Mainloop& mainloop, unsigned char* scratch,
                                 uint32_t row, uint32_t column, uint32_t local) {
    using Scratch = NumeratorScratch<Mainloop>;
    using Stage = typename Scratch::Stage;
    constexpr uint32_t kRows = Scratch::kRows;
    const float* const sums = Scratch::sums(scratch);
    const float* const best = Scratch::best(scratch);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
        // The first plane is there already.
        if (plane > 0) {
#pragma unroll
            for (int i = 0; i < Mainloop::kRowTiles; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
#pragma unroll
                    for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
                        Scratch::stage(mainloop, scratch, i, h, j);
                    }
                }
            }
            __syncthreads();
        }
        constexpr uint32_t kStep = Mainloop::kThreads / Stage::kVectors;
        static_assert(Mainloop::kThreads % Stage::kVectors == 0 && kRows % kStep == 0, "");
        const uint32_t from = threadIdx.x / Stage::kVectors, vector = threadIdx.x % Stage::kVectors;
        using tile::Numerators;
        static_assert(kRows == Numerators::kRows, "tiles of P side by side");
        uint16_t* out = head.numerators + plane * head.plane_numerators +
                        Numerators::at(row + from, local + vector * tile::kVector,
                                       head.chunk_capacity);
#pragma unroll 2
        for (uint32_t at = from; at < kRows; at += kStep) {
            *reinterpret_cast<ptx::Word4*>(out) =
                *reinterpret_cast<const ptx::Word4*>(scratch + Stage::at(at, vector));
            out += kStep * Numerators::kColumns;
        }
        if (plane == 0 && threadIdx.x < kRows) {
            float row_sum = 0.0f, row_best = kElsewhere;
#pragma unroll
            for (uint32_t warp = 0; warp < Scratch::kWarps; ++warp) {
                row_sum += sums[warp * kRows + threadIdx.x];
                const float other = best[warp * kRows + threadIdx.x];
                row_best = other > row_best ? other : row_best;
            }
            const uint64_t to =
                uint64_t(column / Scratch::kColumns) * head.row_capacity + row + threadIdx.x;
            head.partial_sums[to] = row_sum;
            head.partial_best[to] = row_best;
        }
        __syncthreads();
    }
}

}  // namespace epilogue
