// The fragments of the models behind kernels/ptx and the swizzle of kernels/tile/layout.h against
// CuTe's, element by element: a model and a kernel written from one reading of the PTX ISA can
// agree and be wrong.
//
// Of mma each element of a fragment is set alone to 1 in the registers; where CuTe has the element
// in its matrix says what the product must be. Of ldmatrix each register's 16 bits are looked for
// at the bit of shared memory that CuTe names. Swizzles are compared address by address.
//
// Each comparison is made again with layouts planted wrong by the probing kernels, and must then
// find differences.
//
// Needs the Python package nvidia-cutlass, which is not part of this project; the Makefile's
// `oracle` says how.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>
#include <cute/pointer_flagged.hpp>
#include <cute/swizzle_layout.hpp>
#include <stdio.h>
#include <string.h>

#include "probe.h"

namespace {

constexpr uint32_t kLanes = 32;

int failures = 0;

// Counts what differs, and tells of the first unless it was planted.
struct Comparison {
    std::string name;
    bool planted;
    unsigned elements = 0, differences = 0;

    void add(bool same, const std::string& element, double model, double cute) {
        ++elements;
        if (same) return;
        if (++differences == 1 && !planted)
            fprintf(stderr, "%s: %s: %g in the model, %g in CuTe's\n", name.c_str(),
                    element.c_str(), model, cute);
    }
};

std::string text(const char* format, unsigned a, unsigned b) {
    char line[128];
    snprintf(line, sizeof line, format, a, b);
    return line;
}

// The same comparison without and with each planted layout.
template <class Compare>
void judge(const std::string& name, int32_t plants, const Compare& compare) {
    Comparison right{name, false};
    compare(right, 0);
    if (right.elements == 0 || right.differences != 0) ++failures;
    int32_t refused = 0;
    for (int32_t wrong = 1; wrong <= plants; ++wrong) {
        Comparison planted{name, true};
        compare(planted, wrong);
        if (planted.differences > 0) ++refused;
        else fprintf(stderr, "%s: planted layout %d was not found\n", name.c_str(), wrong);
    }
    if (refused != plants) ++failures;
    printf("%-48s %6u elements, %u differ; %d of %d planted layouts refused\n", name.c_str(),
           right.elements, right.differences, refused, plants);
}

// A product of one-hot fragments a block.
template <class Traits>
void compare_mma(Comparison& comparison, int32_t wrong) {
    using namespace cute;
    using Value = typename Traits::ValTypeA;
    static_assert(is_same_v<Value, typename Traits::ValTypeB>);
    static_assert(is_same_v<typename Traits::ValTypeC, float>);
    constexpr uint32_t kM = 16, kN = 8, kK = 16;
    static_assert(is_same_v<typename Traits::Shape_MNK, Shape<_16, _8, _16>>);
    static_assert(size<1>(typename Traits::ALayout{}) == 8, "values of A in a lane");
    static_assert(size<1>(typename Traits::BLayout{}) == 4, "values of B in a lane");
    static_assert(size<1>(typename Traits::CLayout{}) == 4, "values of C in a lane");
    // From a lane and its value to row + rows * column; of B the column n counts first.
    const auto place_a = [](uint32_t l, uint32_t v) {
        return uint32_t(typename Traits::ALayout{}(int(l), int(v)));
    };
    const auto place_b = [](uint32_t l, uint32_t v) {
        return uint32_t(typename Traits::BLayout{}(int(l), int(v)));
    };
    const auto place_c = [](uint32_t l, uint32_t v) {
        return uint32_t(typename Traits::CLayout{}(int(l), int(v)));
    };
    // Integers up to 256: exact in both types, and so are products by 1.
    const auto value_a = [](uint32_t m, uint32_t k) { return float(1 + m + kM * k); };
    const auto value_b = [](uint32_t k, uint32_t n) { return float(1 + k + kK * n); };

    // Blocks: an element of A each, then of B, then of C.
    constexpr uint32_t kOfA = kM * kK, kOfB = kK * kN, kOfC = kM * kN;
    constexpr uint32_t kBlocks = kOfA + kOfB + kOfC;
    std::vector<Value> a(kBlocks * kLanes * 8, Value(0.0f)), b(kBlocks * kLanes * 4, Value(0.0f));
    std::vector<float> c(kBlocks * kLanes * 4, 0.0f);
    for (uint32_t block = 0; block < kBlocks; ++block) {
        const bool for_a = block < kOfA, for_b = !for_a && block < kOfA + kOfB;
        for (uint32_t l = 0; l < kLanes; ++l) {
            const uint32_t lane = block * kLanes + l;
            for (uint32_t v = 0; v < 8; ++v) {
                const uint32_t at = place_a(l, v);
                if (for_a) a[8 * lane + v] = Value(float(8 * l + v == block));
                if (for_b) a[8 * lane + v] = Value(value_a(at % kM, at / kM));
            }
            for (uint32_t v = 0; v < 4; ++v) {
                const uint32_t at = place_b(l, v);
                if (for_a) b[4 * lane + v] = Value(value_b(at / kN, at % kN));
                if (for_b) b[4 * lane + v] = Value(float(4 * l + v == block - kOfA));
                if (!for_a && !for_b)
                    c[4 * lane + v] = float(4 * l + v == block - kOfA - kOfB);
            }
        }
    }
    const auto registers = [](const std::vector<Value>& values) {
        static_assert(sizeof(Value) == 2);
        std::vector<uint32_t> words(values.size() / 2);
        memcpy(words.data(), values.data(), values.size() * 2);
        return words;
    };
    const auto d = probe_mma(is_same_v<Value, half_t>, wrong, registers(a), registers(b), c);

    for (uint32_t block = 0; block < kBlocks; ++block) {
        const bool for_a = block < kOfA, for_b = !for_a && block < kOfA + kOfB;
        const uint32_t element = for_a ? block : for_b ? block - kOfA : block - kOfA - kOfB;
        const uint32_t of_lane = for_a ? 8 : 4, l = element / of_lane, v = element % of_lane;
        const uint32_t one = for_a ? place_a(l, v) : for_b ? place_b(l, v) : place_c(l, v);
        bool same = true;
        double model = 0, cute = 0;
        for (uint32_t i = 0; i < kLanes * 4; ++i) {
            const uint32_t at = place_c(i / 4, i % 4), m = at % kM, n = at / kM;
            float expected = 0;
            if (for_a && m == one % kM) expected = value_b(one / kM, n);
            if (for_b && n == one % kN) expected = value_a(m, one / kN);
            if (!for_a && !for_b && at == one) expected = 1;
            const float got = d[block * kLanes * 4 + i];
            if (got == expected || !same) continue;
            same = false;
            model = got;
            cute = expected;
        }
        comparison.add(same,
                       std::string(for_a ? "A" : for_b ? "B" : "C") +
                           text(" of lane %u, value %u", l, v),
                       model, cute);
    }
}

// Value v of lane l, 16 bits each, is the bits from DstLayout(l, 16 v) on of what the lanes point
// to; SrcLayout says which lane's row that is.
template <class Traits>
void compare_ldmatrix(Comparison& comparison, bool transposed, int32_t wrong) {
    using namespace cute;
    const typename Traits::SrcLayout source_layout{};
    const typename Traits::DstLayout layout{};
    static_assert(size<0>(typename Traits::DstLayout{}) == 32, "lanes");
    static_assert(size<1>(typename Traits::DstLayout{}) == 128, "bits of a lane");
    // The row of lane l is another than the l-th of shared memory.
    std::vector<uint32_t> rows(kLanes);
    for (uint32_t l = 0; l < kLanes; ++l) rows[l] = (l * 11 + 5) % kLanes;
    std::vector<uint16_t> memory(kLanes * 8);
    for (uint32_t i = 0; i < memory.size(); ++i) memory[i] = uint16_t(i * 257 + 3);
    const auto got = probe_ldmatrix(transposed, wrong, memory, rows);

    std::vector<std::pair<uint32_t, uint32_t>> owner(kLanes * 128);  // lane, bit
    for (uint32_t l = 0; l < kLanes; ++l)
        for (uint32_t bit = 0; bit < 128; ++bit)
            owner[uint32_t(source_layout(int(l), int(bit)))] = {l, bit};
    for (uint32_t l = 0; l < kLanes; ++l)
        for (uint32_t bit = 0; bit < 128; ++bit) {
            const auto from = owner[uint32_t(layout(int(l), int(bit)))];
            const uint32_t expected =
                memory[rows[from.first] * 8 + from.second / 16] >> from.second % 16 & 1;
            const uint32_t found = got[4 * l + bit / 32] >> bit % 32 & 1;
            comparison.add(found == expected, text("lane %u, bit %u", l, bit), found, expected);
        }
}

// `layout` is from a 16-bit value's row and column to its place, in values.
template <class Layout>
void compare_swizzle(Comparison& comparison, uint32_t columns, int32_t wrong,
                     const Layout& layout) {
    constexpr uint32_t kRows = 128;
    const uint32_t pieces = columns / 8;
    const auto got = probe_swizzle(columns, wrong);
    for (uint32_t row = 0; row < kRows; ++row)
        for (uint32_t column = 0; column < columns; ++column) {
            const uint32_t model = got[row * pieces + column / 8] + column % 8 * 2;
            const uint32_t cute = 2 * uint32_t(layout(int(row), int(column)));
            comparison.add(model == cute, text("row %u, column %u", row, column), model, cute);
        }
}

template <int kBits, int kBase, int kShift, int kColumns>
void judge_swizzle() {
    using namespace cute;
    const auto layout =
        composition(Swizzle<kBits, kBase, kShift>{},
                    Layout<Shape<_128, Int<kColumns>>, Stride<Int<kColumns>, _1>>{});
    char name[64];
    snprintf(name, sizeof name, "128 x %d, Swizzle<%d, %d, %d>", kColumns, kBits, kBase, kShift);
    judge(name, 1, [&](Comparison& comparison, int32_t wrong) {
        compare_swizzle(comparison, kColumns, wrong, layout);
    });
}

// The atoms that tensor memory access and wgmma know, repeated over 128 rows.
template <class Atom, int kColumns>
void judge_atom(const char* name) {
    using namespace cute;
    const auto layout = as_position_independent_swizzle_layout(
        tile_to_shape(Atom{}, Shape<_128, Int<kColumns>>{}));
    judge(name, 1, [&](Comparison& comparison, int32_t wrong) {
        compare_swizzle(comparison, kColumns, wrong, layout);
    });
}

}  // namespace

int main() {
    using namespace cute;
    judge("SM80_16x8x16_F32F16F16F32_TN", 4, [](Comparison& comparison, int32_t wrong) {
        compare_mma<MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>>(comparison, wrong);
    });
    judge("SM80_16x8x16_F32BF16BF16F32_TN", 4, [](Comparison& comparison, int32_t wrong) {
        compare_mma<MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>>(comparison, wrong);
    });
    judge("SM75_U32x4_LDSM_N", 2, [](Comparison& comparison, int32_t wrong) {
        compare_ldmatrix<Copy_Traits<SM75_U32x4_LDSM_N>>(comparison, false, wrong);
    });
    judge("SM75_U16x8_LDSM_T", 2, [](Comparison& comparison, int32_t wrong) {
        compare_ldmatrix<Copy_Traits<SM75_U16x8_LDSM_T>>(comparison, true, wrong);
    });
    // Of a place in values, bits 3 and on are turned by those of the row: its lowest three; of rows
    // of 32 values two, from the second on.
    judge_swizzle<2, 3, 3, 32>();
    judge_swizzle<3, 3, 3, 64>();
    judge_swizzle<3, 3, 4, 128>();
    judge_swizzle<3, 3, 5, 256>();
    judge_swizzle<3, 3, 6, 512>();
    judge_swizzle<3, 3, 7, 1024>();
    judge_atom<GMMA::Layout_K_SW64_Atom<half_t>, 32>("GMMA::Layout_K_SW64_Atom");
    judge_atom<GMMA::Layout_K_SW128_Atom<half_t>, 64>("GMMA::Layout_K_SW128_Atom");
    const std::string findings = probe_findings();
    if (!findings.empty()) ++failures;
    if (failures) fprintf(stderr, "%d failures\n", failures);
    return failures ? 1 : 0;
}
