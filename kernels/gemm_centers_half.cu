// GEMM3 in half precision: bf16 operands. See gemm_centers.h.
#include "gemm_centers.h"

CENTERS(multiply_centers_half_128, 128, 1)
CENTERS(multiply_centers_half_256, 256, 1)
CENTERS(multiply_centers_half_512, 512, 1)
CENTERS(multiply_centers_half_1024, 1024, 1)
