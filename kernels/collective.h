// Pointers of a collective over ranks that share a device.
#pragma once

#include "ptx/shim.h"

constexpr uint32_t kMaxRanks = 16;

struct RankPointers {
    void* of[kMaxRanks];
};

// pfc_dtype and pfc_op values that collectives know.
enum Element : int32_t { kElementF32 = 1, kElementF64 = 4, kElementI32 = 5, kElementI64 = 6 };
enum Reduction : int32_t { kReduceSum = 1, kReduceMax = 2 };
