/*
 * As much of the CUDA runtime as partialfc_nccl.h and its tests call, over the driver that is
 * loaded or found: the emulator of ../../cuda-emulator has no runtime. What these functions return, and what
 * they do with contexts, follows the runtime's documentation.
 */
#pragma once

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CUDART_VERSION 13000

typedef struct CUstream_st *cudaStream_t;

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNotReady = 600,
  cudaErrorUnknown = 999
};
typedef enum cudaError cudaError_t;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3
};

enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3
};

struct cudaPointerAttributes {
  enum cudaMemoryType type;
  int device;
  void *devicePointer;
  void *hostPointer;
};

#define cudaStreamNonBlocking 1

/* A function of the driver's, copied to where `function` points; there is no test without it. */
static inline void shim_find_(const char *name, void *function) {
  static const char *const libraries[] = {"libcuda.so", "libcuda.so.1"};
  const int loaded = RTLD_NOW | RTLD_NOLOAD;
  void *library = NULL, *found = NULL;
  size_t i;
  for (i = 0; i < 4 && library == NULL; i++) {
    library = dlopen(libraries[i % 2], i < 2 ? loaded : RTLD_NOW);
  }
  if (library != NULL) found = dlsym(library, name);
  if (found == NULL) {
    fprintf(stderr, "no %s in a CUDA driver\n", name);
    abort();
  }
  memcpy(function, &found, sizeof found);
}

/* The function `name` of the driver's, with arguments of these types, as `f`. */
#define SHIM_DRIVER_(name, ...) \
  int (*f)(__VA_ARGS__);        \
  shim_find_(name, &f)

static inline cudaError_t cudaGetDevice(int *device) {
  void *context = NULL;
  {
    SHIM_DRIVER_("cuCtxGetCurrent", void **);
    if (f(&context) != 0) context = NULL;
  }
  *device = 0;
  if (context == NULL) return cudaSuccess;
  SHIM_DRIVER_("cuCtxGetDevice", int *);
  return (cudaError_t)f(device);
}

static inline cudaError_t cudaSetDevice(int device) {
  void *context = NULL;
  int result;
  {
    SHIM_DRIVER_("cuInit", unsigned);
    result = f(0);
  }
  if (result == 0) {
    SHIM_DRIVER_("cuDevicePrimaryCtxRetain", void **, int);
    result = f(&context, device);
  }
  if (result == 0) {
    SHIM_DRIVER_("cuCtxSetCurrent", void *);
    result = f(context);
  }
  return (cudaError_t)result;
}

static inline cudaError_t cudaGetLastError(void) { return cudaSuccess; }

static inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the driver's";
}

static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  SHIM_DRIVER_("cuStreamCreate", cudaStream_t *, unsigned);
  return (cudaError_t)f(stream, flags);
}

static inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  SHIM_DRIVER_("cuStreamDestroy_v2", cudaStream_t);
  return (cudaError_t)f(stream);
}

static inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
  SHIM_DRIVER_("cuStreamQuery", cudaStream_t);
  return (cudaError_t)f(stream);
}

static inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  SHIM_DRIVER_("cuStreamSynchronize", cudaStream_t);
  return (cudaError_t)f(stream);
}

static inline cudaError_t cudaMalloc(void **at, size_t bytes) {
  unsigned long long address = 0;
  int result;
  SHIM_DRIVER_("cuMemAlloc_v2", unsigned long long *, size_t);
  result = f(&address, bytes);
  *at = (void *)(uintptr_t)address;
  return (cudaError_t)result;
}

static inline cudaError_t cudaFree(void *at) {
  SHIM_DRIVER_("cuMemFree_v2", unsigned long long);
  return at == NULL ? cudaSuccess : (cudaError_t)f((unsigned long long)(uintptr_t)at);
}

static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                          enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind == cudaMemcpyHostToDevice) {
    SHIM_DRIVER_("cuMemcpyHtoDAsync_v2", unsigned long long, const void *, size_t, cudaStream_t);
    return (cudaError_t)f((unsigned long long)(uintptr_t)to, from, bytes, stream);
  }
  if (kind == cudaMemcpyDeviceToHost) {
    SHIM_DRIVER_("cuMemcpyDtoHAsync_v2", void *, unsigned long long, size_t, cudaStream_t);
    return (cudaError_t)f(to, (unsigned long long)(uintptr_t)from, bytes, stream);
  }
  return cudaErrorInvalidValue;
}

static inline cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                                   const void *at) {
  unsigned type = 0;
  SHIM_DRIVER_("cuPointerGetAttribute", void *, int, unsigned long long);
  memset(attributes, 0, sizeof *attributes);
  /* CU_POINTER_ATTRIBUTE_MEMORY_TYPE, of which 1 is the host's and 2 a device's; memory that the
     driver does not know is no error here. */
  if (f(&type, 2, (unsigned long long)(uintptr_t)at) == 0) {
    attributes->type = type == 2 ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  }
  return cudaSuccess;
}
