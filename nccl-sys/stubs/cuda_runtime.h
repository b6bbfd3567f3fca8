// What nccl.h takes from CUDA: two opaque handles and a version. With these, its bindings are made without CUDA.
#pragma once

#include <stddef.h>

#define CUDART_VERSION 0

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
