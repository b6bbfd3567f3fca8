// GEMM2: parts[split] (+)= P W^ over the columns of a chunk: the embeddings' gradient before 1 / L.
//
//   parts[s][i, k] (+)= sum over the columns j of split s of p[i, j] W^[j, k]
//
// The gradient is linear in P, so that this product needs no softmax sum and runs while the ranks
// add theirs. The depth is the chunk's columns: split s takes a fixed share of chunk_capacity,
// whatever the sample is, and embedding_gradient adds the splits in order, so that no atomics are
// needed and the bits do not depend on the grid. The first chunk overwrites (with zeros where a
// split has no column), later ones add, and so do a split's columns beyond weighted_chain (tune.h).
// Floor: 2 B S d flop (f32: 6 times that); bytes: P and W^ once, splits B d floats.
// Agrees with src/device/cpu/fused.rs `forward` (weighted).
//
// Launch: tune.h gemm_tile(kWeighted): 256 threads, any number of CTAs; each takes every
// gridDim.x-th tile of 128 x 128 of a split. Tiles of a split run together and share its P and W^.
#include "epilogue/planes.h"
#include "tile/product.h"
#include "view.h"

namespace {

struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kWeighted);
};

template <int kPlanes>
constexpr uint32_t kChain = weighted_chain(kPlanes);

// To a thread's cells of the parts, or onto them.
template <class Product>
PFC_DEVICE void store(const Product& product, float* out, uint32_t place, uint32_t pitch,
                      bool onto) {
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            auto* const cells =
                reinterpret_cast<epilogue::Two*>(out + uint64_t(16 * i + 8 * h) * pitch);
            // All of a row's reads before its writes, behind which the compiler would leave them.
            epilogue::Two before[Product::kColumnTiles] = {};
            if (onto) {
#pragma unroll
                for (int j = 0; j < Product::kColumnTiles; ++j) {
                    if (place + 8 * j < pitch) {
                        before[j] = cells[4 * j];
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < Product::kColumnTiles; ++j) {
                if (place + 8 * j < pitch) {
                    cells[4 * j] = {product.sum[i][j][2 * h] + before[j].x,
                                    product.sum[i][j][2 * h + 1] + before[j].y};
                }
            }
        }
    }
}

template <int kPlanes>
PFC_DEVICE void multiply_weighted(const HeadView& view, uint32_t first, unsigned char* shared) {
    using Product = tile::Product<Shape, tile::Type::kBfloat, tile::Depth::kAlong,
                                  tile::Depth::kAcross, kPlanes>;
    constexpr uint32_t kRows = Product::kM, kColumns = Product::kN;
    const StepBlock& block = *view.block;
    if (block.status != kOk || (first != 0 && block.classes <= first)) {
        return;
    }
    const uint32_t left = block.classes - first;
    const uint32_t columns = left < view.chunk_capacity ? left : view.chunk_capacity;
    const uint32_t pitch = view.depth_pitch;
    const uint32_t row_blocks = (block.rows + kRows - 1) / kRows;
    const uint32_t column_blocks = (pitch + kColumns - 1) / kColumns;
    const uint32_t share = ((view.chunk_capacity + view.splits - 1) / view.splits +
                            kTileColumns - 1) / kTileColumns * kTileColumns;
    const uint32_t tiles = row_blocks * column_blocks * view.splits;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t column = tile % column_blocks * kColumns;
        const uint32_t row = tile / column_blocks % row_blocks * kRows;
        const uint32_t split = tile / column_blocks / row_blocks;
        const uint64_t begin = uint64_t(split) * share;
        // Both operands are zero beyond the sample, up to the next multiple of kTileColumns.
        uint32_t depth = 0;
        if (begin < columns) {
            const uint32_t rest = columns - uint32_t(begin);
            depth = ((rest < share ? rest : share) + Product::kK - 1) / Product::kK * Product::kK;
        }
        if (depth == 0 && first != 0) {
            continue;
        }
        const uint32_t lane = ptx::lane();
        const uint32_t at = row + Product::warp_row() + lane / 4;
        const uint32_t place = column + Product::warp_column() + 2 * (lane % 4);
        float* const out =
            view.weighted + (uint64_t(split) * view.row_capacity + at) * pitch + place;
        uint32_t done = 0;
        do {
            const uint32_t chain = depth - done < kChain<kPlanes> ? depth - done : kChain<kPlanes>;
            const tile::Operand numerators = {
                view.numerators + uint64_t(row) * view.chunk_capacity + begin + done,
                view.plane_numerators, view.chunk_capacity, 0};
            const tile::Operand centers = {view.center_wide + (begin + done) * pitch + column,
                                           view.plane_centers, pitch,
                                           (pitch - column) / tile::kPiece};
            Product product;
            product.run(shared, numerators, centers, chain);
            store<Product>(product, out, place, pitch, first != 0 || done != 0);
            done += chain;
        } while (done < depth);
    }
}

}  // namespace

PFC_KERNEL_OF(multiply_weighted_half, Shape::kTile.threads(), Shape::kTile.blocks,
              (const PFC_GRID_CONSTANT HeadView view, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    multiply_weighted<1>(view, first, shared);
}

PFC_KERNEL_OF(multiply_weighted_f32, Shape::kTile.threads(), Shape::kTile.blocks,
              (const PFC_GRID_CONSTANT HeadView view, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    multiply_weighted<3>(view, first, shared);
}
