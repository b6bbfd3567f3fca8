// Tile shapes of the GEMM-shaped kernels: every number that is a matter of speed, and why it is so.
//
// One constexpr function, gemm_tile, gives the shape of an entry; the kernels and the tests take it
// from here, and the host's launch table (threads, dynamic shared bytes) repeats it.
//
// Budgets: an SM has 65536 registers and 163 KiB (sm_80), 227 KiB (sm_90) or 99 KiB (sm_86, sm_89,
// sm_120) of shared memory for a CTA. Registers decide how many CTAs of 256 threads fit an SM:
// 128 a thread for two, 255 for one.
#pragma once

#include <stdint.h>

enum class Gemm {
    kNumerators,  // GEMM1: cosines and their exponentials
    kWeighted,    // GEMM2: numerators times class centres
    kCenters,     // GEMM3: transposed numerators times scaled embeddings, whole rows
};

struct GemmTile {
    int m, n, k;           // rows and columns of the product that a CTA owns; depth of a stage
    int stages;            // of the cp.async pipeline, 2 to 4
    int warps_m, warps_n;  // how the CTA's 8 warps cut m x n
    int blocks;            // CTAs an SM that the registers must allow

    constexpr int threads() const { return 32 * warps_m * warps_n; }
    constexpr int warp_m() const { return m / warps_m; }
    constexpr int warp_n() const { return n / warps_n; }
    constexpr int stage_bytes() const { return 2 * k * (m + n); }
    constexpr int pipeline_bytes() const { return stages * stage_bytes(); }
};

// GEMM3's widths: the narrowest that d fits into is the host's choice. Beyond the last, a head is
// refused (UNSUPPORTED): a row would not fit the accumulators of a CTA.
constexpr int kCenterWidths[] = {128, 256, 512, 1024};

constexpr int center_width(int dim) {
    for (int width : kCenterWidths) {
        if (dim <= width) {
            return width;
        }
    }
    return 0;
}

// `width` and `deep` are GEMM3's. `deep` is for devices that give a CTA 163 KiB of shared memory; it
// changes nothing but the stages, which the host tells the kernel.
constexpr GemmTile gemm_tile(Gemm gemm, int width = 0, bool deep = false) {
    switch (gemm) {
        case Gemm::kNumerators:
        case Gemm::kWeighted:
            // 64 x 32 a warp: 64 accumulators, so that two CTAs share an SM and the exponentials of
            // one run under the products of the other. 3 stages of 16 KiB: two CTAs fit the 99 KiB
            // of the small devices, and 48 KiB hides the 32 KiB that the epilogue stages in.
            return {128, 128, 32, 3, 2, 4, 2};
        case Gemm::kCenters:
            break;
    }
    // A warp owns all of a CTA's classes and an eighth of the row: the class's coefficients are
    // then the same for a whole warp row, and a row's dot product is a sum of eight numbers. 128
    // accumulators a thread leave room for the optimizer's operands, and one CTA an SM.
    switch (width) {
        case 128:
            // 64 classes: 32 accumulators, so that two CTAs share an SM, 2 x 48 KiB.
            return {64, 128, 32, 4, 1, 8, 2};
        case 256:
            // 24 KiB a stage; 4 of them fit every device.
            return {128, 256, 32, 4, 1, 8, 1};
        case 512:
            // 36 KiB a stage: 2 fit the small devices, 4 the others.
            return {64, 512, 32, deep ? 4 : 2, 1, 8, 1};
        default:
            // 33 KiB a stage of half the depth: a stage of 32 would leave the small devices one.
            return {32, 1024, 16, deep ? 4 : 2, 1, 8, 1};
    }
}

// Columns that GEMM2 adds up in the tensor cores' accumulators before it adds those to the parts in
// memory. The accumulators cut each sum toward zero instead of rounding it (Fasi et al. 2021,
// doi:10.7717/peerj-cs.330), so that a long sum of positive numbers drifts: by 1e-5 of itself over
// 8000 columns, by 1e-4 over 60000. Adding to memory costs 8 bytes for each row and d: beside the
// products of as many columns a sixth at 4096 in half, a fortieth in f32, which makes six of them.
constexpr uint32_t weighted_chain(int planes) { return planes == 1 ? 16384 : 4096; }

// Words kept beside the pipeline: GEMM1, one for each row's mask and four of the softmax; GEMM3,
// for each class its row, 1 / norm and positive.
constexpr int kNumeratorWords = 128 + 4;
constexpr int kCenterWords = 3;

constexpr int gemm_shared_bytes(Gemm gemm, int width = 0, bool deep = false) {
    const GemmTile tile = gemm_tile(gemm, width, deep);
    const int words = gemm == Gemm::kNumerators ? kNumeratorWords
                      : gemm == Gemm::kCenters  ? kCenterWords * tile.m
                                                : 0;
    return tile.pipeline_bytes() + 4 * words;
}

// The launch table that the host repeats.
static_assert(gemm_tile(Gemm::kNumerators).threads() == 256, "");
static_assert(gemm_shared_bytes(Gemm::kNumerators) == 49680, "");
static_assert(gemm_shared_bytes(Gemm::kWeighted) == 49152, "");
static_assert(gemm_shared_bytes(Gemm::kCenters, 128) == 49920, "");
static_assert(gemm_shared_bytes(Gemm::kCenters, 256) == 99840, "");
static_assert(gemm_shared_bytes(Gemm::kCenters, 512) == 74496, "");
static_assert(gemm_shared_bytes(Gemm::kCenters, 512, true) == 148224, "");
static_assert(gemm_shared_bytes(Gemm::kCenters, 1024) == 67968, "");
static_assert(gemm_shared_bytes(Gemm::kCenters, 1024, true) == 135552, "");
static_assert(gemm_tile(Gemm::kCenters, 128).stages == 4, "");
static_assert(gemm_tile(Gemm::kCenters, 256).stages == 4, "");
static_assert(gemm_tile(Gemm::kCenters, 512).stages == 2, "");
static_assert(gemm_tile(Gemm::kCenters, 512, true).stages == 4, "");
static_assert(gemm_tile(Gemm::kCenters, 1024).stages == 2, "");
static_assert(gemm_tile(Gemm::kCenters, 1024, true).stages == 4, "");

// What the entries may take, see kernels/gates. Of two CTAs an SM each may have half of its registers
// and of the 100 KiB that the small devices have, 1 KiB less, which the system takes.
//
// gate: multiply_numerators_half registers <= 128 shared gemm_shared_bytes(Gemm::kNumerators) <= 50176 HMMA 32
// gate: multiply_weighted_half registers <= 128 shared gemm_shared_bytes(Gemm::kWeighted) <= 50176 HMMA 32
// gate: multiply_centers_half_128 registers <= 128 shared gemm_shared_bytes(Gemm::kCenters, 128) <= 50176 HMMA 16
// gate: multiply_centers_half_256 registers <= 255 shared gemm_shared_bytes(Gemm::kCenters, 256) <= 101376 HMMA 64
// gate: multiply_centers_half_512 registers <= 255 shared gemm_shared_bytes(Gemm::kCenters, 512) <= 101376 HMMA 64
// gate: multiply_centers_half_512 on 80,90a,100 shared gemm_shared_bytes(Gemm::kCenters, 512, true) <= 166912
// gate: multiply_centers_half_1024 registers <= 255 shared gemm_shared_bytes(Gemm::kCenters, 1024) <= 101376 HMMA 32
// gate: multiply_centers_half_1024 on 80,90a,100 shared gemm_shared_bytes(Gemm::kCenters, 1024, true) <= 166912
//
// gate: multiply_numerators_f32 registers <= 128 shared gemm_shared_bytes(Gemm::kNumerators) <= 50176 HMMA 32
// gate: multiply_weighted_f32 registers <= 128 shared gemm_shared_bytes(Gemm::kWeighted) <= 50176 HMMA 32
// gate: multiply_centers_f32_128 registers <= 128 shared gemm_shared_bytes(Gemm::kCenters, 128) <= 50176 HMMA 16
// gate: multiply_centers_f32_256 registers <= 255 shared gemm_shared_bytes(Gemm::kCenters, 256) <= 101376 HMMA 64
// gate: multiply_centers_f32_512 registers <= 255 shared gemm_shared_bytes(Gemm::kCenters, 512) <= 101376 HMMA 64
// gate: multiply_centers_f32_512 on 80,90a,100 shared gemm_shared_bytes(Gemm::kCenters, 512, true) <= 166912
// gate: multiply_centers_f32_1024 registers <= 255 shared gemm_shared_bytes(Gemm::kCenters, 1024) <= 101376 HMMA 32
// gate: multiply_centers_f32_1024 on 80,90a,100 shared gemm_shared_bytes(Gemm::kCenters, 1024, true) <= 166912
