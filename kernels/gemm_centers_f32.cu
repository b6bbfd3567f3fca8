// GEMM3 in float32: three planes of bf16 an operand. See gemm_centers.h.
#include "gemm_centers.h"

CENTERS(multiply_centers_f32_128, 128, 3)
CENTERS(multiply_centers_f32_256, 256, 3)
CENTERS(multiply_centers_f32_512, 512, 3)
CENTERS(multiply_centers_f32_1024, 1024, 3)
