// Tile shapes of the GEMM kernels: every number that is a matter of speed, and its reason.
//
// gemm_tile gives the shape of an entry to the kernels and to the tests. The host's launch table
// (src/device/cuda/products.rs) repeats threads, dynamic shared bytes and stages; a test compares
// it with the static_asserts below.
//
// Budgets: an SM has 65536 registers, and for a CTA 163 KiB (sm_80), 227 KiB (sm_90) or 99 KiB
// (sm_86, sm_89, sm_120) of shared memory. Registers decide how many CTAs fit an SM: two of 256
// threads with 128 registers each or of 128 threads with 255, one of 256 threads with 255.
#pragma once

#include <stdint.h>

// What is compared with what ships, on a GPU (the check's stage `variants`), by `kernels/gates
// --variant` and on the emulator: a source compiled with -DPFC_VARIANT=name. Whatever a variant
// chooses, it chooses in this file. `of`: the sources that it changes, of a step in half precision.
enum class Variant {
    shipped,
    // of gemm_numerators gemm_weighted_centers gemm_cosines: the tile of a warp that was before 64 x
    // 64. Half the accumulators, so that registers are left, and a half more reads of shared memory.
    warps_64x32,
    // of gemm_numerators gemm_weighted_centers gemm_cosines: half the barriers, and lines of 128
    // bytes of what lies along the depth, where 3 stages of 32 read 64 of a row at a time. 64 KiB a
    // CTA: two share an SM of sm_80, sm_90 and sm_100 alone.
    two_stages_of_64,
    // of gemm_center_gradient_half: whether the prefetch of the rows gains anything at all.
    no_prefetch,
    // of gemm_center_gradient_half: when the tile begins. P then streams through the cache behind
    // the rows and may throw them out.
    early_prefetch,
    // of gemm_center_gradient_half: an address for each line of 128 bytes, not for each sector of
    // 32. A quarter of the instructions, if the cache fetches whole lines.
    line_prefetch,
    // of gemm_weighted_centers gemm_center_gradient_half: P leaves the second-level cache first, it
    // is read once a product; W^ and E', which every tile reads, leave it last.
    cache_hints,
};

#ifndef PFC_VARIANT
#define PFC_VARIANT shipped
#endif
constexpr Variant kVariant = Variant::PFC_VARIANT;

enum class Gemm {
    kNumerators,       // P = exp(scale E^ W^.T - c); the cosines have the same tiles
    kWeightedCenters,  // P W^
    kCenterGradient,   // P.T E', whole rows
};

struct GemmTile {
    int m, n, k;           // rows and columns of the product that a CTA owns; depth of a stage
    int stages;            // of the cp.async pipeline, 2 to 4
    int warps_m, warps_n;  // how the CTA's warps divide m x n
    int ctas_per_sm;       // that the registers must allow
    // Hints for the second-level cache: the left operand passes through, the right one stays.
    bool hints = false;

    constexpr int threads() const { return 32 * warps_m * warps_n; }
    constexpr int warp_m() const { return m / warps_m; }
    constexpr int warp_n() const { return n / warps_n; }
    constexpr int stage_bytes() const { return 2 * k * (m + n); }
    constexpr int pipeline_bytes() const { return stages * stage_bytes(); }
};

// A warp has 64 x 64: it reads 4 KiB of shared memory for 32 products of 16 x 8 x 16, where 64 x 32
// would read 3 KiB for 16 and have the memory decide. Four such warps, so that two CTAs share an SM
// and the exponentials of one run during the products of the other. 3 stages of 16 KiB: two CTAs
// fit the 99 KiB of the small devices.
constexpr bool kDeepStages = kVariant == Variant::two_stages_of_64;
constexpr GemmTile kSquareTile = {
    /*m=*/128, /*n=*/128, /*k=*/kDeepStages ? 64 : 32, /*stages=*/kDeepStages ? 2 : 3,
    /*warps_m=*/2, /*warps_n=*/kVariant == Variant::warps_64x32 ? 4 : 2, /*ctas_per_sm=*/2,
};

// The center gradient: a warp owns all classes of the CTA and an eighth of the row. So a class's
// coefficients are the same for a whole warp row, and a row's dot product is a sum of eight
// numbers. 128 accumulators a thread leave room for the optimizer's operands, with one CTA an SM.
// The shapes are named for the columns of a row that they take.
//
// 64 classes: 32 accumulators a thread, so that two CTAs share an SM, 2 x 48 KiB.
constexpr GemmTile kRowTile128 = {
    /*m=*/64, /*n=*/128, /*k=*/32, /*stages=*/4,
    /*warps_m=*/1, /*warps_n=*/8, /*ctas_per_sm=*/2,
};
// 24 KiB a stage; 4 of them fit every device.
constexpr GemmTile kRowTile256 = {
    /*m=*/128, /*n=*/256, /*k=*/32, /*stages=*/4,
    /*warps_m=*/1, /*warps_n=*/8, /*ctas_per_sm=*/1,
};
// 36 KiB a stage: 2 fit the small devices, 4 the others.
constexpr GemmTile kRowTile512 = {
    /*m=*/64, /*n=*/512, /*k=*/32, /*stages=*/2,
    /*warps_m=*/1, /*warps_n=*/8, /*ctas_per_sm=*/1,
};
// 33 KiB a stage of half the depth: with a depth of 32 the small devices would have one stage.
constexpr GemmTile kRowTile1024 = {
    /*m=*/32, /*n=*/1024, /*k=*/16, /*stages=*/2,
    /*warps_m=*/1, /*warps_n=*/8, /*ctas_per_sm=*/1,
};

// Widths of the center gradient; the host chooses the narrowest that d fits into. It refuses a head
// of more (UNSUPPORTED): a row would not fit the accumulators of a CTA.
constexpr int kRowWidths[] = {128, 256, 512, 1024};

constexpr int row_width(int dim) {
    for (int width : kRowWidths) {
        if (dim <= width) {
            return width;
        }
    }
    return 0;
}

// `width` and `deep` are for the center gradient. `deep` is for devices that give a CTA 163 KiB of
// shared memory; it changes the stages alone, which the host passes to the kernel.
constexpr GemmTile gemm_tile(Gemm gemm, int width = 0, bool deep = false) {
    GemmTile tile = gemm != Gemm::kCenterGradient ? kSquareTile
                    : width == 128                ? kRowTile128
                    : width == 256                ? kRowTile256
                    : width == 512                ? kRowTile512
                                                  : kRowTile1024;
    // Rows of 256 leave no registers for them on sm_90.
    tile.hints = kVariant == Variant::cache_hints && gemm != Gemm::kNumerators && width != 256;
    if (deep && width >= 512) {
        tile.stages = 4;
    }
    return tile;
}

// When the center gradient asks the second-level cache for the rows that its epilogue reads: at a
// tile's beginning, or when a quarter of the main loop is left, since P streams through the cache
// as well. And how many floats apart its addresses are: a sector, since PTX promises no more of a
// line.
enum class Prefetch { kNever, kEarly, kLate };
constexpr Prefetch kPrefetch = kVariant == Variant::no_prefetch      ? Prefetch::kNever
                               : kVariant == Variant::early_prefetch ? Prefetch::kEarly
                                                                     : Prefetch::kLate;
constexpr uint32_t kPrefetchFloats = kVariant == Variant::line_prefetch ? 32 : 8;

// Columns that the weighted centers add up in the tensor cores' accumulators before they add those
// to the sums in memory. The accumulators cut each sum toward zero instead of rounding it (Fasi et
// al. 2021, doi:10.7717/peerj-cs.330), so that a long sum of positive numbers drifts: by 1e-5 of
// itself over 8000 columns, by 1e-4 over 60000. In half P is rounded by up to 2e-3. Adding to
// memory costs 8 bytes for each row and d: beside the products of as many columns a fiftieth at
// 32768 in half, and a fortieth at 4096 in f32, which makes six products.
constexpr uint32_t accumulated_columns(int planes) { return planes == 1 ? 32768 : 4096; }

// Words beside the pipeline. Numerators: one for each row's mask and four of the softmax. Center
// gradient: for each class its row, 1 / norm and positive.
constexpr int kNumeratorWords = 128 + 4;
constexpr int kClassWords = 3;

constexpr int gemm_shared_bytes(Gemm gemm, int width = 0, bool deep = false) {
    const GemmTile tile = gemm_tile(gemm, width, deep);
    const int words = gemm == Gemm::kNumerators       ? kNumeratorWords
                      : gemm == Gemm::kCenterGradient ? kClassWords * tile.m
                                                      : 0;
    return tile.pipeline_bytes() + 4 * words;
}

constexpr int kNumeratorsShared = gemm_shared_bytes(Gemm::kNumerators);
constexpr int kWeightedShared = gemm_shared_bytes(Gemm::kWeightedCenters);
constexpr int kCosinesShared = kSquareTile.pipeline_bytes();
constexpr int kGradShared128 = gemm_shared_bytes(Gemm::kCenterGradient, 128);
constexpr int kGradShared256 = gemm_shared_bytes(Gemm::kCenterGradient, 256);
constexpr int kGradShared512 = gemm_shared_bytes(Gemm::kCenterGradient, 512);
constexpr int kGradShared512Deep = gemm_shared_bytes(Gemm::kCenterGradient, 512, true);
constexpr int kGradShared1024 = gemm_shared_bytes(Gemm::kCenterGradient, 1024);
constexpr int kGradShared1024Deep = gemm_shared_bytes(Gemm::kCenterGradient, 1024, true);

// The host's launch table has these numbers; a variant tells its own (launches.cpp).
static_assert(kDeepStages || kNumeratorsShared == 49680, "");
static_assert(kDeepStages || kWeightedShared == 49152, "");
static_assert(kDeepStages || kCosinesShared == 49152, "");
static_assert(kGradShared128 == 49920, "");
static_assert(kGradShared256 == 99840, "");
static_assert(kGradShared512 == 74496, "");
static_assert(kGradShared512Deep == 148224, "");
static_assert(kGradShared1024 == 67968, "");
static_assert(kGradShared1024Deep == 135552, "");
static_assert(gemm_tile(Gemm::kCenterGradient, 128).stages == 4, "");
static_assert(gemm_tile(Gemm::kCenterGradient, 256).stages == 4, "");
static_assert(gemm_tile(Gemm::kCenterGradient, 512).stages == 2, "");
static_assert(gemm_tile(Gemm::kCenterGradient, 512, true).stages == 4, "");
static_assert(gemm_tile(Gemm::kCenterGradient, 1024).stages == 2, "");
static_assert(gemm_tile(Gemm::kCenterGradient, 1024, true).stages == 4, "");

// Limits of the entries, see kernels/gates. Where two CTAs share an SM each may have half of its
// registers and of the 100 KiB that the small devices have, less 1 KiB, which the system takes.
//
// gate: gemm_numerators_half registers <= 255 shared kNumeratorsShared <= 50176 HMMA 64
// gate: gemm_numerators_half_far registers <= 255 shared kNumeratorsShared <= 50176 HMMA 64
// gate: gemm_weighted_centers_half registers <= 255 shared kWeightedShared <= 50176 HMMA 64
// gate: gemm_center_gradient_half_128 registers <= 128 shared kGradShared128 <= 50176 HMMA 16
// gate: gemm_center_gradient_half_256 registers <= 255 shared kGradShared256 <= 101376 HMMA 64
// gate: gemm_center_gradient_half_512 registers <= 255 shared kGradShared512 <= 101376 HMMA 64
// gate: gemm_center_gradient_half_512 on 80,90a,100 shared kGradShared512Deep <= 166912
// gate: gemm_center_gradient_half_1024 registers <= 255 shared kGradShared1024 <= 101376 HMMA 32
// gate: gemm_center_gradient_half_1024 on 80,90a,100 shared kGradShared1024Deep <= 166912
//
// gate: gemm_numerators_f32 registers <= 255 shared kNumeratorsShared <= 50176 HMMA 64
// gate: gemm_numerators_f32_far registers <= 255 shared kNumeratorsShared <= 50176 HMMA 64
// gate: gemm_weighted_centers_f32 registers <= 255 shared kWeightedShared <= 50176 HMMA 64
// gate: gemm_center_gradient_f32_128 registers <= 128 shared kGradShared128 <= 50176 HMMA 16
// gate: gemm_center_gradient_f32_256 registers <= 255 shared kGradShared256 <= 101376 HMMA 64
// gate: gemm_center_gradient_f32_512 registers <= 255 shared kGradShared512 <= 101376 HMMA 64
// gate: gemm_center_gradient_f32_512 on 80,90a,100 shared kGradShared512Deep <= 166912
// gate: gemm_center_gradient_f32_1024 registers <= 255 shared kGradShared1024 <= 101376 HMMA 32
// gate: gemm_center_gradient_f32_1024 on 80,90a,100 shared kGradShared1024Deep <= 166912
//
// gate: gemm_cosines registers <= 255 shared kCosinesShared <= 49152 HMMA 64
//
// Those of variants. Where two CTAs of 64 KiB share an SM, each may have half of 164 KiB less 2.
//
// gate: gemm_numerators_half of warps_64x32 registers <= 128 HMMA 32 traffic <= 63
// gate: gemm_numerators_half_far of warps_64x32 registers <= 128 HMMA 32 traffic <= 63
// gate: gemm_weighted_centers_half of warps_64x32 registers <= 128 HMMA 32 traffic <= 63
// gate: gemm_numerators_f32 of warps_64x32 registers <= 128 HMMA 32 traffic <= 63
// gate: gemm_numerators_f32_far of warps_64x32 registers <= 128 HMMA 32 traffic <= 63
// gate: gemm_weighted_centers_f32 of warps_64x32 registers <= 128 HMMA 32 traffic <= 63
// gate: gemm_cosines of warps_64x32 registers <= 128 HMMA 32 traffic <= 63
//
// gate: gemm_numerators_half of two_stages_of_64 shared kNumeratorsShared <= 82944 HMMA 128
// gate: gemm_numerators_half_far of two_stages_of_64 shared kNumeratorsShared <= 82944 HMMA 128
// gate: gemm_weighted_centers_half of two_stages_of_64 shared kWeightedShared <= 82944 HMMA 128
// gate: gemm_numerators_f32 of two_stages_of_64 shared kNumeratorsShared <= 82944 HMMA 128
// gate: gemm_numerators_f32_far of two_stages_of_64 shared kNumeratorsShared <= 82944 HMMA 128
// gate: gemm_weighted_centers_f32 of two_stages_of_64 shared kWeightedShared <= 82944 HMMA 128
// gate: gemm_cosines of two_stages_of_64 shared kCosinesShared <= 82944 HMMA 128
//
// Bytes through shared memory for 1000 floating-point operations of the main loop. ldmatrix and
// cp.async move 1000 (1 / warp_m + 1 / warp_n + 1 / m + 1 / n). With more than 62.5 of them shared
// memory takes longer than mma.sync even on sm_80. The widest center gradient copies a quarter of
// a vector for each thread, which counts as a whole one.
//
// gate: gemm_numerators_half traffic <= 47
// gate: gemm_numerators_half_far traffic <= 47
// gate: gemm_weighted_centers_half traffic <= 47
// gate: gemm_center_gradient_half_128 traffic <= 102
// gate: gemm_center_gradient_half_256 traffic <= 51
// gate: gemm_center_gradient_half_512 traffic <= 49
// gate: gemm_center_gradient_half_1024 traffic <= 75
//
// gate: gemm_numerators_f32 traffic <= 47
// gate: gemm_numerators_f32_far traffic <= 47
// gate: gemm_weighted_centers_f32 traffic <= 47
// gate: gemm_center_gradient_f32_128 traffic <= 102
// gate: gemm_center_gradient_f32_256 traffic <= 51
// gate: gemm_center_gradient_f32_512 traffic <= 49
// gate: gemm_center_gradient_f32_1024 traffic <= 75
//
// gate: gemm_cosines traffic <= 47
