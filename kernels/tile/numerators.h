// How P lies in memory: tiles of 128 rows x 64 columns, rows of 128 bytes, one tile after the other
// along a band of 128 rows. The weighted centers read 64 bytes of 128 rows at a time, the center
// gradient 128 bytes of 32 rows: both stay within 16 KiB that lie together, where whole rows, of
// which each takes 250 KB of a sample of 125000, would lead to another page of memory at each row.
#pragma once

#include "integers.h"
#include "shared_structs.h"
#include "tile/layout.h"

namespace tile {

struct Numerators {
    static constexpr uint32_t kRows = kTileRows, kColumns = 64;
    static constexpr uint32_t kVectors = kColumns / kVector;  // of a row of a tile
    static constexpr uint32_t kTile = kRows * kColumns;       // values
    static_assert(kTileColumns % kColumns == 0, "whole tiles");

    // The place of a value of a plane with `columns` columns, a multiple of kColumns. Adding to
    // `row` or `column` adds to the place as long as neither leaves its tile.
    static PFC_DEVICE uint64_t at(uint32_t row, uint32_t column, uint32_t columns) {
        return uint64_t(row / kRows) * kRows * columns + uint64_t(column / kColumns) * kTile +
               row % kRows * kColumns + column % kColumns;
    }
};

}  // namespace tile
