// The mainloop of the GEMM kernels: sum[m, n] = sum over k of left[m, k] right[k, n] for the tile
// of one CTA, by cp.async, ldmatrix and mma.sync m16n8k16 with float32 accumulators.
//
// An operand lies in memory with its depth k contiguous (kAlong) or with m or n contiguous
// (kAcross, read by the transposing ldmatrix); both are stored as they lie.
//
// Split operands: a float32 value is the sum of three bf16 planes, x = x0 + x1 + x2, each the
// rounded rest of those before. Of the nine products of planes the six with i + j <= 2 matter; they
// are one longer sum over k, taken from the small ones to the large one.
#pragma once

#include "ptx/ldmatrix.h"
#include "ptx/mma.h"
#include "ptx/warp.h"
#include "tile/layout.h"
#include "tile/numerators.h"
#include "tune.h"

namespace tile {

enum class Depth { kAlong, kAcross };
enum class Type { kHalf, kBfloat };
enum class Place { kRows, kTiles };  // whole rows, or the tiles of numerators.h
enum class Order { kSame, kMixed };  // of the right operand's rows: mixed_row's

// Planes of a half operand: 1; of a float32 one: 3.
template <int kPlanes>
struct Pairs {
    static_assert(kPlanes == 1 || kPlanes == 3, "");
    static constexpr uint32_t kCount = kPlanes == 1 ? 1 : 6;
    // (0,2) (1,1) (2,0) (0,1) (1,0) (0,0), a hexadecimal digit each from the right.
    static PFC_DEVICE uint32_t left(uint32_t pair) {
        return kPlanes == 1 ? 0 : (0x010210u >> (4 * pair)) & 3;
    }
    static PFC_DEVICE uint32_t right(uint32_t pair) {
        return kPlanes == 1 ? 0 : (0x001012u >> (4 * pair)) & 3;
    }
};

struct Operand {
    const uint16_t* data;  // the tile's first value at k = 0, in the first plane
    uint64_t plane;        // values from plane to plane
    uint32_t pitch;        // values from row to row; in tiles, columns of a plane
    uint32_t vectors;      // kAcross: vectors of a row that exist; the rest are read as zeros
};

// `Shape` has a static constexpr GemmTile kTile.
template <class Shape, Type kType, Depth kLeft, Depth kRight, int kPlanes,
          Place kLeftPlace = Place::kRows, Order kRightOrder = Order::kSame>
struct Mainloop {
    static constexpr GemmTile kTile = Shape::kTile;
    static constexpr int kM = kTile.m, kN = kTile.n, kK = kTile.k;
    static constexpr int kThreads = kTile.threads();
    static constexpr int kWarpsN = kTile.warps_n;
    static constexpr int kWarpM = kTile.warp_m(), kWarpN = kTile.warp_n();
    static constexpr int kRowTiles = kWarpM / 16;    // of 16 rows, a warp
    static constexpr int kColumnTiles = kWarpN / 8;  // of 8 columns, a warp
    static constexpr int kStageBytes = kTile.stage_bytes();
    static constexpr int kPipelineBytes = kTile.pipeline_bytes();
    static constexpr ptx::Eviction kLeftEviction =
        kTile.hints ? ptx::Eviction::kFirst : ptx::Eviction::kNormal;
    static constexpr ptx::Eviction kRightEviction =
        kTile.hints ? ptx::Eviction::kLast : ptx::Eviction::kNormal;
    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kK % 16 == 0, "whole products");

    using LeftLayout = Layout<kLeft == Depth::kAlong ? kM : kK,
                              kLeft == Depth::kAlong ? kK : kM>;
    using RightLayout = Layout<kRight == Depth::kAlong ? kN : kK,
                               kRight == Depth::kAlong ? kK : kN>;
    using Pair = Pairs<kPlanes>;
    static_assert(LeftLayout::kBytes + RightLayout::kBytes == kStageBytes, "");

    // sum[i][j][2 h + e]: row 16 i + 8 h + lane / 4, column 8 j + 2 (lane % 4) + e of the warp's; or,
    // with kMixed, column mixed_row of that.
    float sum[kRowTiles][kColumnTiles][4];

    static PFC_DEVICE uint32_t warp_row() { return ptx::warp() / kWarpsN * kWarpM; }
    static PFC_DEVICE uint32_t warp_column() {
        return ptx::warp() % kWarpsN * kWarpN;
    }

    static PFC_DEVICE void load(unsigned char* stage, const Operand& left, const Operand& right,
                                uint32_t pair, uint32_t k) {
        const uint16_t* a = left.data + Pair::left(pair) * left.plane;
        const uint16_t* b = right.data + Pair::right(pair) * right.plane;
        if constexpr (kLeftPlace == Place::kTiles) {
            // A stage is of one tile's rows and, but for the widest stages, of its columns.
            static_assert(kLeft == Depth::kAlong
                              ? kM == Numerators::kRows && Numerators::kColumns % kK == 0
                              : Numerators::kRows % kK == 0 && kTileColumns % kM == 0,
                          "");
            const uint32_t row = kLeft == Depth::kAlong ? 0 : k;
            const uint32_t column = kLeft == Depth::kAlong ? k : 0;
            LeftLayout::template load<kThreads, kLeftEviction, Numerators::kVectors>(
                stage, a + Numerators::at(row, column, left.pitch), Numerators::kColumns,
                left.vectors, Numerators::kTile);
        } else if constexpr (kLeft == Depth::kAlong) {
            LeftLayout::template load<kThreads, kLeftEviction>(stage, a + k, left.pitch,
                                                               kK / kVector);
        } else {
            LeftLayout::template load<kThreads, kLeftEviction>(
                stage, a + uint64_t(k) * left.pitch, left.pitch, left.vectors);
        }
        stage += LeftLayout::kBytes;
        if constexpr (kRight == Depth::kAlong) {
            constexpr bool kMix = kRightOrder == Order::kMixed;
            RightLayout::template load<kThreads, kRightEviction, RightLayout::kVectors, kMix>(
                stage, b + k, right.pitch, kK / kVector);
        } else {
            static_assert(kRightOrder == Order::kSame, "its rows are the depth");
            RightLayout::template load<kThreads, kRightEviction>(
                stage, b + uint64_t(k) * right.pitch, right.pitch, right.vectors);
        }
    }

    // `meanwhile` runs while the first operands are on their way from shared memory: its
    // instructions fill that latency.
    template <class Meanwhile>
    PFC_DEVICE void multiply_stage(const unsigned char* stage, const Meanwhile& meanwhile) {
        const unsigned char* left = stage;
        const unsigned char* right = stage + LeftLayout::kBytes;
        const uint32_t lane = ptx::lane();
        const uint32_t low = lane & 7, middle = (lane >> 3) & 1, high = lane >> 4;
#pragma unroll
        for (uint32_t k = 0; k < uint32_t(kK); k += 16) {
            uint32_t a[kRowTiles][4];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                if constexpr (kLeft == Depth::kAlong) {
                    const uint32_t at =
                        LeftLayout::at(warp_row() + low + 8 * middle, k / kVector + high);
                    ptx::ldmatrix_x4(a[i], left + at + 16 * i * LeftLayout::kRowBytes);
                } else {
                    const uint32_t row = warp_row() + 16 * i;
                    const uint32_t at = LeftLayout::at(low + 8 * high, row / kVector + middle);
                    ptx::ldmatrix_x4_transposed(a[i], left + at + k * LeftLayout::kRowBytes);
                }
            }
            if (k == 0) {
                meanwhile();
            }
#pragma unroll
            for (int j = 0; j < kColumnTiles; j += 2) {
                uint32_t b[4];
                if constexpr (kRight == Depth::kAlong) {
                    const uint32_t at =
                        RightLayout::at(warp_column() + low + 8 * high, k / kVector + middle);
                    ptx::ldmatrix_x4(b, right + at + 8 * j * RightLayout::kRowBytes);
                } else {
                    const uint32_t column = warp_column() + 8 * j;
                    const uint32_t at = RightLayout::at(low + 8 * middle, column / kVector + high);
                    ptx::ldmatrix_x4_transposed(b, right + at + k * RightLayout::kRowBytes);
                }
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    if constexpr (kType == Type::kHalf) {
                        ptx::mma_half(sum[i][j], a[i], b[0], b[1]);
                        ptx::mma_half(sum[i][j + 1], a[i], b[2], b[3]);
                    } else {
                        ptx::mma_bfloat(sum[i][j], a[i], b[0], b[1]);
                        ptx::mma_bfloat(sum[i][j + 1], a[i], b[2], b[3]);
                    }
                }
            }
        }
    }

    // All copies but those of the newest `stages` - 2 groups have landed.
    static PFC_DEVICE void wait(uint32_t stages) {
        if (stages == 2) {
            ptx::copy_async_wait<0>();
        } else if (stages == 3) {
            ptx::copy_async_wait<1>();
        } else {
            ptx::copy_async_wait<2>();
        }
    }

    // The whole sum; `depth` is a multiple of kK (operands are zero up to it), or 0. `stages`, 2 to
    // 4, are what `pipeline` has room for. Ends with all copies landed and all threads done with
    // `pipeline`, which the epilogue may use. With kLate `late` runs once, when a quarter of the sum is
    // left.
    template <bool kLate, class Late>
    PFC_DEVICE void run(unsigned char* pipeline, const Operand& left, const Operand& right,
                        uint32_t depth, uint32_t stages, const Late& late) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    sum[i][j][e] = 0.0f;
                }
            }
        }
        const uint32_t steps = depth / kK * Pair::kCount;
        uint32_t load_pair = 0, load_k = 0, load_step = 0;
        unsigned char* load_stage = pipeline;
        unsigned char* const end = pipeline + stages * kStageBytes;
        // A group is committed even where nothing is left to load: the wait counts groups.
        auto load_next = [&]() {
            if (load_step < steps) {
                load(load_stage, left, right, load_pair, load_k);
                load_k += kK;
                if (load_k == depth) {
                    load_k = 0;
                    load_pair += 1;
                }
                load_stage += kStageBytes;
                if (load_stage == end) {
                    load_stage = pipeline;
                }
            }
            load_step += 1;
            ptx::copy_async_commit();
        };
#pragma unroll 1
        for (uint32_t stage = 1; stage < stages; ++stage) {
            load_next();
        }
        const unsigned char* stage = pipeline;
        uint32_t step = 0, until = kLate ? steps / 4 * 3 : steps;
#pragma unroll 1
        while (true) {
#pragma unroll 1
            for (; step < until; ++step) {
                // One barrier a step: after it all threads see this stage, and none reads the stage
                // before it any more, which the next load overwrites.
                wait(stages);
                __syncthreads();
                multiply_stage(stage, load_next);
                stage += kStageBytes;
                if (stage == end) {
                    stage = pipeline;
                }
            }
            if (until == steps) {
                break;
            }
            late();
            until = steps;
        }
        ptx::copy_async_wait<0>();
        __syncthreads();
    }

    PFC_DEVICE void run(unsigned char* pipeline, const Operand& left, const Operand& right,
                        uint32_t depth) {
        run<false>(pipeline, left, right, depth, kTile.stages, [] {});
    }
};

}  // namespace tile
