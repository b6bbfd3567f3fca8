// Cosines of all pairs of a chunk, kept: cos[i, first + j] = sum over k of E^[i, k] W^[j, k].
//
// For pfc_normalize_gemm and for top_k, which want the products themselves: the first half of
// gemm_numerators.cu, with float32 operands (three planes of bf16) alone.
// Floor: 12 B S d flop; bytes: both operands once, 4 B S of cosines. Agrees with
// Cpu::normalize_gemm (src/device/cpu/kernels.rs).
//
// Launch: tune.h gemm_tile(kNumerators): 256 threads, any number of CTAs; each takes every
// gridDim.x-th tile of 128 x 128. Row blocks run fastest: CTAs that run together share W^.
#include "tile/product.h"
#include "view.h"

namespace {

struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kNumerators);
};

}  // namespace

// unit_operand has `count` rows, center_operand `columns`; both are zero to the end of the last
// tile.
// gate: multiply_units registers <= 128 shared 49152 <= 49152 HMMA 32
PFC_KERNEL_OF(multiply_units, Shape::kTile.threads(), Shape::kTile.blocks,
              (const PFC_GRID_CONSTANT HeadView view, uint32_t count, uint32_t columns,
               uint64_t first, MatrixView cosines)) {
    PFC_DYNAMIC_SHARED(shared);
    using Product = tile::Product<Shape, tile::Type::kBfloat, tile::Depth::kAlong,
                                  tile::Depth::kAlong, 3>;
    constexpr uint32_t kRows = Product::kM, kColumns = Product::kN;
    static_assert(Product::kPipelineBytes == 49152, "what the host launches with");
    const uint32_t row_blocks = (count + kRows - 1) / kRows;
    const uint32_t column_blocks = (columns + kColumns - 1) / kColumns;
    const uint64_t tiles = uint64_t(row_blocks) * column_blocks;
    const uint32_t pitch = view.depth_pitch, lane = ptx::lane();
#pragma unroll 1
    for (uint64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t row = uint32_t(tile % row_blocks) * kRows;
        const uint32_t column = uint32_t(tile / row_blocks) * kColumns;
        Product product;
        product.run(shared,
                    {view.unit_operand + uint64_t(row) * pitch, view.plane_rows, pitch, 0},
                    {view.center_operand + uint64_t(column) * pitch, view.plane_centers, pitch, 0},
                    pitch);
        const uint32_t at = row + Product::warp_row() + lane / 4;
        const uint32_t place = column + Product::warp_column() + 2 * (lane % 4);
        float* const out = reinterpret_cast<float*>(cosines.data) + first + place;
#pragma unroll
        for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t here = at + 16 * i + 8 * h;
                if (here >= count) {
                    continue;
                }
                // Rows of any stride: a pair of columns need not begin on 8 bytes.
                float* const to = out + here * cosines.stride;
#pragma unroll
                for (int j = 0; j < Product::kColumnTiles; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        if (place + 8 * j + e < columns) {
                            to[8 * j + e] = product.sum[i][j][2 * h + e];
                        }
                    }
                }
            }
        }
    }
}
