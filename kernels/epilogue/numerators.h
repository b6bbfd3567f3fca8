// What becomes of a tile of cosines: exponentials, row sums, largest negatives, and P in bf16.
//
// p = exp(scale cos - c) = 2^(cos scale log2(e) - c log2(e)), one fused multiply-add and one ex2 an
// element. |scale cos| <= scale bounds it, so that no running maximum is needed. Nothing (0, and no
// part of the sum) are a row's target, columns beyond the sample, ignored rows and rows beyond the
// batch; a negative above the filter counts as cosine 0 and is stored as 0. The sum takes p before
// it is rounded.
#pragma once

#include "epilogue/planes.h"
#include "ptx/warp.h"
#include "tile/layout.h"
#include "view.h"

namespace epilogue {

// What of a row counts in a tile: columns below `limit`, but not `target`.
struct alignas(4) RowMask {
    uint16_t target;  // column of the tile, or kNoTarget
    uint16_t limit;
};

constexpr uint16_t kNoTarget = 0xffff;

// That of row `row` in a tile that begins at column `column` and of which `columns` exist.
PFC_DEVICE RowMask row_mask(const HeadView& view, uint32_t row, uint32_t column,
                            uint32_t columns) {
    const StepBlock& block = *view.block;
    if (row >= block.rows || view.target_cosines[row] == kIgnored) {
        return {kNoTarget, 0};
    }
    const uint32_t target = view.columns[row + block.first_computed];
    const bool within = target >= column && target - column < kTileColumns;
    return {within ? uint16_t(target - column) : kNoTarget,
            uint16_t(columns < kTileColumns ? columns : kTileColumns)};
}

// In shared memory from the kernel's beginning: four registers less during the products.
struct Softmax {
    float slope, shift;   // exponent of 2 = cosine * slope + shift
    float filter, floor;  // a cosine above filter adds floor
};

// What is kept beside the pipeline.
template <int kRows>
struct Kept {
    RowMask masks[kRows];
    Softmax softmax;
};

PFC_DEVICE Softmax softmax_of(const MarginView& margin) {
    constexpr double kLog2E = 1.4426950408889634;
    Softmax softmax;
    softmax.slope = float(margin.scale * kLog2E);
    softmax.shift = float(-margin.offset * kLog2E);
    softmax.filter = margin.filter > 0.0 ? float(margin.filter) : INFINITY;
    softmax.floor = ptx::exp2_approximate(softmax.shift);
    return softmax;
}

// How the epilogue divides the pipeline's memory, which is its own from the end of the product to
// its last barrier.
template <class Product>
struct NumeratorScratch {
    static constexpr uint32_t kRows = Product::kM, kColumns = Product::kN;
    static constexpr uint32_t kWarps = Product::kWarpsN;
    using Stage = tile::Layout<kRows, kColumns>;
    static_assert(Stage::kBytes + 4 * kRows * 2 * kWarps <= Product::kPipelineBytes, "");

    // Takes one plane of a thread's two cells; see Product::sum.
    static PFC_DEVICE void stage(Product& product, unsigned char* scratch, int i, int h, int j) {
        const uint32_t lane = ptx::lane();
        const uint32_t at = Stage::at(Product::warp_row() + lane / 4,
                                      (Product::warp_column() + 8 * j) / tile::kPiece) +
                            (16 * i + 8 * h) * Stage::kRowBytes;
        float* const cells = &product.sum[i][j][2 * h];
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

// Cosines to p in the accumulators, its first plane to shared memory; each warp's part of a row's
// sum and maximum to shared memory.
template <class Product>
PFC_DEVICE void exponentiate(Product& product, unsigned char* scratch,
                             const Kept<Product::kM>& kept) {
    using Scratch = NumeratorScratch<Product>;
    float* const sums = Scratch::sums(scratch);
    float* const best = Scratch::best(scratch);
    const Softmax softmax = kept.softmax;
    const uint32_t lane = ptx::lane();
    const uint32_t warp_row = Product::warp_row() + lane / 4;
    const uint32_t warp_column = Product::warp_column() + 2 * (lane % 4);
    const uint32_t part = Product::warp_column() / Product::kWarpN * Scratch::kRows;
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t at = warp_row + 16 * i + 8 * h;
            // Relative to the thread's first column, so that its columns are constants. From shared
            // memory row by row: what all rows have in common the compiler would keep in registers.
            const RowMask mask = kept.masks[at];
            const uint32_t target = mask.target - warp_column;
            const int32_t limit = int32_t(mask.limit) - int32_t(warp_column);
            float row_sum = 0.0f, row_best = kElsewhere;
#pragma unroll
            for (int j = 0; j < Product::kColumnTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& cell = product.sum[i][j][2 * h + e];
                    const int place = 8 * j + e;
                    const bool keep = place < limit && uint32_t(place) != target;
                    const float cosine = cell;
                    const float power =
                        ptx::exp2_approximate(fmaf(cosine, softmax.slope, softmax.shift));
                    const bool filtered = cosine > softmax.filter;
                    cell = keep && !filtered ? power : 0.0f;
                    row_sum += keep ? (filtered ? softmax.floor : power) : 0.0f;
                    row_best = keep && cosine > row_best ? cosine : row_best;
                }
            }
#pragma unroll
            for (int j = 0; j < Product::kColumnTiles; ++j) {
                Scratch::stage(product, scratch, i, h, j);
            }
#pragma unroll
            for (int across = 1; across <= 2; across *= 2) {
                row_sum += ptx::shuffle_xor(row_sum, across);
                const float other = ptx::shuffle_xor(row_best, across);
                row_best = other > row_best ? other : row_best;
            }
            if (lane % 4 == 0) {
                sums[part + at] = row_sum;
                best[part + at] = row_best;
            }
        }
    }
}

// P and the rows' sums to memory: the tile at `row` and at column `local` of the chunk, `column` of
// the sample. P goes through shared memory, so that it leaves in whole pieces of 16 bytes.
template <class Product, int kPlanes>
PFC_DEVICE void write_numerators(const HeadView& view, Product& product, unsigned char* scratch,
                                 uint32_t row, uint32_t column, uint32_t local) {
    using Scratch = NumeratorScratch<Product>;
    using Stage = typename Scratch::Stage;
    constexpr uint32_t kRows = Scratch::kRows;
    const float* const sums = Scratch::sums(scratch);
    const float* const best = Scratch::best(scratch);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
        // The first plane is there already.
        if (plane > 0) {
#pragma unroll
            for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
#pragma unroll
                    for (int j = 0; j < Product::kColumnTiles; ++j) {
                        Scratch::stage(product, scratch, i, h, j);
                    }
                }
            }
            __syncthreads();
        }
        constexpr uint32_t kStep = Product::kThreads / Stage::kPieces;
        static_assert(Product::kThreads % Stage::kPieces == 0 && kRows % kStep == 0, "");
        const uint32_t from = threadIdx.x / Stage::kPieces, piece = threadIdx.x % Stage::kPieces;
        uint16_t* out = view.numerators + plane * view.plane_numerators +
                        uint64_t(row + from) * view.chunk_capacity + local + piece * tile::kPiece;
#pragma unroll 2
        for (uint32_t at = from; at < kRows; at += kStep) {
            *reinterpret_cast<Sixteen*>(out) =
                *reinterpret_cast<const Sixteen*>(scratch + Stage::at(at, piece));
            out += kStep * view.chunk_capacity;
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
                uint64_t(column / Scratch::kColumns) * view.row_capacity + row + threadIdx.x;
            view.partial_sums[to] = row_sum;
            view.partial_best[to] = row_best;
        }
        __syncthreads();
    }
}

}  // namespace epilogue
