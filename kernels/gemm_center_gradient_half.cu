// The center gradient in half precision: bf16 operands. See gemm_center_gradient.h.
#include "gemm_center_gradient.h"

CENTER_GRADIENT(gemm_center_gradient_half_128, 128, 1)
CENTER_GRADIENT(gemm_center_gradient_half_256, 256, 1)
CENTER_GRADIENT(gemm_center_gradient_half_512, 512, 1)
CENTER_GRADIENT(gemm_center_gradient_half_1024, 1024, 1)
