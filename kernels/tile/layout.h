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

    // Begins the copy of a tile: `source` is its first value and rows lie `pitch` values apart.
    // Vectors from `vectors` on become zeros without being read.
    template <int kThreads, ptx::Eviction kEviction = ptx::Eviction::kNormal>
    static PFC_DEVICE void load(unsigned char* tile, const uint16_t* source, uint32_t pitch,
                                uint32_t vectors) {
        static_assert(kThreads % kVectors == 0, "a thread keeps its column");
        constexpr uint32_t kStep = kThreads / kVectors;
        constexpr uint32_t kCopies = (kRows + kStep - 1) / kStep;
        const uint32_t vector = threadIdx.x % kVectors;
        const uint32_t first = threadIdx.x / kVectors;
        const bool valid = vector < vectors;
        const uint16_t* from = source + (valid ? uint64_t(first) * pitch + vector * kVector : 0);
        const uint64_t step = valid ? uint64_t(kStep) * pitch : 0;
#pragma unroll
        for (uint32_t copy = 0; copy < kCopies; ++copy) {
            const uint32_t row = first + copy * kStep;
            if (kRows % kStep == 0 || row < kRows) {
                ptx::copy_async_16<kEviction>(tile + at(row, vector), from, valid);
            }
            from += step;
        }
    }
};

}  // namespace tile
