#include "cases.h"

#include <string.h>

namespace {

// What an output word is where the kernel did not write it.
constexpr uint32_t kUnwritten = 0xc3c3c3c3u;

// SplitMix64, of its own for each case: a new case leaves the others' inputs as they are.
class Random {
public:
    Random(uint64_t seed, const std::string& name) : state_(seed) {
        for (char letter : name) state_ = (state_ ^ uint64_t(letter)) * 0x100000001b3u;
    }
    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    uint32_t word() { return uint32_t(bits() >> 32); }
    uint32_t below(uint32_t limit) { return uint32_t(uint64_t(word()) * limit >> 32); }
    int within(int limit) { return int(below(uint32_t(2 * limit + 1))) - limit; }
    // A float32 of any sign and fraction, its biased exponent in [least, most].
    uint32_t number(uint32_t least, uint32_t most) {
        return (word() & 0x807fffffu) | (least + below(most - least + 1)) << 23;
    }

private:
    uint64_t state_;
};

float as_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

uint32_t as_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

double as_double(const std::vector<uint32_t>& words, size_t i) {
    double v;
    memcpy(&v, &words[i], 8);
    return v;
}

float power(int exponent) { return as_float(uint32_t(exponent + 127) << 23); }
float magnitude(float v) { return v < 0 ? -v : v; }

// The 16-bit floats: half has 5 bits of exponent and 10 of fraction, bfloat16 8 and 7.
struct Format {
    bool half;

    uint32_t fraction_bits() const { return half ? 10 : 7; }
    uint32_t bias() const { return half ? 15 : 127; }
    uint32_t infinity() const { return half ? 0x7c00 : 0x7f80; }
    // A NaN's lowest bit is set beside the highest.
    uint32_t nan() const { return infinity() | 1u << (fraction_bits() - 1) | 1; }
    // Of no more bits than the fraction has and one.
    uint32_t integer(int v) const {
        if (v == 0) return 0;
        const uint32_t of = uint32_t(v < 0 ? -v : v);
        const uint32_t exponent = 31 - uint32_t(__builtin_clz(of));
        const uint32_t fraction = (of << (fraction_bits() - exponent)) &
                                  ((1u << fraction_bits()) - 1);
        return (v < 0 ? 0x8000u : 0) | (exponent + bias()) << fraction_bits() | fraction;
    }
    // times 2^exponent; not of 0, and of no more than the exponent's range
    uint32_t scaled(int v, int exponent) const {
        return v == 0 ? 0 : integer(v) + uint32_t(exponent) * (1u << fraction_bits());
    }
    // Of a normal number.
    float value(uint32_t v) const {
        const int exponent = int((v & 0x7fff) >> fraction_bits()) - int(bias());
        const uint32_t fraction = (v & ((1u << fraction_bits()) - 1)) | 1u << fraction_bits();
        const float of = float(fraction) * power(exponent - int(fraction_bits()));
        return v & 0x8000 ? -of : of;
    }
};

// One product: A[m][k], B[k][n] as 16-bit values, C[m][n].
struct Product {
    uint32_t a[16][16] = {}, b[16][8] = {};
    float c[16][8] = {};
};

// The registers of mma m16n8k16, lane after lane, as ptx/mma.h has them.
void append_registers(const Product& p, std::vector<uint32_t>* to) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const uint32_t g = lane / 4, t = lane % 4 * 2;
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t row = g + i % 2 * 8, column = t + i / 2 * 8;
            to->push_back(p.a[row][column] | p.a[row][column + 1] << 16);
        }
        for (uint32_t i = 0; i < 2; ++i)
            to->push_back(p.b[t + 8 * i][g] | p.b[t + 8 * i + 1][g] << 16);
        for (uint32_t i = 0; i < 4; ++i) to->push_back(as_bits(p.c[g + i / 2 * 8][t + i % 2]));
    }
}

// How far two right answers may be apart. With T the sum of the magnitudes of the 17 addends, the
// tensor cores of these devices align the addends to the largest and cut them off at 2^-23 of it or
// finer, in one block of 16 or two of 8, and cut off each block's sum likewise (Fasi et al. 2021,
// "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330; the ISA leaves order and rounding
// open): at most (17 + 1 + 2) 2^-23 T from exact. Any order of float32 sums, which a model may
// have, is at most 16 2^-23 T from it.
void append_bounds(const Format& format, const Product& p, std::vector<float>* to) {
    for (uint32_t lane = 0; lane < 32; ++lane)
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = magnitude(p.c[row][column]);
            for (uint32_t k = 0; k < 16; ++k)
                sum += magnitude(format.value(p.a[row][k]) * format.value(p.b[k][column]));
            to->push_back(36 * power(-23) * sum);
        }
}

Case mma_case(bool half, const char* suffix, unsigned blocks) {
    const std::string kernel = half ? "mma_half" : "mma_bfloat";
    Case c{kernel + suffix, "golden_" + kernel, blocks, 32, 0, {}, {}};
    c.initial.assign(blocks * 128, kUnwritten);
    return c;
}

// Integers: exact in any order and any rounding. In one block some of A are infinite or NaN.
Case mma_integers(uint64_t seed, bool half) {
    const Format format{half};
    Case c = mma_case(half, "", 4);
    c.judgement = Judgement::kFloats;
    Random random(seed, c.name);
    const uint32_t special[] = {format.infinity(), 0x8000u | format.infinity(), format.nan()};
    for (unsigned block = 0; block < c.grid; ++block) {
        Product p;
        for (auto& row : p.a)
            for (auto& v : row)
                v = block == 1 && random.below(40) == 0 ? special[random.below(3)]
                                                        : format.integer(random.within(15));
        for (auto& row : p.b)
            for (auto& v : row) v = format.integer(random.within(15));
        for (auto& row : p.c)
            for (auto& v : row) v = float(random.within(4096));
        p.c[0][0] = p.c[15][7] = 8191;  // the first and the last output are not 0
        append_registers(p, &c.inputs);
    }
    return c;
}

// A is subnormal, B and the sums are small multiples: exact as the integers are, if subnormals are
// taken for what they are. The ISA leaves that open; the tensor cores do (Fasi et al.).
Case mma_subnormals(uint64_t seed, bool half) {
    const Format format{half};
    Case c = mma_case(half, "_subnormal", 2);
    c.judgement = Judgement::kFloats;
    Random random(seed, c.name);
    // A's unit is 2^-24 or 2^-133; B of bfloat16 is large enough to have normal products.
    const int scale = half ? 0 : 100;
    const float unit = power(half ? -24 : -33);
    for (unsigned block = 0; block < c.grid; ++block) {
        Product p;
        for (auto& row : p.a)
            for (auto& v : row)
                v = (random.word() & 0x8000u) | random.below(1u << format.fraction_bits());
        for (auto& row : p.b)
            for (auto& v : row) v = format.scaled(random.within(15), scale);
        for (auto& row : p.c)
            for (auto& v : row) v = float(random.within(500)) * unit;
        append_registers(p, &c.inputs);
    }
    return c;
}

Case mma_random(uint64_t seed, bool half) {
    const Format format{half};
    Case c = mma_case(half, "_random", 4);
    c.judgement = Judgement::kBounds;
    Random random(seed, c.name);
    const auto number = [&] {
        const uint32_t exponent = format.bias() - 6 + random.below(12);
        return (random.word() & (0x8000u | ((1u << format.fraction_bits()) - 1))) |
               exponent << format.fraction_bits();
    };
    for (unsigned block = 0; block < c.grid; ++block) {
        Product p;
        for (auto& row : p.a)
            for (auto& v : row) v = number();
        for (auto& row : p.b)
            for (auto& v : row) v = number();
        for (auto& row : p.c)
            for (auto& v : row) v = as_float(random.number(119, 133));
        append_registers(p, &c.inputs);
        append_bounds(format, p, &c.bounds);
    }
    return c;
}

// A case whose inputs are random words, all of them.
Case words_case(uint64_t seed, const char* name, unsigned grid, unsigned block, unsigned shared,
                size_t inputs, size_t outputs) {
    Case c{name, std::string("golden_") + name, grid, block, shared, {}, {}};
    Random random(seed, name);
    c.inputs.resize(inputs);
    for (auto& word : c.inputs) word = random.word();
    c.initial.assign(outputs, kUnwritten);
    return c;
}

Case ldmatrix_case(uint64_t seed, const char* name) {
    Case c = words_case(seed, name, 4, 32, 2048, 4 * 544, 4 * 128);
    for (size_t block = 0; block < 4; ++block)
        for (size_t lane = 0; lane < 32; ++lane) c.inputs[544 * block + lane] %= 128;
    return c;
}

Case copy_case(uint64_t seed, const char* name) {
    Case c = words_case(seed, name, 2, 64, 3 * 64 * 16, 2 * 3 * 64 * 5, 2 * 64 * 20);
    for (size_t block = 0; block < 2; ++block)
        for (size_t i = 0; i < 3 * 64; ++i) c.inputs[block * 3 * 64 * 5 + i] &= 1;
    return c;
}

// Amounts beyond the warp too: the instruction takes their lowest five bits.
Case shuffle_case(uint64_t seed, const char* name) {
    Case c = words_case(seed, name, 2, 64, 0, 2 * 64 * 6, 2 * 64 * 8);
    for (size_t thread = 0; thread < 2 * 64; ++thread)
        for (size_t i = 2; i < 6; ++i) c.inputs[6 * thread + i] %= 64;
    return c;
}

// Some blocks of few set bits, so that any() has both answers.
Case votes_case(uint64_t seed) {
    Case c = words_case(seed, "votes", 4, 96, 0, 4 * 96, 4 * 96 * 4);
    for (size_t thread = 0; thread < c.inputs.size(); ++thread)
        if (thread / 96 % 2 == 0) c.inputs[thread] &= c.inputs[(thread + 1) % 96] & ~2u;
    c.inputs[96 + 5] |= 0xff;
    return c;
}

// What a float32 can be that conversions find hard: ends of ranges, halfway between two results,
// and random bits.
std::vector<uint32_t> hard_floats(Random random, size_t count) {
    std::vector<uint32_t> v = {
        as_bits(1.5f), 0, 0x80000000u, as_bits(1.0f), 0x7f800000u, 0xff800000u,
        0x7fc00000u, 0xffc12345u, 0x7f800001u, 0x7fffffffu,  // NaNs
        0x7f7fffffu, 0xff7fffffu, 0x00800000u, 0x007fffffu, 1, 0x80000001u,
        // half: 65504, then what rounds to it, to infinity, 65536
        0x477fe000u, 0x477fefffu, 0x477ff000u, 0xc77ff000u, 0x47800000u,
        // 2^-14 and what is just below, 2^-24, 2^-25 (halfway to 0) and its neighbors, 3 2^-26
        0x38800000u, 0x387fffffu, 0x387fe000u, 0x387fdfffu, 0x33800000u, 0x33000000u, 0x33000001u,
        0x32ffffffu, 0x32c00000u,
        // bfloat16: halfway, the even one below and above; to infinity; subnormals halfway
        0x3f808000u, 0x3f818000u, 0x3f807fffu, 0x3f808001u, 0x7f7f8000u, 0x7f7f7fffu, 0x00008000u,
        0x00018000u, 0x00007fffu, 0x80008001u,
    };
    while (v.size() + 1 < count) {
        const uint32_t near = uint32_t(random.within(1));
        switch (random.below(5)) {
            // Halfway between two halves, normal and subnormal; between two bfloat16; beside them.
            case 0: v.push_back(((random.number(113, 142) & ~0x1fffu) | 0x1000u) + near); break;
            case 1: v.push_back(as_bits(float(2 * random.below(1024) + 1) * power(-25)) + near);
                break;
            case 2: v.push_back(((random.word() & ~0xffffu) | 0x8000u) + near); break;
            case 3: v.push_back(random.number(100, 145)); break;
            default: v.push_back(random.word());
        }
    }
    v.push_back(as_bits(2.5f));
    return v;
}

// A thread a value.
Case values_case(const char* name, Judgement judgement, std::vector<uint32_t> values,
                 unsigned words_a_value = 1) {
    const unsigned count = unsigned(values.size()) / words_a_value;
    Case c{name, std::string("golden_") + name, count / 64, 64, 0, std::move(values), {}};
    c.initial.assign(count, kUnwritten);
    c.judgement = judgement;
    return c;
}

constexpr size_t kValues = 1024;

Case to_case(uint64_t seed, const char* name) {
    return values_case(name, Judgement::kBits, hard_floats(Random(seed, name), kValues));
}

Case pack_case(uint64_t seed, const char* name) {
    const auto of = hard_floats(Random(seed, name), kValues);
    std::vector<uint32_t> pairs;
    for (size_t i = 0; i < kValues; ++i) {
        pairs.push_back(of[i]);
        pairs.push_back(of[(i * 37) % (kValues - 1)]);
    }
    return values_case(name, Judgement::kBits, pairs, 2);
}

// 16 bits: every exponent with the ends of its fractions, then random ones.
Case from_case(uint64_t seed, const char* name, bool half) {
    const Format format{half};
    Random random(seed, name);
    const uint32_t last = (1u << format.fraction_bits()) - 1;
    std::vector<uint32_t> v = {format.scaled(3, -1)};
    for (uint32_t exponent = 0; exponent < (half ? 32u : 256u); ++exponent)
        for (uint32_t fraction : {0u, last})
            v.push_back((random.word() & 0x8000u) | exponent << format.fraction_bits() | fraction);
    while (v.size() + 1 < kValues) v.push_back(random.word() & 0xffffu);
    v.push_back(format.scaled(5, -1));
    // A bfloat16 is widened by a shift.
    return values_case(name, half ? Judgement::kFloats : Judgement::kBits, v);
}

// The ISA gives ex2.approx.ftz 2 units in the last place; subnormal results are 0.
Case exp2_case(uint64_t seed) {
    Random random(seed, "exp2_approximate");
    std::vector<uint32_t> v = {as_bits(1.5f), 0, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u,
                               1, 0x807fffffu, as_bits(-126.0f), as_bits(-127.0f),
                               as_bits(-149.0f), as_bits(-150.5f), as_bits(127.0f),
                               as_bits(128.0f), as_bits(-1e30f), as_bits(1e30f)};
    for (int i = -125; i < 128; i += 9) v.push_back(as_bits(float(i)));
    while (v.size() + 1 < kValues)
        switch (random.below(4)) {
            // What the heads take: cosines times scale, less a bound, times log2 e.
            case 0: v.push_back(random.number(127, 133) | 0x80000000u); break;
            case 1: v.push_back(random.number(90, 132)); break;
            case 2: v.push_back(random.number(0, 126)); break;
            default: v.push_back(random.word());
        }
    v.push_back(as_bits(2.5f));
    return values_case("exp2_approximate", Judgement::kUlps, v);
}

// a, b, c: near one another so that sums cancel and round, then any bits.
Case float_case(uint64_t seed) {
    Random random(seed, "arithmetic_float");
    constexpr size_t kCount = 384;
    std::vector<uint32_t> v = {as_bits(1.5f), as_bits(2.5f), as_bits(0.25f)};
    while (v.size() < 3 * (kCount - 1))
        v.push_back(v.size() / 3 % 4 == 3 ? random.word() : random.number(112, 142));
    for (float last : {3.5f, 0.5f, 0.75f}) v.push_back(as_bits(last));
    Case c = values_case("arithmetic_float", Judgement::kFloats, v, 3);
    c.initial.assign(6 * kCount, kUnwritten);
    return c;
}

Case double_case(uint64_t seed) {
    Random random(seed, "arithmetic_double");
    constexpr size_t kCount = 256;
    std::vector<uint32_t> v;
    const auto push = [&](uint64_t bits) {
        v.push_back(uint32_t(bits));
        v.push_back(uint32_t(bits >> 32));
    };
    // 1.5, 2.5 and 0.25 first, 3.5, 0.5 and 0.75 last.
    for (uint64_t bits : {0x3ff80000u, 0x40040000u, 0x3fd00000u}) push(bits << 32);
    while (v.size() < 6 * (kCount - 1)) {
        uint64_t bits = random.bits();
        if (v.size() / 6 % 4 != 3)
            bits = (bits & 0x800fffffffffffffu) | uint64_t(1008 + random.below(30)) << 52;
        push(bits);
    }
    for (uint64_t bits : {0x400c0000u, 0x3fe00000u, 0x3fe80000u}) push(bits << 32);
    Case c = values_case("arithmetic_double", Judgement::kDoubles, v, 6);
    c.initial.assign(12 * kCount, kUnwritten);
    return c;
}

// Words of many, few and no bits.
Case integers_case(uint64_t seed) {
    Case c = words_case(seed, "integers", 4, 64, 0, 2 * 256, 3 * 256);
    for (size_t i = 0; i < 32; ++i) c.inputs[2 * i] = 1u << i;
    for (size_t i = 32; i < 128; ++i) c.inputs[2 * i] <<= i % 32;
    c.inputs[128] = 0;
    c.inputs[130] = c.inputs[131] = 0xffffffffu;
    return c;
}

Case atomics_case(uint64_t seed) {
    constexpr size_t kThreads = 256, kBlocks = 4;
    Case c = words_case(seed, "atomics", kBlocks, kThreads / kBlocks, 12, kThreads,
                        16 + 9 * kThreads + 3 * kBlocks);
    Random random(seed, "atomics' memory");
    for (size_t i = 0; i < 16; ++i) c.initial[i] = i == 4 ? 0xffffffffu : 0;
    for (size_t i = 0; i < 4 * kThreads; ++i) c.initial[16 + i] = random.word();
    return c;
}

Case prefetch_case(uint64_t seed) {
    Case c = words_case(seed, "prefetch_l2", 2, 128, 0, 512, 256);
    for (size_t i = 0; i < 256; ++i) c.inputs[i] %= 256;
    return c;
}

Case tile_case(uint64_t seed) {
    constexpr size_t kBlocks = 5, kInputs = 4 + 32 * 40;
    Case c = words_case(seed, "tile_load", kBlocks, 64, 4096, kBlocks * kInputs, kBlocks * 1024);
    for (size_t block = 0; block < kBlocks; ++block) {
        c.inputs[block * kInputs] = uint32_t(8 - block * 2);  // down to none
        c.inputs[block * kInputs + 1] = uint32_t(4 - block);
    }
    return c;
}

bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

}  // namespace

std::vector<Case> make_cases(uint64_t seed) {
    std::vector<Case> all;
    for (bool half : {true, false}) {
        all.push_back(mma_integers(seed, half));
        all.push_back(mma_subnormals(seed, half));
        all.push_back(mma_random(seed, half));
    }
    all.push_back(ldmatrix_case(seed, "ldmatrix_x4"));
    all.push_back(ldmatrix_case(seed, "ldmatrix_x4_transposed"));
    for (const char* name : {"copy_async", "copy_async_evict_first", "copy_async_evict_last"})
        all.push_back(copy_case(seed, name));
    for (const char* name : {"shuffle_xor", "shuffle", "shuffle_up"})
        all.push_back(shuffle_case(seed, name));
    all.push_back(votes_case(seed));
    all.push_back(words_case(seed, "sync_warp", 2, 64, 256, 128, 128));
    all.push_back(words_case(seed, "named_barrier", 2, 128, 512, 256, 256));
    all.push_back(to_case(seed, "to_half"));
    all.push_back(to_case(seed, "to_bfloat"));
    all.push_back(from_case(seed, "from_half", true));
    all.push_back(from_case(seed, "from_bfloat", false));
    all.push_back(pack_case(seed, "pack_half"));
    all.push_back(pack_case(seed, "pack_bfloat"));
    all.push_back(exp2_case(seed));
    all.push_back(float_case(seed));
    all.push_back(double_case(seed));
    all.push_back(integers_case(seed));
    all.push_back(atomics_case(seed));
    all.push_back(words_case(seed, "words", 2, 64, 0, 2 * 128, 6 * 128));
    all.push_back(prefetch_case(seed));
    all.push_back(tile_case(seed));
    return all;
}

bool agrees(const Case& c, const std::vector<uint32_t>& now, const std::vector<uint32_t>& kept,
            size_t i) {
    if (now[i] == kept[i]) return true;
    if (c.judgement == Judgement::kBits) return false;
    if (c.judgement == Judgement::kDoubles) {
        const double a = as_double(now, i / 2 * 2), b = as_double(kept, i / 2 * 2);
        return a != a && b != b;
    }
    if (is_nan(now[i]) || is_nan(kept[i])) return is_nan(now[i]) && is_nan(kept[i]);
    if (c.judgement == Judgement::kFloats) return false;
    const float a = as_float(now[i]), b = as_float(kept[i]);
    if (c.judgement == Judgement::kBounds) return magnitude(a - b) <= c.bounds[i];
    // A unit in the last place of v is v with its fraction 0, times 2^-23.
    const uint32_t larger = magnitude(a) > magnitude(b) ? now[i] : kept[i];
    if ((larger & 0x7f800000u) == 0x7f800000u) return false;
    return magnitude(a - b) <= 2 * as_float(larger & 0x7f800000u) * power(-23);
}
