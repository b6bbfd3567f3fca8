// What an epilogue wants of rows in memory, brought to shared memory by cp.async while values that
// came before are at work: many are under way at a time, and no register waits for them.
//
// A window is a warp's own: 8 rows of kTiles tiles of 8 floats, which are 8 rows of that many
// accumulators of mma.sync. Whole lines are copied, 16 bytes a lane. Lane l then wants columns
// 2 (l % 4) and the next of row l / 4; tiles are turned by the row, so that the lanes of a quarter of
// the bytes do not meet in a bank.
#pragma once

#include "epilogue/planes.h"
#include "ptx/async_copy.h"
#include "ptx/warp.h"

namespace epilogue {

template <int kTiles>
struct Window {
    static constexpr uint32_t kRows = 8, kEach = 16 / sizeof(float);
    static constexpr uint32_t kTileBytes = 8 * sizeof(float), kTilePieces = kTileBytes / 16;
    static constexpr uint32_t kRowBytes = kTiles * kTileBytes, kRowPieces = kRowBytes / 16;
    static constexpr uint32_t kPieces = kRows * kRowPieces, kBytes = 16 * kPieces;
    static_assert(128 % kRowBytes == 0, "rows that a turn spreads");

    static PFC_DEVICE uint32_t at(uint32_t row, uint32_t tile) {
        return row * kRowBytes + (tile ^ (row / (128 / kRowBytes)) % kTiles) * kTileBytes;
    }

    // Begins the copy: row r from `row_of(r)`, the address of its first column here, null where
    // there is no row. `columns` exist, to the next multiple of kEach; zeros take the others' place.
    template <class RowOf>
    static PFC_DEVICE void load(unsigned char* window, uint32_t columns, const RowOf& row_of) {
#pragma unroll
        for (uint32_t turn = 0; turn < (kPieces + 31) / 32; ++turn) {
            const uint32_t piece = ptx::lane() + 32 * turn;
            if (kPieces % 32 == 0 || piece < kPieces) {
                const uint32_t row = piece / kRowPieces, of_row = piece % kRowPieces;
                const uint32_t column = of_row * kEach;
                const float* const from = row_of(row);
                ptx::copy_async_16(window + at(row, of_row / kTilePieces) +
                                       of_row % kTilePieces * 16,
                                   from + column, from != nullptr && column < columns);
            }
        }
    }

    // This lane's two values of tile `tile`.
    static PFC_DEVICE Two mine(const unsigned char* window, uint32_t tile) {
        const uint32_t lane = ptx::lane();
        return reinterpret_cast<const Two*>(window + at(lane / 4, tile))[lane % 4];
    }
};

// A warp's windows in turn, of which kDepth - 1 are under way while one is used. `load(unit, slot)`
// begins the copies of a unit, `use(unit, slot)` has them; slots are used again.
template <int kUnits, int kDepth>
struct Ring {
    static_assert(kDepth >= 2, "");

    // May come long before `run`, which must follow.
    template <class Load>
    static PFC_DEVICE void begin(const Load& load) {
        ptx::sync_warp();  // the lanes are done with what was there
#pragma unroll
        for (int unit = 0; unit < kDepth - 1; ++unit) {
            if (unit < kUnits) {
                load(unit, unit);
            }
            ptx::copy_async_commit();
        }
    }

    template <class Load, class Use>
    static PFC_DEVICE void run(const Load& load, const Use& use) {
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            // After it the unit is there for all lanes, and the one before it, whose slot the next
            // copy takes, is read no more.
            ptx::copy_async_wait<kDepth - 2>();
            ptx::sync_warp();
            const int next = unit + kDepth - 1;
            if (next < kUnits) {
                load(next, next % kDepth);
            }
            ptx::copy_async_commit();
            use(unit, unit % kDepth);
        }
    }
};

}  // namespace epilogue
