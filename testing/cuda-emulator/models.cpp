// Models of the instructions behind kernels/ptx: shuffles, votes, ldmatrix, mma.sync, cp.async,
// atomics.
//
// Fragment layouts are those of the PTX ISA's m16n8k16 and ldmatrix figures; kernels/ptx/mma.h and
// ldmatrix.h repeat them.
//
// The ISA leaves the rounding of mma.sync open. Here the 16 products and the sum before are added
// as if exactly, and what float32 does not hold of that is cut off, as the tensor cores do (Fasi et
// al. 2021, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330): a long sum is drawn to
// 0, which rounding to nearest would hide.
#include <math.h>
#include <string.h>

#include "access.h"
#include "findings.h"

namespace simt {
namespace {

#define HERE __builtin_return_address(0)

struct ShuffleLane {
    uint64_t value, result;
    uint32_t amount;
};

template <Shuffle kKind>
void model_shuffle(void* const* lanes) {
    for (uint32_t l = 0; l < 32; ++l) {
        ShuffleLane& mine = *static_cast<ShuffleLane*>(lanes[l]);
        // The instruction takes the amount's lowest five bits.
        const uint32_t amount = mine.amount % 32;
        uint32_t from = amount;
        if (kKind == Shuffle::kXor) from = l ^ amount;
        // Below the warp a thread gets its own value.
        if (kKind == Shuffle::kUp) from = amount > l ? l : l - amount;
        mine.result = static_cast<ShuffleLane*>(lanes[from])->value;
    }
}

struct BallotLane {
    bool said;
    uint32_t result;
};

void model_ballot(void* const* lanes) {
    uint32_t all = 0;
    for (uint32_t l = 0; l < 32; ++l)
        all |= uint32_t(static_cast<BallotLane*>(lanes[l])->said) << l;
    for (uint32_t l = 0; l < 32; ++l) static_cast<BallotLane*>(lanes[l])->result = all;
}

void model_sync(void* const*) { join_warp(); }

struct MatrixLane {
    uint32_t* r;
    const unsigned char* row;
};

template <bool kTransposed>
void model_ldmatrix(void* const* lanes) {
    for (uint32_t l = 0; l < 32; ++l) {
        uint32_t* r = static_cast<MatrixLane*>(lanes[l])->r;
        for (uint32_t m = 0; m < 4; ++m) {
            if (!kTransposed) {
                memcpy(&r[m], static_cast<MatrixLane*>(lanes[m * 8 + l / 4])->row + l % 4 * 4, 4);
                continue;
            }
            uint16_t pair[2];
            for (uint32_t i = 0; i < 2; ++i)
                memcpy(&pair[i], static_cast<MatrixLane*>(lanes[m * 8 + l % 4 * 2 + i])->row
                    + l / 4 * 2, 2);
            r[m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
        }
    }
}

struct MmaLane {
    float* d;
    uint32_t a[4], b[2];
};

inline float as_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

template <bool kHalf>
inline float widen(uint32_t pair, uint32_t high) {
    if (!kHalf) return as_float(high ? pair & 0xffff0000u : pair << 16);
    const uint32_t v = pair >> (16 * high), magnitude = (v & 0x7fffu) << 13;
    const uint32_t sign = (v & 0x8000u) << 16;
    if (magnitude >= 0x0f800000u) return as_float(sign | 0x7f800000u | magnitude);
    float scaled = as_float(magnitude) * 0x1p112f;
    return sign ? -scaled : scaled;
}

// To float32, toward 0.
inline float cut(double v) {
    const float nearest = float(v);
    if (!(fabs(double(nearest)) > fabs(v)) || isinf(nearest)) return nearest;
    uint32_t bits;
    memcpy(&bits, &nearest, 4);
    return as_float(bits - 1);
}

// Where the kernels' tests spend most of their time: compiled once for each width of the CPU's
// registers. A product of two halves is exact in double, so a fused multiply-add gives the same
// bits.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "arch=haswell", "default")))
#endif
void multiply_add(const double (*a)[16], const double (*b)[8], double (*d)[8]) {
    typedef double Row __attribute__((vector_size(64)));
    // Four rows at a time, so that no sum waits for itself.
    for (uint32_t m = 0; m < 16; m += 4) {
        Row rows[4];
        memcpy(rows, d[m], sizeof rows);
        for (uint32_t k = 0; k < 16; ++k) {
            const Row right = *reinterpret_cast<const Row*>(b[k]);
            for (uint32_t i = 0; i < 4; ++i) rows[i] += a[m + i][k] * right;
        }
        memcpy(d[m], rows, sizeof rows);
    }
}

template <bool kHalf>
void model_mma(void* const* lanes) {
    alignas(64) double a[16][16], b[16][8], d[16][8];
    for (uint32_t l = 0; l < 32; ++l) {
        const MmaLane& lane = *static_cast<MmaLane*>(lanes[l]);
        const uint32_t g = l / 4, t = l % 4 * 2;
        for (uint32_t i = 0; i < 2; ++i) {
            a[g][t + i] = widen<kHalf>(lane.a[0], i);
            a[g + 8][t + i] = widen<kHalf>(lane.a[1], i);
            a[g][t + 8 + i] = widen<kHalf>(lane.a[2], i);
            a[g + 8][t + 8 + i] = widen<kHalf>(lane.a[3], i);
            b[t + i][g] = widen<kHalf>(lane.b[0], i);
            b[t + 8 + i][g] = widen<kHalf>(lane.b[1], i);
            d[g][t + i] = lane.d[i];
            d[g + 8][t + i] = lane.d[2 + i];
        }
    }
    multiply_add(a, b, d);
    for (uint32_t l = 0; l < 32; ++l) {
        float* r = static_cast<MmaLane*>(lanes[l])->d;
        const uint32_t g = l / 4, t = l % 4 * 2;
        r[0] = cut(d[g][t]);
        r[1] = cut(d[g][t + 1]);
        r[2] = cut(d[g + 8][t]);
        r[3] = cut(d[g + 8][t + 1]);
    }
}

// The cells of 16 bytes of shared memory.
Cell* shared_cells(const void* at) {
    return shared_memory.cells + (uintptr_t(at) - shared_memory.range_begin) / 4;
}

// Lets a copy's bytes arrive, for the thread that waited: its own write from now on.
void land(const Copy& copy) {
    Cell* cells = shared_cells(copy.to);
    for (int i = 0; i < 4; ++i) {
        cells[i].pending = 0;
        touch(cells[i], 15, Access::kWrite);
    }
    if (copy.landed) memcpy(copy.to, copy.bytes, 16);
    else if (copy.from) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint64_t value, uint32_t amount) {
    ShuffleLane mine = {value, 0, amount};
    if (kind == Shuffle::kXor) meet_warp("shuffle_xor", &model_shuffle<Shuffle::kXor>, &mine);
    else if (kind == Shuffle::kIndex) meet_warp("shuffle", &model_shuffle<Shuffle::kIndex>, &mine);
    else meet_warp("shuffle_up", &model_shuffle<Shuffle::kUp>, &mine);
    return mine.result;
}

uint32_t ballot(bool said) {
    BallotLane mine = {said, 0};
    meet_warp("ballot", &model_ballot, &mine);
    return mine.result;
}

void sync_warp() { meet_warp("sync_warp", &model_sync, nullptr); }

void mma_half(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1) {
    MmaLane mine = {d, {a0, a1, a2, a3}, {b0, b1}};
    meet_warp("mma_half", &model_mma<true>, &mine);
}

void mma_bfloat(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
    MmaLane mine = {d, {a0, a1, a2, a3}, {b0, b1}};
    meet_warp("mma_bfloat", &model_mma<false>, &mine);
}

void ldmatrix_x4(uint32_t* r, const void* row, bool transposed) {
    if (!is_shared(uintptr_t(row)))
        fault("ldmatrix of " + describe(uintptr_t(row)) + ", not of shared memory");
    check_memory(uintptr_t(row), 16, Access::kRead, true, HERE);
    MatrixLane mine = {r, static_cast<const unsigned char*>(row)};
    if (transposed) meet_warp("ldmatrix_x4_transposed", &model_ldmatrix<true>, &mine);
    else meet_warp("ldmatrix_x4", &model_ldmatrix<false>, &mine);
}

void copy_async_16(void* shared, const void* global, bool valid) {
    if (!is_shared(uintptr_t(shared)))
        fault("copy_async_16 to " + describe(uintptr_t(shared)) + ", not to shared memory");
    if (valid && is_shared(uintptr_t(global))) fault("copy_async_16 from shared memory");
    if (uintptr_t(global) % 16 != 0)
        fault("misaligned: copy_async_16 from " + describe(uintptr_t(global)));
    if (valid) check_access(uintptr_t(global), 16, Access::kRead, true, HERE);
    check_memory(uintptr_t(shared), 16, Access::kWrite, true, HERE);
    Thread& thread = *current_thread();
    Copy copy = {shared, valid ? global : nullptr, false, {}, thread.groups};
    // The source is read at some moment between here and the wait.
    if (valid && choose(2)) {
        memcpy(copy.bytes, global, 16);
        copy.landed = true;
    }
    thread.copies.push_back(copy);
    memset(shared, 0xff, 16);
    Cell* cells = shared_cells(shared);
    for (int i = 0; i < 4; ++i) cells[i].pending = uint16_t(threadIdx.x + 1);
}

void copy_async_commit() { ++current_thread()->groups; }

void copy_async_wait(int groups) {
    Thread& thread = *current_thread();
    size_t landed = 0;
    while (landed < thread.copies.size() &&
           thread.copies[landed].group + uint32_t(groups) < thread.groups)
        land(thread.copies[landed++]);
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + ptrdiff_t(landed));
}

uint32_t atomic_add(uint32_t* at, uint32_t v) {
    check_access(uintptr_t(at), 4, Access::kAtomic, true, HERE);
    const uint32_t before = *at;
    *at = before + v;
    return before;
}

uint64_t atomic_add(uint64_t* at, uint64_t v) {
    check_access(uintptr_t(at), 8, Access::kAtomic, true, HERE);
    const uint64_t before = *at;
    *at = before + v;
    return before;
}

uint32_t atomic_or(uint32_t* at, uint32_t v) {
    check_access(uintptr_t(at), 4, Access::kAtomic, true, HERE);
    const uint32_t before = *at;
    *at = before | v;
    return before;
}

uint32_t atomic_min(uint32_t* at, uint32_t v) {
    check_access(uintptr_t(at), 4, Access::kAtomic, true, HERE);
    const uint32_t before = *at;
    if (v < before) *at = v;
    return before;
}

void prefetch(const void*) {}

}  // namespace simt
