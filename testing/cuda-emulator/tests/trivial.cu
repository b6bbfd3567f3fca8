// Kernels for the tests of src/device/cuda/driver: to[i] = from[i] * factor + add, as little as a
// kernel can do.
// src/device/cuda/driver/tests.rs has the same as PTX, for a real GPU.
#include "../../../kernels/ptx/shim.h"

// By value, as views are.
struct TrivialRule {
    double factor;
    uint32_t add;
    uint32_t reserved;
};

PFC_KERNEL(trivial_scale, (const float* from, float* to, const PFC_GRID_CONSTANT TrivialRule rule,
                           uint32_t count)) {
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t i = first; i < count; i += gridDim.x * blockDim.x) {
        to[i] = (float)((double)from[i] * rule.factor + (double)rule.add);
    }
}
