// What the golden kernels are run on, and how their outputs are compared.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

// How an output of this run may differ from one that was kept.
enum class Judgement {
    kBits,    // not at all
    kFloats,  // only in the bits of a NaN: the ISA leaves a NaN's payload open, and x86 has its own
    kDoubles, // likewise, two words a value
    kUlps,    // floats: by 2 units in the last place of the larger, and as kFloats
    kBounds,  // floats: by the case's bound of each word
};

struct Case {
    std::string name;    // of its file
    std::string kernel;  // golden_..
    unsigned grid, block, shared;
    std::vector<uint32_t> inputs;
    std::vector<uint32_t> initial;  // what the outputs are before the kernel
    Judgement judgement = Judgement::kBits;
    std::vector<float> bounds = {};
};

// All cases; the seed gives their random inputs. Where a case has values one by one, the first and
// the last are plain numbers.
std::vector<Case> make_cases(uint64_t seed);

// Whether word `i` of the outputs may be `now` where `kept` was kept.
bool agrees(const Case& c, const std::vector<uint32_t>& now, const std::vector<uint32_t>& kept,
            size_t i);
