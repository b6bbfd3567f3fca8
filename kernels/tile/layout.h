// A tile of 16-bit values in shared memory, written by cp.async and read by ldmatrix, both in
// pieces of 16 bytes and both without bank conflicts.
//
// ldmatrix reads one piece of each of 8 consecutive rows at a time; the 8 pieces must lie in 8
// different sixteenths of 128 bytes. With rows of 8 pieces or more the piece's number is xored with
// the row's; rows of 4 pieces lie two to 128 bytes, so that every second row moves on.
#pragma once

#include "ptx/async_copy.h"
#include "ptx/shim.h"

namespace tile {

constexpr int kPiece = 8;  // 16-bit values of a piece

template <int kRows, int kColumns>
struct Layout {
    static constexpr uint32_t kPieces = kColumns / kPiece;
    static constexpr uint32_t kBytes = kRows * kColumns * 2;
    static constexpr uint32_t kRowBytes = kPieces * 16;
    static_assert(kPieces == 4 || kPieces % 8 == 0, "no swizzle for such a row");

    // Where the piece is, in bytes. 8 rows on, the same piece is 8 * kRowBytes on.
    static PFC_DEVICE uint32_t at(uint32_t row, uint32_t piece) {
        const uint32_t turn = kPieces == 4 ? (row >> 1) & 3 : row & 7;
        return (row * kPieces + (piece ^ turn)) * 16;
    }

    // Begins the copy of a tile: `source` is its first value, rows lie `pitch` values apart, and
    // pieces from `pieces` on become zeros without being read.
    template <int kThreads>
    static PFC_DEVICE void load(unsigned char* tile, const uint16_t* source, uint32_t pitch,
                                uint32_t pieces) {
        static_assert(kThreads % kPieces == 0, "a thread keeps its column");
        constexpr uint32_t kStep = kThreads / kPieces;
        constexpr uint32_t kCopies = (kRows + kStep - 1) / kStep;
        const uint32_t piece = threadIdx.x % kPieces;
        const uint32_t first = threadIdx.x / kPieces;
        const bool valid = piece < pieces;
        const uint16_t* from = source + (valid ? uint64_t(first) * pitch + piece * kPiece : 0);
        const uint64_t step = valid ? uint64_t(kStep) * pitch : 0;
#pragma unroll
        for (uint32_t copy = 0; copy < kCopies; ++copy) {
            const uint32_t row = first + copy * kStep;
            if (kRows % kStep == 0 || row < kRows) {
                ptx::copy_async_16(tile + at(row, piece), from, valid);
            }
            from += step;
        }
    }
};

}  // namespace tile
