// Element types, and sums of them in the order of ranks.
#pragma once

#include <stddef.h>

#include <vector>

#include "nccl_api.h"

namespace standin {

// 0: no such type.
size_t size_of(ncclDataType_t type);
// The half-precision types are carried only.
bool can_reduce(ncclDataType_t type);
void reduce(ncclDataType_t type, ncclRedOp_t how, const std::vector<const char*>& sources,
            char* to, size_t count);

}  // namespace standin
