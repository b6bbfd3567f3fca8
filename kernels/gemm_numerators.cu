// The numerators, P = exp(scale E^ W^.T - c), masked, for the columns of a chunk, with the sums of
// their rows.
//
//   cos[i, j] = sum over k of E^[i, k] W^[j, k]
//   p[i, j]   = exp(scale cos[i, j] - c); 0 for targets, ignored rows, and columns or rows that do
//               not exist
//   partial_sums[tile][i] = sum over the tile's columns of p; partial_best[tile][i] = largest cos
//
// Fused: the exponential, the target mask, the inter-class filter, row sums and maxima, the
// rounding to bf16. No logits are stored. Half: fp16 operands (unit vectors need no range, and fp16
// has three bits more than bf16); f32: three planes of bf16, P likewise.
// Floor: 2 B S d flop (f32: 6 times that); bytes: W^ and E^ once, P once (2 B S; f32: 6 B S).
// Agrees with src/device/cpu/products.rs `numerators` and src/device/cpu/vector.rs
// `softmax_column`.
//
// The entries _far take each row's own offset in place of c (far.h). `far_only` 1: they leave tiles
// as they are whose rows all have offset c; the rest of a tile comes out as it was.
//
// Launch: tune.h gemm_tile(kNumerators): its threads, any number of CTAs. The tile scheduler gives
// a CTA every gridDim.x-th tile of 128 x 128. Row blocks run fastest: CTAs that run together share
// the rows of W^, and E^ stays in the second-level cache.
#include "epilogue/numerators.h"
#include "integers.h"
#include "shared_structs.h"
#include "tile/mainloop.h"

namespace {

struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kNumerators);
};

struct TileIndex {
    uint32_t row, column;  // the tile's first ones; the column counts from the chunk's first
    uint32_t columns;      // of the chunk from `column` on
    bool exists;
};

// The tile scheduler: the index of tile number `tile`.
PFC_DEVICE TileIndex tile_index_of(const HeadArrays& head, uint32_t first, uint32_t tile) {
    constexpr uint32_t kRows = Shape::kTile.m, kColumns = Shape::kTile.n;
    const StepBlock& block = *head.block;
    const uint32_t left = block.classes > first ? block.classes - first : 0;
    const uint32_t columns = smaller(left, head.chunk_capacity);
    const uint32_t row_blocks = ceil_div(block.rows, kRows);
    if (row_blocks == 0) {
        return {0, 0, 0, false};
    }
    const uint32_t column = tile / row_blocks * kColumns;
    return {tile % row_blocks * kRows, column, columns - column, column < columns};
}

template <tile::Type kType, int kPlanes, bool kOwnOffsets>
PFC_DEVICE void numerators(const HeadArrays& head, uint32_t first, int32_t far_only,
                           unsigned char* shared) {
    using Mainloop = tile::Mainloop<Shape, kType, tile::Depth::kAlong, tile::Depth::kAlong, kPlanes,
                                    tile::Place::kRows, tile::Order::kMixed>;
    using Beside = epilogue::BesidePipeline<Mainloop::kM>;
    static_assert(sizeof(Beside) == 4 * kNumeratorWords, "");
    Beside& beside = *reinterpret_cast<Beside*>(shared + Mainloop::kPipelineBytes);
    if (head.block->status != kOk) {
        return;
    }
    if (threadIdx.x == 0) {
        beside.softmax = epilogue::softmax_of(head.margin);
    }
#pragma unroll 1
    for (uint32_t tile = blockIdx.x;; tile += gridDim.x) {
        TileIndex index = tile_index_of(head, first, tile);
        if (!index.exists) {
            return;
        }
        if constexpr (kOwnOffsets) {
            static_assert(Shape::kTile.m == kTileRows, "far_tiles has these tiles");
            if (far_only != 0 && head.far_tiles[index.row / kTileRows] == 0) {
                continue;
            }
        }
        // The epilogue reads them; the mainloop's barriers publish them before that.
        if (threadIdx.x < uint32_t(Mainloop::kM)) {
            beside.masks[threadIdx.x] = epilogue::row_mask(head, index.row + threadIdx.x,
                                                           first + index.column, index.columns);
        }
        const uint32_t pitch = head.depth_pitch;
        Mainloop mainloop;
        mainloop.run(shared,
                     {head.unit_operand + uint64_t(index.row) * pitch, head.plane_rows, pitch, 0},
                     {head.center_operand + uint64_t(index.column) * pitch, head.plane_centers,
                      pitch, 0},
                     pitch);
        const float* shifts = nullptr;
        if constexpr (kOwnOffsets) {
            shifts = head.shifts + tile_index_of(head, first, tile).row;
        }
        // The index is computed again rather than kept: the mainloop needs the registers.
        index = tile_index_of(head, first, tile);
        auto* const sums = reinterpret_cast<epilogue::RowSums<Mainloop>*>(shared);
        epilogue::write_numerators<kOwnOffsets, kPlanes>(head, mainloop, *sums, beside, shifts,
                                                         index.row, index.column);
        __syncthreads();
        epilogue::write_row_sums(head, *sums, index.row, first + index.column);
        __syncthreads();  // the next tile's operands overwrite the sums
    }
}

}  // namespace

PFC_KERNEL_OF(gemm_numerators_half, Shape::kTile.threads(), Shape::kTile.ctas_per_sm,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    numerators<tile::Type::kHalf, 1, false>(head, first, 0, shared);
}

PFC_KERNEL_OF(gemm_numerators_f32, Shape::kTile.threads(), Shape::kTile.ctas_per_sm,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    numerators<tile::Type::kBfloat, 3, false>(head, first, 0, shared);
}

PFC_KERNEL_OF(gemm_numerators_half_far, Shape::kTile.threads(), Shape::kTile.ctas_per_sm,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first, int32_t far_only)) {
    PFC_DYNAMIC_SHARED(shared);
    numerators<tile::Type::kHalf, 1, true>(head, first, far_only, shared);
}

PFC_KERNEL_OF(gemm_numerators_f32_far, Shape::kTile.threads(), Shape::kTile.ctas_per_sm,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first, int32_t far_only)) {
    PFC_DYNAMIC_SHARED(shared);
    numerators<tile::Type::kBfloat, 3, true>(head, first, far_only, shared);
}
