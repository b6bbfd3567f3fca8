// Random numbers as pure functions of their purpose, bit for bit those of src/random.rs:
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// keys that sample classes and that round rows.
//
// One call of Philox makes four words: the keys of four blocks of classes, or start values of four columns.
// About 60 integer instructions.
#pragma once

#include "ptx/arithmetic.h"
#include "ptx/shim.h"
#include "ptx/warp.h"

// Streams of one seed that never meet: the top byte of the counter's last word.
constexpr uint32_t kPurposeSample = 0u << 24;
constexpr uint32_t kPurposeInit = 1u << 24;
constexpr uint32_t kPurposeWeight = 2u << 24;
constexpr uint32_t kPurposeSecondMoment = 3u << 24;

// Four scalars instead of an array, so that they stay in registers.
struct RandomWords {
    uint32_t w0, w1, w2, w3;
};

PFC_DEVICE RandomWords philox(RandomWords counter, uint64_t seed) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = ptx::multiply_high(0xD2511F53u, counter.w0),
                       low0 = 0xD2511F53u * counter.w0;
        const uint32_t high1 = ptx::multiply_high(0xCD9E8D57u, counter.w2),
                       low1 = 0xCD9E8D57u * counter.w2;
        counter = RandomWords{high1 ^ counter.w1 ^ k0, low1, high0 ^ counter.w3 ^ k1, low0};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return counter;
}

// The keys of the blocks 4 * quad .. 4 * quad + 3 at a step.
PFC_DEVICE RandomWords sample_keys(uint64_t seed, uint64_t step, uint64_t quad) {
    const uint32_t last = (uint32_t)(step >> 32) + kPurposeSample;
    return philox(RandomWords{(uint32_t)quad, (uint32_t)(quad >> 32), (uint32_t)step, last}, seed);
}

// What the random bits that round a class's row at an update are made of.
PFC_DEVICE uint32_t rounding_key(uint64_t seed, uint64_t number, uint64_t update,
                                 uint32_t purpose) {
    const uint32_t last = (uint32_t)(update >> 32) + purpose;
    return philox(RandomWords{(uint32_t)number, (uint32_t)(number >> 32), (uint32_t)update, last},
                  seed)
        .w0;
}

// A warp walks over a run of classes in segments of 128; lane l of a segment has the classes 4 l ..
// 4 l + 3 of it.
constexpr uint32_t kSegment = 128;
constexpr uint32_t kRunSegments = 4;
constexpr uint32_t kRunClasses = kRunSegments * kSegment;

// Key number `key` of those around it.
PFC_DEVICE uint32_t key_in_quad(const RandomWords& quad, uint32_t key) {
    const uint32_t low = (key & 1) != 0 ? quad.w1 : quad.w0;
    const uint32_t high = (key & 1) != 0 ? quad.w3 : quad.w2;
    return (key & 2) != 0 ? high : low;
}

// for_sample_keys with a key for each 1 << block_shift classes, block_shift at least 1: the four
// classes of a lane have at most three keys, in one or two blocks of the generator.
template <class Body>
PFC_DEVICE void for_block_keys(uint64_t seed, uint64_t step, uint64_t first, uint32_t block_shift,
                               Body body) {
#pragma unroll 1
    for (uint32_t segment = 0; segment < kRunSegments; segment++) {
        const uint64_t begin = first + segment * kSegment + 4 * (uint32_t)ptx::lane();
        const uint64_t quad = (begin >> block_shift) / 4;
        const RandomWords own = sample_keys(seed, step, quad);
        const auto key_of = [&](uint32_t of) {
            return key_in_quad(own, (uint32_t)((begin + of) >> block_shift) & 3);
        };
        RandomWords keys{key_of(0), key_of(1), key_of(2), key_of(3)};
        if (((begin + 3) >> block_shift) / 4 != quad) {
            const RandomWords next = sample_keys(seed, step, quad + 1);
            const auto replace = [&](uint32_t& key, uint32_t of) {
                const uint64_t number = (begin + of) >> block_shift;
                if (number / 4 != quad) key = key_in_quad(next, (uint32_t)number & 3);
            };
            replace(keys.w1, 1);
            replace(keys.w2, 2);
            replace(keys.w3, 3);
        }
        body(segment, keys);
    }
}

// For the classes first .. first + kRunClasses - 1 (global ids) in segments: body(segment, keys),
// keys of this lane's four classes, which are blocks of one class.
//
// If `first` is no multiple of 4, a lane's classes lie in two blocks of the generator. A lane
// then takes the rest from the lane above, and the last lane from the first of the next segment,
// which comes next anyway: 5 blocks a lane and run, not 8.
template <class Body>
PFC_DEVICE void for_sample_keys(uint64_t seed, uint64_t step, uint64_t first, Body body) {
    const uint32_t shift = (uint32_t)(first % 4);  // the same in all segments: no divergence
    const uint64_t quad = first / 4 + ptx::lane();
    const int above = (int)((ptx::lane() + 1) % 32);
    const bool last_lane = ptx::lane() == 31;
    RandomWords own = sample_keys(seed, step, quad);
#pragma unroll 1
    for (uint32_t segment = 0; segment < kRunSegments; segment++) {
        RandomWords following = own;
        if (segment + 1 < kRunSegments || shift != 0)
            following = sample_keys(seed, step, quad + (segment + 1) * (kSegment / 4));
        RandomWords keys = own;
        if (shift != 0) {
            const uint32_t a0 = ptx::shuffle(own.w0, above), b0 = ptx::shuffle(following.w0, 0);
            const uint32_t a1 = ptx::shuffle(own.w1, above), b1 = ptx::shuffle(following.w1, 0);
            const uint32_t a2 = ptx::shuffle(own.w2, above), b2 = ptx::shuffle(following.w2, 0);
            const uint32_t w4 = last_lane ? b0 : a0, w5 = last_lane ? b1 : a1,
                           w6 = last_lane ? b2 : a2;
            // A window of four in {w0 .. w6} that begins at `shift`, without an index that
            // registers do not have.
            const bool one = (shift & 1) != 0, two = (shift & 2) != 0;
            const uint32_t v0 = one ? own.w1 : own.w0, v1 = one ? own.w2 : own.w1,
                           v2 = one ? own.w3 : own.w2;
            const uint32_t v3 = one ? w4 : own.w3, v4 = one ? w5 : w4, v5 = one ? w6 : w5;
            keys = RandomWords{two ? v2 : v0, two ? v3 : v1, two ? v4 : v2, two ? v5 : v3};
        }
        body(segment, keys);
        own = following;
    }
}
