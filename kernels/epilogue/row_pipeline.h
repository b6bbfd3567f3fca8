// Brings rows that an epilogue needs to shared memory by cp.async, while it works on the rows that
// came before: many copies are under way at a time, and no register waits for them.
//
// A window belongs to one warp: 8 rows of kTiles tiles of 8 floats, the shape of that many
// accumulators of mma.sync. Whole lines are copied, 16 bytes a lane. Then lane l reads columns
// 2 (l % 4) and the next of row l / 4. Tiles are rotated by the row, so that the lanes of a quarter
// of the bytes do not meet in a bank.
#pragma once

#include "ptx/async_copy.h"
#include "ptx/memory.h"
#include "ptx/warp.h"

namespace epilogue {

template <int kTiles>
struct RowWindow {
    static constexpr uint32_t kRows = 8, kFloats = 16 / sizeof(float);  // floats of a vector
    static constexpr uint32_t kTileBytes = 8 * sizeof(float), kTileVectors = kTileBytes / 16;
    static constexpr uint32_t kRowBytes = kTiles * kTileBytes, kRowVectors = kRowBytes / 16;
    static constexpr uint32_t kVectors = kRows * kRowVectors, kBytes = 16 * kVectors;
    static_assert(128 % kRowBytes == 0, "rows that a rotation spreads");

    static PFC_DEVICE uint32_t at(uint32_t row, uint32_t tile) {
        return row * kRowBytes + (tile ^ (row / (128 / kRowBytes)) % kTiles) * kTileBytes;
    }

    // Begins the copy: row r of `tensor` from its value `offset_of(r)` on, that of its first column
    // here. `rows` and `columns` exist, the latter to the next multiple of kFloats; the others become
    // zeros, and no address of theirs is formed.
    template <class OffsetOf>
    static PFC_DEVICE void load(unsigned char* window, const float* tensor, uint32_t rows,
                                uint32_t columns, const OffsetOf& offset_of) {
#pragma unroll
        for (uint32_t round = 0; round < (kVectors + 31) / 32; ++round) {
            const uint32_t vector = ptx::lane() + 32 * round;
            if (kVectors % 32 == 0 || vector < kVectors) {
                const uint32_t row = vector / kRowVectors, of_row = vector % kRowVectors;
                const uint32_t column = of_row * kFloats;
                const bool exists = row < rows && column < columns;
                ptx::copy_async_16(window + at(row, of_row / kTileVectors) +
                                       of_row % kTileVectors * 16,
                                   tensor + (exists ? offset_of(row) + column : 0), exists);
            }
        }
    }

    // The two values of tile `tile` that belong to this lane's accumulators.
    static PFC_DEVICE ptx::Float2 lane_values(const unsigned char* window, uint32_t tile) {
        const uint32_t lane = ptx::lane();
        return reinterpret_cast<const ptx::Float2*>(window + at(lane / 4, tile))[lane % 4];
    }
};

// A pipeline of kDepth windows of a warp: kDepth - 1 are under way while one is used. `load(unit,
// slot)` begins the copies of a unit, `use(unit, slot)` reads them; the slots are used in turn.
template <int kUnits, int kDepth>
struct RowPipeline {
    static_assert(kDepth >= 2, "");

    // May come long before `run`, which must follow.
    template <class Load>
    static PFC_DEVICE void begin(const Load& load) {
        ptx::sync_warp();  // the lanes no longer read the slots
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
            // Afterwards all lanes see the unit, and none reads the one before it, whose slot the
            // next copy overwrites.
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
