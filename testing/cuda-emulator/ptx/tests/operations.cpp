// The translator's opcodes, run by the kernels of opcodes.ptx, against definitions that are
// written here once more and in another way: bit by bit, in wider integers, by exact comparison.
#include "harness.h"

#include <algorithm>
#include <limits>

namespace {

constexpr uint32_t kInputs = 4, kOutputs = 24;

using Words = std::vector<uint64_t>;

// Runs an entry on cases of four operands; the results of case i begin at kOutputs * i.
Words run(const char* entry, const Words& inputs) {
    const auto cases = uint32_t(inputs.size() / kInputs);
    Words padded = inputs;
    const uint32_t threads = (cases + 31) / 32 * 32;
    padded.resize(size_t(threads) * kInputs, 0);
    Buffer<uint64_t> in(padded), out(size_t(threads) * kOutputs, 0);
    launch(entry, 1, threads, 4096, in.device(), out.device());
    Words results = out.host();
    results.resize(size_t(cases) * kOutputs);
    return results;
}

bool same(const char* what, uint64_t got, uint64_t expected) {
    if (got != expected)
        fprintf(stderr, "%s is %#llx, expected %#llx\n", what, (unsigned long long)got,
                (unsigned long long)expected);
    return got == expected;
}

#define SAME(got, expected) CHECK(same(#expected, got, expected))

template <class To, class From>
To as(From v) {
    To to;
    static_assert(sizeof to == sizeof v, "the same bits");
    memcpy(&to, &v, sizeof v);
    return to;
}

uint64_t bits(double v) { return as<uint64_t>(v); }
uint64_t bits(float v) { return as<uint32_t>(v); }

uint64_t number(Random& random) { return random.bits() >> 32; }

// --- integers, bit by bit ------------------------------------------------------------------------

bool bit(uint64_t v, int64_t i) { return i >= 0 && i < 64 && (v >> i & 1); }

template <class F>
uint64_t build(int width, F each) {
    uint64_t v = 0;
    for (int i = 0; i < width; ++i)
        if (each(i)) v |= uint64_t(1) << i;
    return v;
}

uint64_t shifted_left(uint64_t a, uint32_t by, int width) {
    return build(width, [&](int i) { return bit(a, int64_t(i) - int64_t(by)); });
}

uint64_t shifted_right(uint64_t a, uint32_t by, int width, bool sign) {
    return build(width, [&](int i) {
        const int64_t from = int64_t(i) + int64_t(by);
        return from < width ? bit(a, from) : sign && bit(a, width - 1);
    });
}

uint64_t inserted(uint64_t a, uint64_t b, uint32_t position, uint32_t length, int width) {
    const int64_t first = position & 255, end = first + (length & 255);
    return build(width, [&](int i) { return i >= first && i < end ? bit(a, i - first) : bit(b, i); });
}

void check_integers_32() {
    Random random(1);
    Words in;
    const uint32_t edges[] = {0, 1, 2, 31, 32, 33, 255, 256, 0x7fffffffu, 0x80000000u, 0xffffffffu};
    const uint32_t selectors[] = {0x3210, 0x7654, 0x2104, 0xfedc, 0x0008, 0x98ba, 0x5410, 0x4444};
    for (uint32_t a : edges)
        for (uint32_t b : edges) in.insert(in.end(), {a, b, edges[random.below(11)], edges[random.below(11)]});
    for (uint32_t i = 0; i < 600; ++i)
        in.insert(in.end(), {number(random), number(random), random.below(40),
                             i % 2 ? selectors[random.below(8)] : random.below(70)});
    const auto out = run("integers_32", in);
    for (size_t i = 0; i < in.size() / 4; ++i) {
        const uint64_t a = uint32_t(in[4 * i]), b = uint32_t(in[4 * i + 1]);
        const auto c = uint32_t(in[4 * i + 2]), d = uint32_t(in[4 * i + 3]);
        const auto sa = int64_t(int32_t(a)), sb = int64_t(int32_t(b));
        const uint64_t low = 0xffffffffu;
        const uint64_t* got = &out[i * kOutputs];
        int k = 0;
        SAME(got[k++], (a + b) & low);
        SAME(got[k++], (a + (~b & low) + 1) & low);
        SAME(got[k++], a * b & low);
        SAME(got[k++], a * b >> 32);
        SAME(got[k++], a * b);
        SAME(got[k++], uint64_t(sa * sb));
        SAME(got[k++], (a * b + c) & low);
        SAME(got[k++], a < b ? a : b);
        SAME(got[k++], sa > sb ? a : b);
        SAME(got[k++], shifted_left(a, c, 32));
        SAME(got[k++], shifted_right(a, c, 32, false));
        SAME(got[k++], shifted_right(a, c, 32, true));
        SAME(got[k++], inserted(a, b, c, d, 32));
        SAME(got[k++], build(32, [&](int n) {
            const uint32_t nibble = d >> (n / 8 * 4) & 15, byte = nibble & 7;
            return bit(a | b << 32, byte * 8 + (nibble & 8 ? 7 : n % 8));
        }));
        uint64_t leading = 0;
        while (leading < 32 && !bit(a, 31 - int(leading))) ++leading;
        SAME(got[k++], leading == 32 ? low : leading);
        SAME(got[k++], build(32, [&](int n) { return bit(a, 31 - n); }));
        uint64_t ones = 0;
        for (int n = 0; n < 32; ++n) ones += bit(a, n);
        SAME(got[k++], ones);
        const uint64_t quotient = got[k++];
        CHECK(quotient * (b | 1) <= a && a < (quotient + 1) * (b | 1));
        SAME(got[k++], a - quotient * (b | 1));
        SAME(got[k++], (0x100000000u - a) & low);
        SAME(got[k++], low - a);
        SAME(got[k++], build(32, [&](int n) { return bit(a, n) != (n != 2); }));
        SAME(got[k++], bit(a, 31) ? a | low << 32 : a);
        SAME(got[k++], a % 65536);
    }
}

void check_integers_64() {
    using Wide = unsigned __int128;
    Random random(2);
    Words in;
    const uint64_t edges[] = {0, 1, 63, 64, 0x7fffffffffffffffu, 0x8000000000000000u, ~0ull, 0xffffffffu};
    const uint32_t amounts[] = {0, 1, 31, 32, 33, 63, 64, 65, 255};
    for (uint64_t a : edges)
        for (uint64_t b : edges)
            in.insert(in.end(), {a, b, amounts[random.below(9)], amounts[random.below(9)]});
    for (uint32_t i = 0; i < 400; ++i)
        in.insert(in.end(), {uint64_t(number(random)) << 32 | number(random),
                             (uint64_t(number(random)) << 32 | number(random)) >> random.below(60),
                             random.below(70), random.below(70)});
    const auto out = run("integers_64", in);
    for (size_t i = 0; i < in.size() / 4; ++i) {
        const uint64_t a = in[4 * i], b = in[4 * i + 1];
        const auto c = uint32_t(in[4 * i + 2]), d = uint32_t(in[4 * i + 3]);
        // Signed order is that of the numbers moved by half the range.
        const uint64_t half = 1ull << 63, sa = a + half, sb = b + half;
        const uint64_t* got = &out[i * kOutputs];
        int k = 0;
        SAME(got[k++], uint64_t(Wide(a) + b));
        SAME(got[k++], uint64_t((Wide(1) << 64) + a - b));
        SAME(got[k++], uint64_t(Wide(a) * b));
        SAME(got[k++], shifted_left(a, c, 64));
        SAME(got[k++], shifted_right(a, c, 64, false));
        SAME(got[k++], shifted_right(a, c, 64, true));
        SAME(got[k++], inserted(a, b, c, d, 64));
        SAME(got[k++], sa > sb ? a : b);
        SAME(got[k++], a < b ? a : b);
        const uint64_t quotient = got[k++];
        CHECK(Wide(quotient) * (b | 1) <= a && a < (Wide(quotient) + 1) * (b | 1));
        SAME(got[k++], a - quotient * (b | 1));
        const bool holds[] = {sa < sb, a < b, sa >= sb, a >= b, a == b, a != b, a <= b, sa > sb};
        SAME(got[k++], build(8, [&](int n) { return holds[n]; }));
        SAME(got[k++], a % (1ull << 32));
        SAME(got[k++], a >> 32);
        SAME(got[k++], a >> 32 | a % (1ull << 32) << 32);
        SAME(got[k++], uint64_t((a < b) != (sa < sb)));
        SAME(got[k++], uint64_t(a < b ? sa < sb : false));
        SAME(got[k++], uint64_t(a < b ? true : sa < sb));
        SAME(got[k++], uint64_t(a >= b));
        SAME(got[k++], uint64_t(a < b ? 7 : 9));
    }
}

// --- floats --------------------------------------------------------------------------------------

template <class T>
bool nan_or_same(T got, T expected) {
    return expected != expected ? got != got : bits(got) == bits(expected);
}

// The comparisons of setp in the order of opcodes.ptx, from the definition: unordered ones hold
// with a NaN, others do not.
template <class T>
uint64_t comparisons(T a, T b) {
    const bool ordered = !std::isnan(a) && !std::isnan(b);
    const int sign = !ordered ? 0 : std::isless(a, b) ? -1 : std::isgreater(a, b) ? 1 : 0;
    const bool is[] = {sign == 0, sign != 0, sign < 0, sign <= 0, sign > 0, sign >= 0};
    return build(14, [&](int n) {
        return n < 6 ? ordered && is[n] : n < 12 ? !ordered || is[n - 6] : n == 12 ? ordered : !ordered;
    });
}

// By the order of real numbers, and -0 below +0; a NaN gives way.
template <class T>
T chosen(T a, T b, bool least) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == 0 && b == 0) return std::signbit(a) == least ? a : b;
    return (a < b) == least ? a : b;
}

template <class T>
std::vector<T> edges() {
    using Limits = std::numeric_limits<T>;
    std::vector<T> v = {0, T(0.5), 1, T(1.5), 2, T(2.5), T(3.4999), 65504, 65519, 65520, T(1e-8), T(3e-5), 126,
                        T(126.5), 2147483520, 2147483648, 4294967296, 9223372036854775808.0,
                        18446744073709551616.0, T(1e30), Limits::min(), Limits::denorm_min(), Limits::max(),
                        Limits::infinity(), T(2147483647.5), T(1.00048828125), T(1.00146484375),
                        T(1.00390625), T(1.01171875), T(5.9604645e-8), T(2.9802322e-8), T(2.99e-8)};
    const size_t n = v.size();
    for (size_t i = 0; i < n; ++i) v.push_back(-v[i]);
    v.push_back(Limits::quiet_NaN());
    return v;
}

template <class T>
void floats_in(Words& in, std::vector<T>& values) {
    Random random(3);
    const auto some = edges<T>();
    for (T a : some)
        for (T b : {some[random.below(uint32_t(some.size()))], a, T(0), T(-0.0), some.back()})
            values.insert(values.end(), {a, b, T(random.normal())});
    for (int i = 0; i < 500; ++i) {
        const T a = T(ldexp(random.normal(), int(random.below(40)) - 20)), b = T(random.normal());
        // The third operand takes the product away: what a fused one leaves is its rounding.
        values.insert(values.end(), {a, b, -a * b});
    }
    for (size_t i = 0; i < values.size(); i += 3)
        in.insert(in.end(), {bits(values[i]), bits(values[i + 1]), bits(values[i + 2]), 0});
}

// Launches take 1024 threads.
template <class F>
void in_parts(const Words& in, F check) {
    for (size_t first = 0; first < in.size(); first += 1024 * kInputs) {
        const size_t end = std::min(in.size(), first + 1024 * kInputs);
        check(Words(in.begin() + long(first), in.begin() + long(end)), first / kInputs);
    }
}

float float_of(uint64_t word) { return as<float>(uint32_t(word)); }

// Sixteen bits of a float of `fraction` bits after the point and exponents from `least`: the nearest
// by counting steps, in double, which is exact.
uint64_t narrow(float v, int fraction, int least, uint64_t infinity) {
    if (std::isnan(v)) return 0x7fff;
    const uint64_t sign = std::signbit(v) ? 0x8000 : 0;
    const double magnitude = fabs(double(v));
    if (std::isinf(v)) return sign | infinity;
    int exponent = least;
    while (ldexp(2.0, exponent) <= magnitude) ++exponent;
    const double steps = ldexp(magnitude, fraction - exponent), whole = floor(steps), rest = steps - whole;
    auto count = uint64_t(whole);
    if (rest > 0.5 || (rest == 0.5 && count % 2 == 1)) ++count;
    // A subnormal number has the exponent field 0; a carry moves on to the next field by itself.
    const uint64_t result = (uint64_t(exponent - least) << fraction) + count;
    return sign | std::min(result, infinity);
}

uint64_t half_of(float v) { return narrow(v, 10, -14, 0x7c00); }
uint64_t bfloat_of(float v) { return narrow(v, 7, -126, 0x7f80); }

// What cvt.rzi gives.
template <class To>
uint64_t integer_of(double v, uint64_t nan) {
    using Limits = std::numeric_limits<To>;
    if (std::isnan(v)) return nan;
    const long double cut = truncl((long double)v);
    if (cut <= (long double)Limits::min()) return uint64_t(std::make_unsigned_t<To>(Limits::min()));
    if (cut >= (long double)Limits::max()) return uint64_t(std::make_unsigned_t<To>(Limits::max()));
    return uint64_t(std::make_unsigned_t<To>(To(cut)));
}

void check_floats_32() {
    Words in;
    std::vector<float> values;
    floats_in(in, values);
    in_parts(in, [&](const Words& part, size_t first) {
        const auto out = run("floats_32", part);
        for (size_t i = 0; i < part.size() / kInputs; ++i) {
            const float a = values[3 * (first + i)], b = values[3 * (first + i) + 1], c = values[3 * (first + i) + 2];
            const uint64_t* got = &out[i * kOutputs];
            int k = 0;
            SAME(got[k++], comparisons(a, b));
            CHECK(nan_or_same(float_of(got[k++]), chosen(a, b, true)));
            CHECK(nan_or_same(float_of(got[k++]), chosen(a, b, false)));
            // Twice the digits of float and two more: rounded once more, these are as if rounded once.
            CHECK(nan_or_same(float_of(got[k++]), float(double(a) + double(b))));
            CHECK(nan_or_same(float_of(got[k++]), float(double(a) - double(b))));
            CHECK(nan_or_same(float_of(got[k++]), float(double(a) * double(b))));
            CHECK(nan_or_same(float_of(got[k++]), float(__float128(a) * b + c)));
            CHECK(nan_or_same(float_of(got[k++]), float(double(a) / double(b))));
            CHECK(nan_or_same(float_of(got[k++]), float(sqrt(double(a)))));
            SAME(got[k++], bits(a) ^ 0x80000000u);
            SAME(got[k++], bits(a) & 0x7fffffffu);
            CHECK(nan_or_same(as<double>(got[k++]), double(a)));
            SAME(got[k++], integer_of<int64_t>(a, 1ull << 63));
            const double power = exp2(double(a)), fast = float_of(got[k++]);
            if (std::isnan(a)) CHECK(std::isnan(fast));
            else if (a < -126) CHECK(fast == 0);
            else if (a >= 128) CHECK(std::isinf(fast));
            else CHECK(fabs(fast - power) <= ldexp(power, -22));
            SAME(got[k++], half_of(a));
            SAME(got[k++], bfloat_of(a));
            const uint64_t h = half_of(a), exponent = h >> 10 & 31, fraction = h & 1023;
            const double wide = (h >> 15 ? -1.0 : 1.0) *
                (exponent == 31 ? (fraction ? NAN : INFINITY)
                                : ldexp(double(exponent ? 1024 + fraction : fraction), int(exponent ? exponent : 1) - 25));
            CHECK(nan_or_same(float_of(got[k++]), float(wide)));
            SAME(got[k++], half_of(a) << 16 | half_of(b));
            SAME(got[k++], bfloat_of(a) << 16 | bfloat_of(b));
            SAME(got[k++], bits(a));
        }
    });
}

void check_floats_64() {
    Words in;
    std::vector<double> values;
    floats_in(in, values);
    in_parts(in, [&](const Words& part, size_t first) {
        const auto out = run("floats_64", part);
        for (size_t i = 0; i < part.size() / kInputs; ++i) {
            const double a = values[3 * (first + i)], b = values[3 * (first + i) + 1], c = values[3 * (first + i) + 2];
            const uint64_t* got = &out[i * kOutputs];
            auto next = [&, k = 1]() mutable { return as<double>(got[k++]); };
            SAME(got[0], comparisons(a, b));
            CHECK(nan_or_same(next(), chosen(a, b, true)));
            CHECK(nan_or_same(next(), chosen(a, b, false)));
            CHECK(nan_or_same(next(), a + b));
            CHECK(nan_or_same(next(), a - b));
            CHECK(nan_or_same(next(), a * b));
            // 113 digits hold what two roundings would lose.
            CHECK(nan_or_same(next(), double(__float128(a) * b + c)));
            CHECK(nan_or_same(next(), a / b));
            CHECK(nan_or_same(next(), sqrt(a)));
            SAME(bits(next()), bits(a) ^ 1ull << 63);
            SAME(bits(next()), bits(a) & ~(1ull << 63));
            // The sign of the first, the magnitude of the second.
            SAME(bits(next()), (bits(a) & 1ull << 63) | (bits(b) & ~(1ull << 63)));
            CHECK(nan_or_same(next(), 1.0 / a));
            const double rcp = next(), rsqrt = next();
            if (std::isnormal(a) && std::isnormal(1.0 / a)) {
                CHECK(fabs(rcp * a - 1) < 0x1p-18 && uint32_t(bits(rcp)) == 0);
                if (a > 0) CHECK(fabs(rsqrt * sqrt(a) - 1) < 0x1p-18 && uint32_t(bits(rsqrt)) == 0);
            }
            if (a == 0) CHECK(std::isinf(rcp) && std::signbit(rcp) == std::signbit(a));
            const double rounded = next(), below = floor(a), rest = a - below;
            const double even = fmod(below, 2) == 0 ? below : below + 1;
            if (std::isfinite(a)) CHECK(rounded == (rest < 0.5 ? below : rest > 0.5 ? below + 1 : even));
            const float f = float_of(got[16]);
            if (std::isfinite(a) && fabs(a) < 1e30)
                CHECK(fabs(f - a) <= fabs(nextafterf(f, INFINITY) - a) && fabs(f - a) <= fabs(nextafterf(f, -INFINITY) - a));
            SAME(got[17], integer_of<int32_t>(a, 0x80000000u));
            SAME(got[18], integer_of<int64_t>(a, 1ull << 63));
            SAME(got[19], integer_of<uint64_t>(a, 1ull << 63));
            SAME(got[20], bits(a));
        }
    });
}

void check_floats_of_integers() {
    Words in;
    const uint64_t numbers[] = {0, 1, 16777217, 16777219, 0x7fffffffu, 0x80000000u, 0xffffffffu, 0xffffff80u, 1ull << 53,
                                (1ull << 53) + 1, (1ull << 53) + 3, 0x7fffffffffffffffu, 1ull << 63, ~0ull, ~0ull - 1023};
    for (uint64_t v : numbers) in.insert(in.end(), {v, 0, 0, 0});
    const auto out = run("floats_of_integers", in);
    // The nearest, ties to even, of an integer, by its highest bits.
    auto nearest = [](uint64_t v, int digits) {
        int drop = 0;
        while (drop < 64 && (v >> drop) >> digits) ++drop;
        uint64_t kept = drop ? v >> drop : v;
        const uint64_t rest = v - (kept << drop), half = drop ? 1ull << (drop - 1) : 1;
        if (drop && (rest > half || (rest == half && kept % 2))) ++kept;
        return ldexp(double(kept), drop);
    };
    for (size_t i = 0; i < in.size() / kInputs; ++i) {
        const uint64_t v = in[kInputs * i], low = uint32_t(v);
        const bool negative = bit(v, 31), wide_negative = bit(v, 63);
        const uint64_t magnitude = negative ? (1ull << 32) - low : low;
        const uint64_t* got = &out[i * kOutputs];
        SAME(got[0], bits(float((negative ? -1 : 1) * nearest(magnitude, 24))));
        SAME(got[1], bits(float(nearest(low, 24))));
        SAME(got[2], bits((negative ? -1 : 1) * double(magnitude)));
        SAME(got[3], bits(double(low)));
        SAME(got[4], bits((wide_negative ? -1 : 1) * nearest(wide_negative ? ~v + 1 : v, 53)));
        SAME(got[5], bits(nearest(v, 53)));
    }
}

// --- memory, parameters, warps, control ----------------------------------------------------------

void check_memory() {
    Words in;
    for (uint64_t i = 0; i < 4 * 64; ++i) in.push_back(0x4100000041000001u * (i + 1) & 0x7effffff7effffffu);
    const auto out = run("memory", in);
    for (uint64_t t = 0; t < 64; ++t) {
        const uint64_t* a = &in[4 * t];
        const uint64_t* got = &out[kOutputs * t];
        const uint64_t low = 0xffffffffu;
        SAME(got[0], a[1] >> 32 | a[1] << 32);
        SAME(got[1], a[0] >> 32 | a[0] << 32);
        SAME(got[2], a[2] >> 32 | a[2] << 32);
        SAME(got[3], a[3] >> 32);
        SAME(got[4], a[0] >> 48 | t << 32);
        const uint64_t pair = (t + 513) | (t + 1027) << 16;
        SAME(got[5], pair | pair << 32);
        SAME(got[6], t + 513);
        SAME(got[7], t + 1027);
        SAME(got[8], a[2]);
        SAME(got[9], a[2] >> 32 | a[2] << 32);
        SAME(got[10], in[2] >> 32 & low);
    }
}

struct Block24 {
    uint64_t words[3];
};
struct Block12 {
    uint32_t words[3];
};

void check_parameters() {
    Buffer<uint64_t> out(7, 0);
    const Block24 block = {{1, 0x2222222211111111u, 0x4444444433333333u}};
    const Block12 small = {{5, 6, 0x80000007u}};
    auto start = [&](uint32_t at) {
        return try_launch("parameters", 1, 32, 0, nullptr, uint16_t(0xfff1), out.device(), at, block, uint16_t(9), small, 2.5);
    };
    MUST(start(0));
    MUST(cuCtxSynchronize());
    const Words expected = {0xfff1, 0, 0x1111111122222222u, 9, bits(2.5), 0x33333333u, 0x80000007u};
    CHECK(out.host() == expected);
    // As the ABI says: each at its own alignment, one after another.
    const size_t offsets[] = {0, 8, 16, 24, 48, 52, 64};
    for (size_t i = 0; i < 7; ++i) {
        size_t offset = 0;
        MUST(cuFuncGetParamInfo(function("parameters"), i, &offset, nullptr));
        CHECK(offset == offsets[i]);
    }
    for (const auto& wrong : {std::make_pair(40u, "out of bounds"), std::make_pair(4u, "misaligned")}) {
        simt_quiet(1);
        start(wrong.first);
        cuCtxSynchronize();
        CHECK(take_findings().find(wrong.second) != std::string::npos);
        simt_quiet(0);
    }
}

void check_warp() {
    Random random(4);
    Words in;
    // One lane of the second warp has what no lane of the first has.
    for (uint64_t t = 0; t < 64; ++t)
        in.insert(in.end(), {number(random), t == 40 ? 33 : random.below(32), 0, 0});
    const auto out = run("warp", in);
    for (uint64_t t = 0; t < 64; ++t) {
        const uint64_t first = t & ~31ull, lane = t & 31;
        auto value = [&](uint64_t from) { return in[4 * (first + from)]; };
        const uint64_t* got = &out[kOutputs * t];
        SAME(got[0], value(lane ^ 5));
        SAME(got[1], 1);
        SAME(got[2], value(lane < 3 ? lane : lane - 3));
        SAME(got[3], uint64_t(lane >= 3));
        SAME(got[4], value(in[4 * t + 1] % 32));
        SAME(got[5], build(32, [&](int n) { return in[4 * (first + uint64_t(n)) + 1] == 3; }));
        SAME(got[6], t / 32);
    }
}

void check_loop() {
    Words in;
    for (uint64_t n = 0; n < 70; ++n) in.insert(in.end(), {n, 0, 0, 0});
    const auto out = run("loop", in);
    for (uint64_t n = 0; n < 70; ++n) SAME(out[kOutputs * n], n * (n + 1) / 2);
}

void check_used_bytes() {
    Buffer<uint64_t> memory(8, 0);
    launch("used_bytes", 1, 32, 64, memory.device());
    SAME(memory.host()[0], 5 | 6ull << 32);
}

// What is to be found, and that nothing is where all is as it should be (the tests above).
void check_findings() {
    const char* const faults[][2] = {{"misaligned_vector", "misaligned: 16-byte read"},
                                     {"beyond_allocation", "out of bounds: 16-byte write"},
                                     {"beyond_shared", "out of bounds: 4-byte write"},
                                     {"beyond_all_shared", "past all shared memory"},
                                     {"host_address", "host memory in a kernel"},
                                     {"part_of_a_warp", "member mask 0xffff"},
                                     {"half_a_warps_width", "the clamp 0x101f"},
                                     {"some_bytes_of_a_copy", "cp.async of 8 of 16 bytes"},
                                     {"copy_read_too_early", "copy_async_16 is under way"},
                                     {"hint_without_policy", "a hint that no createpolicy made"},
                                     {"no_barrier", "race"},
                                     {"unused_bytes", "never written"},
                                     {"all_bytes", "never written"},
                                     {"unused_load", "never written"},
                                     {"unused_but_outside", "out of bounds: 16-byte read"},
                                     {"division_by_zero", "division by zero"}};
    for (const auto& fault : faults) {
        // The last 16 bytes are not all there.
        Buffer<uint64_t> memory(strcmp(fault[0], "unused_but_outside") == 0 ? 7 : 8, 1);
        const uint32_t threads = strcmp(fault[0], "no_barrier") == 0 ? 64 : 32;
        simt_quiet(1);
        MUST(try_launch(fault[0], 1, threads, threads == 64 ? 256 : 64, nullptr, memory.device()));
        cuCtxSynchronize();
        const std::string found = take_findings();
        simt_quiet(0);
        if (found.find(fault[1]) == std::string::npos) {
            ++failures;
            fprintf(stderr, "%s: expected %s, found: %s\n", fault[0], fault[1], found.c_str());
        }
    }
}

}  // namespace

int main() {
    for (uint64_t seed = 1; seed <= 4; ++seed) {
        simt_seed(seed);
        check_memory();
        check_parameters();
        check_warp();
        check_loop();
        check_used_bytes();
        check_findings();
    }
    check_integers_32();
    check_integers_64();
    check_floats_32();
    check_floats_64();
    check_floats_of_integers();
    return finish();
}
