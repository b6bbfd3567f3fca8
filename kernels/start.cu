// The start values of class centers: normal with mean 0 and a given standard deviation, a pure
// function of (seed, class, column).
//
// Columns 4k to 4k + 3 come from Philox with key = seed and counter = (class lo, class hi, k, 1 <<
// 24): its words, in pairs, through Box and Muller. Bit for bit src/random.rs start_values: every
// operation is rounded by itself, so that no compiler may contract. In bf16 the nearest is stored.
// Floor: shard_rows * d * 4 bytes written, in bf16 2; 256 MB for 125000 rows of 512 in float32;
// once in a head's life.
#include "stored.h"

namespace {

PFC_DEVICE float times(float a, float b) { return ptx::multiply(a, b); }
PFC_DEVICE float plus(float a, float b) { return ptx::add(a, b); }
PFC_DEVICE float minus(float a, float b) { return ptx::subtract(a, b); }

union Bits {
    float number;
    uint32_t word;
};

PFC_DEVICE uint32_t bits_of(float number) {
    Bits bits;
    bits.number = number;
    return bits.word;
}

PFC_DEVICE float float_of(uint32_t word) {
    Bits bits;
    bits.word = word;
    return bits.number;
}

// std * sqrt(-2 ln u) * (cos, sin)(2 pi v), u = (floor(radius / 2) + 1/2) / 2^31 rounded, v = angle
// / 2^32.
PFC_DEVICE void normal_pair(uint32_t radius, uint32_t angle, float std, float& first,
                            float& second) {
    // u = m * 2^e with m in [sqrt(1/2), sqrt(2)): ln u = ln m + e ln 2, and near u = 1 nothing
    // cancels, as e is 0 there.
    const float u = times(plus(float(int32_t(radius >> 1)), 0.5f), 1.0f / 2147483648.0f);
    const uint32_t shifted = bits_of(u) - 0x3f3504f3u;
    const float e = float(int32_t(shifted) >> 23);
    const float x = minus(float_of((shifted & 0x007fffffu) + 0x3f3504f3u), 1.0f);
    // ln(1 + x) = x - x^2/2 + x^3 P(x), P as in Cephes' logf.
    float p = 7.0376836e-2f;
    p = minus(times(p, x), 0.1151461f);
    p = plus(times(p, x), 0.11676999f);
    p = minus(times(p, x), 0.12420141f);
    p = plus(times(p, x), 0.14249323f);
    p = minus(times(p, x), 0.16668057f);
    p = plus(times(p, x), 0.20000714f);
    p = minus(times(p, x), 0.24999994f);
    p = plus(times(p, x), 0.3333333f);
    const float square_x = times(x, x);
    const float log_m = minus(x, times(square_x, minus(0.5f, times(x, p))));
    const float log = plus(times(e, 0.69314718055994530942f), log_m);
    const float r = times(std, ptx::square_root(times(-2.0f, log)));

    // The nearest quarter turn, and what is left of the angle: within pi/4.
    const uint32_t quarter = (angle + (1u << 29)) >> 30;
    const float rest = float(int32_t(angle - (quarter << 30)));
    const float t = times(rest, 3.14159265358979323846f / 2147483648.0f);
    const float square = times(t, t);
    // Cephes' sinf and cosf on [-pi/4, pi/4].
    float s = minus(8.332161e-3f, times(square, 1.9515296e-4f));
    s = plus(-1.6666655e-1f, times(square, s));
    const float sine = plus(t, times(times(t, square), s));
    float c = plus(-1.3887316e-3f, times(square, 2.4433157e-5f));
    c = plus(4.1666646e-2f, times(square, c));
    const float cosine = minus(1.0f, times(square, minus(0.5f, times(square, c))));
    // Turning by a quarter swaps the two and flips signs: (c, s), (-s, c), (-c, -s), (s, -c).
    const float a = (quarter & 1) == 0 ? cosine : sine;
    const float b = (quarter & 1) == 0 ? sine : cosine;
    first = times(r, float_of(bits_of(a) ^ (((quarter + 1) & 2) << 30)));
    second = times(r, float_of(bits_of(b) ^ ((quarter & 2) << 30)));
}

}  // namespace

// launch: start_values blocks 8 per SM threads 256 shared 0
// gate: start_values registers <= 40
PFC_KERNEL(start_values, (const PFC_GRID_CONSTANT HeadArrays head, double std)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        head.ledger->torn_row = kNone;
    }
    for (uint32_t row = rows::first_row(); row < head.shard_rows; row += rows::row_stride()) {
        const uint64_t number = head.first_class + row;
        for (uint32_t column = rows::kGroup * (threadIdx.x % 32); column < head.master_pitch;
             column += rows::kSpan) {
            const RandomWords counter = {uint32_t(number), uint32_t(number >> 32), column / 4,
                                         kPurposeInit};
            const RandomWords words = philox(counter, head.seed);
            float values[4];
            normal_pair(words.w0, words.w1, float(std), values[0], values[1]);
            normal_pair(words.w2, words.w3, float(std), values[2], values[3]);
            for (uint32_t i = 0; i < 4; ++i) {
                values[i] = column + i < head.dim ? values[i] : 0.0f;  // a row's padding is zero
            }
            const ptx::Float4 group = {values[0], values[1], values[2], values[3]};
            stored::write_nearest(head, stored::centers(head), row, column, group);
        }
    }
}
