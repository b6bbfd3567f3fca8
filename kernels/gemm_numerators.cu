// GEMM1: P = exp(scale E^ W^.T - c), masked, for the columns of a chunk, with the sums of its rows.
//
//   cos[i, j] = sum over k of E^[i, k] W^[j, k]
//   p[i, j]   = exp(scale cos[i, j] - c); 0 for targets, ignored rows, and whatever does not exist
//   partial_sums[tile][i] = sum over the tile's columns of p; partial_best[tile][i] = largest cos
//
// Fused: the exponential, the target mask, the inter-class filter, row sums and maxima, the
// rounding to bf16. No logits are stored. Half: fp16 operands (unit vectors need no range, and fp16
// has three bits more than bf16); f32: three planes of bf16, P likewise.
// Floor: 2 B S d flop (f32: 6 times that); bytes: W^ and E^ once, P once (2 B S; f32: 6 B S).
// Agrees with src/device/cpu/fused.rs `numerators` and src/device/cpu/vector.rs `softmax_column`.
//
// Launch: tune.h gemm_tile(kNumerators): 256 threads, any number of CTAs; each takes every
// gridDim.x-th tile of 128 x 128. Row blocks run fastest: CTAs that run together share the rows of
// W^, and E^ stays in the second-level cache.
#include "epilogue/numerators.h"
#include "tile/product.h"
#include "view.h"

namespace {

struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kNumerators);
};

// Where tile number `tile` lies; nothing where there is no such tile.
struct Place {
    uint32_t row, column;  // its first; the column in the chunk
    uint32_t columns;      // of the chunk from `column` on
    bool exists;
};

PFC_DEVICE Place place_of(const HeadView& view, uint32_t first, uint32_t tile) {
    constexpr uint32_t kRows = Shape::kTile.m, kColumns = Shape::kTile.n;
    const StepBlock& block = *view.block;
    const uint32_t left = block.classes > first ? block.classes - first : 0;
    const uint32_t columns = left < view.chunk_capacity ? left : view.chunk_capacity;
    const uint32_t row_blocks = (block.rows + kRows - 1) / kRows;
    if (row_blocks == 0) {
        return {0, 0, 0, false};
    }
    const uint32_t column = tile / row_blocks * kColumns;
    return {tile % row_blocks * kRows, column, columns - column, column < columns};
}

template <tile::Type kType, int kPlanes>
PFC_DEVICE void multiply_numerators(const HeadView& view, uint32_t first, unsigned char* shared) {
    using Product = tile::Product<Shape, kType, tile::Depth::kAlong, tile::Depth::kAlong, kPlanes>;
    using Kept = epilogue::Kept<Product::kM>;
    static_assert(sizeof(Kept) == 4 * kNumeratorWords, "");
    Kept& kept = *reinterpret_cast<Kept*>(shared + Product::kPipelineBytes);
    if (view.block->status != kOk) {
        return;
    }
    if (threadIdx.x == 0) {
        kept.softmax = epilogue::softmax_of(view.margin);
    }
#pragma unroll 1
    for (uint32_t tile = blockIdx.x;; tile += gridDim.x) {
        Place place = place_of(view, first, tile);
        if (!place.exists) {
            return;
        }
        // Used after the product, whose barriers make it known to all.
        if (threadIdx.x < uint32_t(Product::kM)) {
            kept.masks[threadIdx.x] = epilogue::row_mask(view, place.row + threadIdx.x,
                                                         first + place.column, place.columns);
        }
        const uint32_t pitch = view.depth_pitch;
        Product product;
        product.run(shared,
                    {view.unit_operand + uint64_t(place.row) * pitch, view.plane_rows, pitch, 0},
                    {view.center_operand + uint64_t(place.column) * pitch, view.plane_centers,
                     pitch, 0},
                    pitch);
        epilogue::exponentiate(product, shared, kept);
        __syncthreads();
        // Where the tile lies is found again rather than kept: the registers are needed between.
        place = place_of(view, first, tile);
        epilogue::write_numerators<Product, kPlanes>(view, product, shared, place.row,
                                                     first + place.column, place.column);
    }
}

}  // namespace

PFC_KERNEL_OF(multiply_numerators_half, Shape::kTile.threads(), Shape::kTile.blocks,
              (const PFC_GRID_CONSTANT HeadView view, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    multiply_numerators<tile::Type::kHalf, 1>(view, first, shared);
}

PFC_KERNEL_OF(multiply_numerators_f32, Shape::kTile.threads(), Shape::kTile.blocks,
              (const PFC_GRID_CONSTANT HeadView view, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    multiply_numerators<tile::Type::kBfloat, 3>(view, first, shared);
}
