// Two kernels that are easy to follow.
#include "ptx/shim.h"

PFC_KERNEL(add_one, (uint32_t* words)) { words[threadIdx.x] += 1; }

PFC_KERNEL(set_words, (uint32_t* words, uint32_t value)) { words[threadIdx.x] = value; }
