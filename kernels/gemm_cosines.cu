// The cosines of all pairs of a chunk: cos[i, first + j] = sum over k of E^[i, k] W^[j, k].
//
// pfc_normalize_gemm and top_k need the cosines themselves: this is the first half of
// gemm_numerators.cu, with float32 operands (three planes of bf16) alone.
// Floor: 12 B S d flop; bytes: both operands once, 4 B S of cosines. Agrees with `normalize_gemm`
// of src/device/cpu/stateless.rs.
//
// Launch: tune.h gemm_tile(kNumerators): its threads, any number of CTAs. The tile scheduler gives
// a CTA every gridDim.x-th tile of 128 x 128. Row blocks run fastest: CTAs that run together share
// W^.
#include "integers.h"
#include "shared_structs.h"
#include "tile/mainloop.h"

namespace {

struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kNumerators);
};

}  // namespace

// unit_operand has `count` rows, center_operand `columns`; both are zero to the end of the last
// tile.
PFC_KERNEL_OF(gemm_cosines, Shape::kTile.threads(), Shape::kTile.ctas_per_sm,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t count, uint32_t columns,
               uint64_t first, MatrixView cosines)) {
    PFC_DYNAMIC_SHARED(shared);
    using Mainloop = tile::Mainloop<Shape, tile::Type::kBfloat, tile::Depth::kAlong,
                                    tile::Depth::kAlong, 3>;
    constexpr uint32_t kRows = Mainloop::kM, kColumns = Mainloop::kN;
    static_assert(Mainloop::kPipelineBytes == kCosinesShared, "");
    const uint32_t row_blocks = ceil_div(count, kRows);
    const uint32_t column_blocks = ceil_div(columns, kColumns);
    const uint64_t tiles = uint64_t(row_blocks) * column_blocks;
    const uint32_t pitch = head.depth_pitch, lane = ptx::lane();
#pragma unroll 1
    for (uint64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t tile_row = uint32_t(tile % row_blocks) * kRows;
        const uint32_t tile_column = uint32_t(tile / row_blocks) * kColumns;
        Mainloop mainloop;
        mainloop.run(
            shared, {head.unit_operand + uint64_t(tile_row) * pitch, head.plane_rows, pitch, 0},
            {head.center_operand + uint64_t(tile_column) * pitch, head.plane_centers, pitch, 0},
            pitch);
        const uint32_t first_row = tile_row + Mainloop::warp_row() + lane / 4;
        const uint32_t column = tile_column + Mainloop::warp_column() + 2 * (lane % 4);
        float* const out = reinterpret_cast<float*>(cosines.data) + first + column;
#pragma unroll
        for (int i = 0; i < Mainloop::kRowTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t row = first_row + 16 * i + 8 * h;
                if (row >= count) {
                    continue;
                }
                // Rows of any stride: a pair of columns need not begin on 8 bytes.
                float* const to = out + row * cosines.stride;
#pragma unroll
                for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        if (column + 8 * j + e < columns) {
                            to[8 * j + e] = mainloop.sum[i][j][2 * h + e];
                        }
                    }
                }
            }
        }
    }
}
