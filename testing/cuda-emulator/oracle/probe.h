// The models' answers to the oracle. Apart from it, because CUDA's headers, which CuTe's need, and
// the emulator's cuda_api.h declare the same names. The kernels are probe_kernels.cu's.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

// A product a block: lane l of block b brings a[(32 b + l) 4..], b[(32 b + l) 2..], c like a.
std::vector<float> probe_mma(bool half, int32_t wrong, const std::vector<uint32_t>& a,
                             const std::vector<uint32_t>& b, const std::vector<float>& c);
// Four registers a lane; `rows` is 32 rows of shared memory, `memory` 32 x 8 values.
std::vector<uint32_t> probe_ldmatrix(bool transposed, int32_t wrong,
                                     const std::vector<uint16_t>& memory,
                                     const std::vector<uint32_t>& rows);
// Where each piece of a tile of 128 rows of `columns` values lies, in bytes.
std::vector<uint32_t> probe_swizzle(uint32_t columns, int32_t wrong);
// What the emulator has found wrong so far.
std::string probe_findings();
