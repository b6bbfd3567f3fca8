// Philox4x32-10 as its paper has it, written out.
#pragma once

#include <array>
#include <cstdint>

inline std::array<uint32_t, 4> philox_of(std::array<uint32_t, 4> counter, uint64_t seed) {
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t(0xD2511F53) * counter[0];
        const uint64_t second = uint64_t(0xCD9E8D57) * counter[2];
        counter[0] = uint32_t(second >> 32) ^ counter[1] ^ key[0];
        counter[2] = uint32_t(first >> 32) ^ counter[3] ^ key[1];
        counter[1] = uint32_t(second);
        counter[3] = uint32_t(first);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return counter;
}
