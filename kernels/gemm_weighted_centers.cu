// The weighted centers, P W^ over the columns of a chunk: the embeddings' gradient before 1 / L.
//
//   weighted_centers[s][i, k] (+)= sum over the columns j of split s of p[i, j] W^[j, k]
//
// The gradient is linear in P, so that this product needs no softmax sum and runs while the ranks
// add theirs. The depth is the chunk's columns: split s takes a fixed share of chunk_capacity,
// whatever the sample is, and embedding_gradient adds the splits in order. So no atomics are needed
// and the bits do not depend on the grid. The first chunk overwrites (with zeros where a split has
// no column). Later chunks add, and so do a split's columns beyond accumulated_columns (tune.h).
// Floor: 2 B S d flop (f32: 6 times that); bytes: P and W^ once, splits B d floats.
// Agrees with src/device/cpu/products.rs `weighted_centers`.
//
// Launch: tune.h gemm_tile(kWeightedCenters): its threads, any number of CTAs. The tile scheduler
// gives a CTA every gridDim.x-th tile of 128 x 128 of a split. Tiles of a split run together and
// share its P and W^.
#include "integers.h"
#include "ptx/memory.h"
#include "shared_structs.h"
#include "tile/mainloop.h"

namespace {

struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kWeightedCenters);
};

template <int kPlanes>
constexpr uint32_t kAccumulated = accumulated_columns(kPlanes);

// The epilogue: writes a thread's accumulators to `out`, or adds them to what is there.
template <class Mainloop>
PFC_DEVICE void store(const Mainloop& mainloop, float* out, uint32_t column, uint32_t pitch,
                      bool add) {
#pragma unroll
    for (int i = 0; i < Mainloop::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            auto* const cells =
                reinterpret_cast<ptx::Float2*>(out + uint64_t(16 * i + 8 * h) * pitch);
            // All reads of a row come before its writes: the compiler may not move a read before a
            // write.
            ptx::Float2 before[Mainloop::kColumnTiles] = {};
            if (add) {
#pragma unroll
                for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
                    if (column + 8 * j < pitch) {
                        before[j] = cells[4 * j];
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < Mainloop::kColumnTiles; ++j) {
                if (column + 8 * j < pitch) {
                    cells[4 * j] = {mainloop.sum[i][j][2 * h] + before[j].x,
                                    mainloop.sum[i][j][2 * h + 1] + before[j].y};
                }
            }
        }
    }
}

template <int kPlanes>
PFC_DEVICE void weighted_centers(const HeadArrays& head, uint32_t first, unsigned char* shared) {
    using Mainloop = tile::Mainloop<Shape, tile::Type::kBfloat, tile::Depth::kAlong,
                                    tile::Depth::kAcross, kPlanes, tile::Place::kTiles>;
    constexpr uint32_t kRows = Mainloop::kM, kColumns = Mainloop::kN;
    const StepBlock& block = *head.block;
    if (block.status != kOk || (first != 0 && block.classes <= first)) {
        return;
    }
    const uint32_t columns = smaller(block.classes - first, head.chunk_capacity);
    const uint32_t pitch = head.depth_pitch;
    const uint32_t row_blocks = ceil_div(block.rows, kRows);
    const uint32_t column_blocks = ceil_div(pitch, kColumns);
    const uint32_t share = round_up(ceil_div(head.chunk_capacity, head.splits), kTileColumns);
    const uint32_t tiles = row_blocks * column_blocks * head.splits;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        // The tile scheduler: column blocks run fastest, then row blocks, then splits.
        const uint32_t tile_column = tile % column_blocks * kColumns;
        const uint32_t tile_row = tile / column_blocks % row_blocks * kRows;
        const uint32_t split = tile / column_blocks / row_blocks;
        const uint64_t begin = uint64_t(split) * share;
        // Both operands are zero beyond the sample, up to the next multiple of kTileColumns.
        uint32_t depth = 0;
        if (begin < columns) {
            const uint32_t rest = columns - uint32_t(begin);
            depth = round_up(smaller(rest, share), Mainloop::kK);
        }
        if (depth == 0 && first != 0) {
            continue;
        }
        const uint32_t lane = ptx::lane();
        const uint32_t row = tile_row + Mainloop::warp_row() + lane / 4;
        const uint32_t column = tile_column + Mainloop::warp_column() + 2 * (lane % 4);
        float* const out =
            head.weighted_centers + (uint64_t(split) * head.row_capacity + row) * pitch + column;
        uint32_t done = 0;
        do {
            const uint32_t now = smaller(depth - done, kAccumulated<kPlanes>);
            const tile::Operand numerators = {
                head.numerators +
                    tile::Numerators::at(tile_row, uint32_t(begin) + done, head.chunk_capacity),
                head.plane_numerators, head.chunk_capacity, Mainloop::kK / tile::kVector};
            const tile::Operand centers = {head.center_wide + (begin + done) * pitch + tile_column,
                                           head.plane_centers, pitch,
                                           (pitch - tile_column) / tile::kVector};
            Mainloop mainloop;
            mainloop.run(shared, numerators, centers, now);
            store<Mainloop>(mainloop, out, column, pitch, first != 0 || done != 0);
            done += now;
        } while (done < depth);
    }
}

}  // namespace

PFC_KERNEL_OF(gemm_weighted_centers_half, Shape::kTile.threads(), Shape::kTile.ctas_per_sm,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    weighted_centers<1>(head, first, shared);
}

PFC_KERNEL_OF(gemm_weighted_centers_f32, Shape::kTile.threads(), Shape::kTile.ctas_per_sm,
              (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first)) {
    PFC_DYNAMIC_SHARED(shared);
    weighted_centers<3>(head, first, shared);
}
