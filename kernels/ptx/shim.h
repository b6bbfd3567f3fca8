// The words that a kernel source needs to be CUDA under nvcc and plain C++ under g++, which an
// emulator runs.
//
//   PFC_KERNEL_OF(name, threads, blocks, (parameters)) { body }
//       an entry: extern "C" __global__, for blocks of up to `threads`, of which the registers let
//       `blocks` fit an SM; under g++ also registered with the emulator, which refuses larger ones
//   PFC_KERNEL(name, (parameters)) { body }
//       the same for the blocks of most kernels: any multiple of 32 up to 256 threads
//   // launch: name blocks 4 per SM threads 256 shared 1024
//   // launch: name blocks 1 threads 1024 shared 256
//       the grid, the threads of a block and the bytes of dynamic shared memory that the host
//       launches an entry with: build/kernels.rs reads these lines. Results do not depend on the
//       grid, nor on the threads but for the order in which block_sum adds doubles. The GEMM
//       kernels have theirs in tune.h.
//   PFC_DEVICE
//       a function of kernels: always inlined
//   PFC_DYNAMIC_SHARED(name)
//       unsigned char name[]: the launch's dynamic shared memory, 16-byte aligned
//
// threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, __syncthreads() and __restrict__ are as in CUDA.
// There is no static __shared__ memory, no texture, no template entry; kernels are launched with
// one-dimensional grids and blocks.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__

#define PFC_DEVICE __device__ __forceinline__
#define PFC_KERNEL_OF(name, threads, blocks, parameters) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters
#define PFC_GRID_CONSTANT __grid_constant__
#define PFC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#else

// Who compiles kernels for the host says where this lies, with -I.
#include <pfc_host_device.h>

#define PFC_DEVICE inline __attribute__((always_inline))
#define PFC_KERNEL_OF(name, threads, blocks, parameters)                           \
    void name parameters;                                                          \
    static const simt::Registration registration_of_##name(#name, &name, threads); \
    void name parameters
#define PFC_GRID_CONSTANT
#define PFC_DYNAMIC_SHARED(name) unsigned char* const name = simt::dynamic_shared()

#endif

#define PFC_KERNEL(name, parameters) PFC_KERNEL_OF(name, 256, 1, parameters)
