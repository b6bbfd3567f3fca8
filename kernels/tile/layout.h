// A tile of 16-bit values in shared memory, written by cp.async and read by ldmatrix, both in
// vectors of 16 bytes and both without bank conflicts.
//
// ldmatrix reads one vector of each of 8 consecutive rows at a time; the 8 vectors must lie in 8
// different eighths of 128 bytes. With rows of 8 vectors or more the vector's number is xored with
// the row's; rows of 4 vectors lie two to 128 bytes, so that every second row moves on.
#pragma once

#include "ptx/async_copy.h"
#include "ptx/shim.h"

namespace tile {

constexpr int kVector = 8;  // 16-bit values of a vector of 16 bytes

// Rows of a right operand in another order, 32 by 32. mma.sync gives a thread columns 8j + 2t and
// 8j + 2t + 1 of each column tile j, t its place in a quad. With row 8t + 2j + e where row 8j + 2t +
// e would be, those of four tiles are the eight neighbors from 8t on: a vector of the result.
constexpr uint32_t kMixedRows = 32;

PFC_DEVICE uint32_t mixed_row(uint32_t row) {
    const uint32_t at = row % kMixedRows;
    return row - at + at % 8 / 2 * 8 + at / 8 * 2 + at % 2;
}

template <int kRows, int kColumns>
struct Layout {
    static constexpr uint32_t kVectors = kColumns / kVector;
    static constexpr uint32_t kBytes = kRows * kColumns * 2;
    static constexpr uint32_t kRowBytes = kVectors * 16;
    static_assert(kVectors == 4 || kVectors % 8 == 0, "no swizzle for such a row");

    // Offset of a vector in bytes. 8 rows further, the same vector is 8 * kRowBytes further.
    static PFC_DEVICE uint32_t at(uint32_t row, uint32_t vector) {
        const uint32_t turn = kVectors == 4 ? (row >> 1) & 3 : row & 7;
        return (row * kVectors + (vector ^ turn)) * 16;
    }

    // Begins the copy of a tile: `source` is its first value and rows lie `pitch` values apart. Of a
    // row kRun vectors lie together, and the next ones `run` values further. Vectors from `vectors`
    // on become zeros without being read. kMix: the tile's rows are mixed_row's of the source.
    template <int kThreads, ptx::Eviction kEviction = ptx::Eviction::kNormal,
              uint32_t kRun = kVectors, bool kMix = false>
    static PFC_DEVICE void load(unsigned char* tile, const uint16_t* source, uint32_t pitch,
                                uint32_t vectors, uint32_t run = 0) {
        static_assert(kThreads % kVectors == 0, "a thread keeps its column");
        constexpr uint32_t kStep = kThreads / kVectors;
        constexpr uint32_t kCopies = (kRows + kStep - 1) / kStep;
        const uint32_t vector = threadIdx.x % kVectors;
        const uint32_t first = threadIdx.x / kVectors;
        const bool valid = vector < vectors;
        const uint32_t place = vector / kRun * run + vector % kRun * kVector;
        static_assert(!kMix || kStep % 8 == 0, "the row in its eight stays");
        const uint32_t row_there = kMix ? mixed_row(first) : first;
        const uint16_t* from = source + (valid ? uint64_t(row_there) * pitch + place : 0);
#pragma unroll
        for (uint32_t copy = 0; copy < kCopies; ++copy) {
            const uint32_t row = first + copy * kStep;
            if (kRows % kStep == 0 || row < kRows) {
                ptx::copy_async_16<kEviction>(tile + at(row, vector), from, valid);
            }
            const uint32_t done = copy * kStep, next = done + kStep;
            const uint32_t step = kMix ? mixed_row(next) - mixed_row(done) : kStep;
            from += valid ? uint64_t(step) * pitch : 0;
        }
    }
};

}  // namespace tile
