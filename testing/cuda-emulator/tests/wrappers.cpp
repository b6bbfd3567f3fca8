// The host models of kernels/ptx against plain loops, and how long a product takes on the emulator.
#include "harness.h"

#include <time.h>

namespace {

float from_bfloat(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

uint16_t to_bfloat(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// By definition: sign, exponent, fraction.
double from_half(uint16_t v) {
    const int exponent = v >> 10 & 31, fraction = v & 1023;
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? ldexp(fraction, -24)
                                             : ldexp(1024 + fraction, exponent - 25);
    return v & 0x8000 ? -magnitude : magnitude;
}

// The nearest half by search; of two as near, the one with an even last bit.
uint16_t nearest_half(double v) {
    if (std::isnan(v)) return 0x7fff;
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const double magnitude = fabs(v);
    if (magnitude >= 65520) return sign | 0x7c00;
    uint16_t best = 0;
    for (int bit = 14; bit >= 0; --bit)
        if ((best | 1 << bit) < 0x7c00 && from_half(uint16_t(best | 1 << bit)) <= magnitude)
            best = uint16_t(best | 1 << bit);
    const double below = magnitude - from_half(best);
    const double above = (best == 0x7bff ? 65536 : from_half(uint16_t(best + 1))) - magnitude;
    if (above < below || (above == below && best & 1)) ++best;
    return sign | best;
}

// What float32 holds of v, as tensor cores round.
float toward_zero(double v) {
    const float nearest = float(v);
    return fabs(double(nearest)) > fabs(v) ? nextafterf(nearest, 0) : nearest;
}

void check_mma(bool half) {
    Random random(half ? 1 : 2);
    std::vector<uint16_t> a(16 * 16), b(16 * 8);
    std::vector<float> c(16 * 8);
    auto widen = [&](uint16_t v) { return half ? from_half(v) : double(from_bfloat(v)); };
    for (auto& v : a) v = half ? nearest_half(random.normal()) : to_bfloat(float(random.normal()));
    for (auto& v : b) v = half ? nearest_half(random.normal()) : to_bfloat(float(random.normal()));
    for (auto& v : c) v = float(random.normal());
    std::vector<uint32_t> ra(128), rb(64);
    std::vector<float> rc(128), expected(128);
    for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = l % 4;
        auto pair_a = [&](int row, int column) {
            return uint32_t(a[row * 16 + column]) | uint32_t(a[row * 16 + column + 1]) << 16;
        };
        auto pair_b = [&](int row, int column) {
            return uint32_t(b[row * 8 + column]) | uint32_t(b[(row + 1) * 8 + column]) << 16;
        };
        ra[l * 4] = pair_a(g, 2 * t);
        ra[l * 4 + 1] = pair_a(g + 8, 2 * t);
        ra[l * 4 + 2] = pair_a(g, 2 * t + 8);
        ra[l * 4 + 3] = pair_a(g + 8, 2 * t + 8);
        rb[l * 2] = pair_b(2 * t, g);
        rb[l * 2 + 1] = pair_b(2 * t + 8, g);
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = 2 * t + i % 2;
            double sum = rc[l * 4 + i] = c[row * 8 + column];
            for (int k = 0; k < 16; ++k) sum += widen(a[row * 16 + k]) * widen(b[k * 8 + column]);
            expected[l * 4 + i] = toward_zero(sum);
        }
    }
    Buffer<uint32_t> da(ra), db(rb);
    Buffer<float> dc(rc), dd(128);
    launch("run_mma", 1, 32, 0, int32_t(half), (const uint32_t*)da.device(),
           (const uint32_t*)db.device(), (const float*)dc.device(), dd.device());
    CHECK(dd.host() == expected);
}

void check_ldmatrix(bool transposed) {
    std::vector<uint16_t> source(256);
    for (size_t i = 0; i < 256; ++i) source[i] = uint16_t(i * 3 + 1);
    Buffer<uint16_t> in(source);
    Buffer<uint32_t> out(128);
    launch("run_ldmatrix", 1, 32, 512, int32_t(transposed), (const uint16_t*)in.device(),
        out.device());
    const auto got = out.host();
    for (int l = 0; l < 32; ++l)
        for (int m = 0; m < 4; ++m) {
            auto at = [&](int row, int column) { return uint32_t(source[(m * 8 + row) * 8
                + column]); };
            const int row = l / 4, column = l % 4 * 2;
            const uint32_t expected = transposed ? at(column, row) | at(column + 1, row) << 16
                                                 : at(row, column) | at(row, column + 1) << 16;
            CHECK(got[l * 4 + m] == expected);
        }
}

void check_shuffles() {
    Random random(3);
    std::vector<uint64_t> v(64);
    for (auto& x : v) x = random.bits();
    Buffer<uint64_t> in(v), out(512);
    launch("run_shuffles", 1, 64, 0, (const uint64_t*)in.device(), out.device());
    const auto got = out.host();
    for (uint32_t t = 0; t < 64; ++t) {
        const uint32_t w = t / 32 * 32, l = t % 32;
        uint32_t ballot = 0;
        bool any = false;
        for (uint32_t i = 0; i < 32; ++i) {
            ballot |= uint32_t(v[w + i] & 1) << i;
            any = any || (v[w + i] & 0xff) == 0xff;
        }
        CHECK(got[t * 8] == v[w + (l ^ 5)]);
        CHECK(got[t * 8 + 1] == v[w + 7]);
        CHECK(got[t * 8 + 2] == v[l < 3 ? t : t - 3]);
        CHECK(got[t * 8 + 3] == uint32_t(v[w + (l ^ 16)]));
        CHECK(got[t * 8 + 4] == (v[w + (l ^ 1)] & 0xffff));
        CHECK(got[t * 8 + 5] == (v[l < 1 ? t : t - 1] & 0xffff));
        CHECK(got[t * 8 + 6] == ballot);
        CHECK(got[t * 8 + 7] == (uint64_t(any) | uint64_t(l) << 8 | uint64_t(t / 32) << 16));
    }
}

void check_convert() {
    Random random(4);
    std::vector<float> v = {0.0f, -0.0f, 1.0f, 65504.0f, 65519.9f, 65520.0f, -1e30f, INFINITY, NAN,
                            0x1p-14f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 0x1.ffcp-15f, 0x1.ffep-15f};
    for (int i = 0; i < 4000; ++i)
        v.push_back(float(ldexp(random.normal(), int(random.below(60)) - 40)));
    // Halfway between two halves.
    for (uint16_t h = 0; h < 0x7bff; h = uint16_t(h + 7))
        v.push_back(float((from_half(h) + from_half(uint16_t(h + 1))) / 2));
    Buffer<float> in(v);
    Buffer<uint32_t> out(4 * v.size());
    launch("run_convert", 1, 64, 0, (const float*)in.device(), out.device(), uint32_t(v.size()));
    const auto got = out.host();
    auto as_half = [](float f) { return uint32_t(nearest_half(f)); };
    auto as_bfloat = [](float f) { return std::isnan(f) ? 0x7fffu : uint32_t(to_bfloat(f)); };
    for (size_t i = 0; i < v.size(); ++i) {
        const uint32_t half = as_half(v[i]), bfloat = as_bfloat(v[i]);
        const float next = v[(i + 1) % v.size()];
        CHECK(got[4 * i] == (half | bfloat << 16));
        CHECK(got[4 * i + 1] == (half | as_half(next) << 16));
        CHECK(got[4 * i + 2] == (bfloat | as_bfloat(next) << 16));
        CHECK(got[4 * i + 3] == bfloat + uint32_t(__builtin_popcount(half)) +
                                    uint32_t(__builtin_ffs(int(bfloat))));
    }
}

void check_copies() {
    const uint32_t n = 96;
    std::vector<float> v(12 * n);
    for (size_t i = 0; i < v.size(); ++i) v[i] = float(i);
    Buffer<float> in(v), out(12 * n);
    launch("run_copies", 1, n, 48 * n, (const float*)in.device(), out.device());
    const auto got = out.host();
    for (uint32_t t = 0; t < n; ++t)
        for (uint32_t i = 0; i < 12; ++i)
            CHECK(got[12 * t + i] == (i < 8 ? v[4 * (i / 4 * n + n - 1 - t) + i % 4] : 0.0f));
}

void check_atomics() {
    Buffer<uint32_t> words({0, 0, 0, 0, 0, 5000});
    Buffer<uint64_t> sum(1, 0);
    launch("run_atomics", 5, 64, 16, words.device(), sum.device());
    CHECK((words.host() == std::vector<uint32_t>{80, 80, 80, 80, 0xffffffffu, 1000 - 63 - 4}));
    CHECK(sum.host()[0] == uint64_t(5 * 63 * 32) << 32);
}

void check_barriers() {
    Buffer<uint32_t> out(128);
    launch("run_barriers", 1, 128, 512, out.device());
    const auto got = out.host();
    for (uint32_t t = 0; t < 128; ++t) CHECK(got[t] == (t ^ 32));
}

void check_gemm() {
    const uint32_t m = 256, n = 512, k = 512;
    Random random(5);
    std::vector<uint16_t> a(m * k), b(n * k);
    for (auto& v : a) v = to_bfloat(float(random.normal()));
    for (auto& v : b) v = to_bfloat(float(random.normal()));
    std::vector<float> expected(m * n);
    for (uint32_t i = 0; i < m; ++i)
        for (uint32_t j = 0; j < n; ++j) {
            double sum = 0;
            for (uint32_t l = 0; l < k; ++l)
                sum += double(from_bfloat(a[i * k + l])) * from_bfloat(b[j * k + l]);
            expected[i * n + j] = float(sum);
        }
    Buffer<uint16_t> da(a), db(b);
    Buffer<float> d(m * n);
    timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    launch("run_gemm", 3, 256, 3 * 2 * 128 * 80, (const uint16_t*)da.device(),
           (const uint16_t*)db.device(), d.device(), m, n, k);
    clock_gettime(CLOCK_MONOTONIC, &end);
    CHECK(near(d.host(), expected, 1e-6));
    printf("%ux%ux%u product on the emulator: %.3f s\n", m, n, k,
           double(end.tv_sec - begin.tv_sec) + double(end.tv_nsec - begin.tv_nsec) * 1e-9);
}

}  // namespace

int main() {
    for (uint64_t seed = 1; seed <= 8; ++seed) {
        simt_seed(seed);
        check_mma(true);
        check_mma(false);
        check_ldmatrix(false);
        check_ldmatrix(true);
        check_shuffles();
        check_copies();
        check_atomics();
        check_barriers();
    }
    check_convert();
    check_gemm();
    return finish();
}
