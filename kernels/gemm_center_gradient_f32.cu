// The center gradient in float32: three planes of bf16 an operand. See gemm_center_gradient.h.
#include "gemm_center_gradient.h"

CENTER_GRADIENT(gemm_center_gradient_f32_128, 128, 3)
CENTER_GRADIENT(gemm_center_gradient_f32_256, 256, 3)
CENTER_GRADIENT(gemm_center_gradient_f32_512, 512, 3)
CENTER_GRADIENT(gemm_center_gradient_f32_1024, 1024, 3)
