// partialfc over the caller's own NCCL communicator. For C99 and C++11 and later.
//
// SPDX-License-Identifier: MIT OR Apache-2.0
//
//   config.blocking = 0;
//   ncclCommInitRankConfig(&nccl, size, id, rank, &config);
//   do ncclCommGetAsyncError(nccl, &state); while (state == ncclInProgress);
//   if (pfc_comm_from_nccl(&nccl, &comm) != PFC_OK) puts(pfc_nccl_last_error());
//   ... pfc_head_create(device, comm, &options, &head) ...
//   pfc_head_free(head);
//   pfc_comm_free(comm);
//   if (nccl != NULL) ncclCommDestroy(nccl);
//
// For trainers that have an NCCL communicator already. Without one, let the library make it:
// pfc_comm_nccl. The program compiles this header with its own NCCL (2.14 or later) and CUDA
// runtime (11 or later), so that the process has one libnccl only, and links with -lpartialfc
// -lnccl -lcudart.
//
// OWNERSHIP. You keep the communicator: pfc_comm_free does not free it. But only ncclCommAbort can
// end an operation that hangs on a stream, and it frees the communicator. So if an operation runs
// longer than pfc_comm_set_timeout, if a head fails on this rank, and in pfc_comm_abort, the
// library aborts the communicator and sets your variable to NULL, from any thread. Therefore:
// - The functions take a pointer to your variable, which must outlive the pfc_comm.
// - After any failure, and before ncclCommDestroy, check whether the variable is NULL.
// - Use another communicator for the trainer's own operations (ncclCommSplit makes one), so that a
//   failing head does not free it while the trainer is inside NCCL. If you share one communicator,
//   call in the same order on all ranks, and never from two threads at once.
//
// TIMEOUTS. Make the communicator with config.blocking = 0. NCCL's functions then never wait; this
// header waits, up to pfc_comm_set_timeout. With a blocking communicator, a call that hangs inside
// NCCL cannot be ended; the first operation, which makes the connections, may be such a call. An
// operation that NCCL has enqueued can be ended either way.
//
// An error that NCCL reports is returned by the next operation. A wait for the GPU notices it only
// when pfc_comm_set_timeout has passed (with pfc_comm_nccl: at once). The GPU is used in its
// primary context, as the CUDA runtime does.
//
// HOW. Device memory goes to NCCL on the stream that comes with it, and no call waits. Host memory
// goes through a buffer on the GPU (1 MiB, or as much as the largest operation needs) on a separate
// stream, and the call waits. Sums equal those of pfc_comm_threads up to rounding: NCCL adds in its
// own order, which is the same for all ranks. A maximum with a NaN must be NaN, which NCCL does not
// give: in host memory this header gathers all values and takes the maximum itself; in device
// memory it refuses the operation (heads never use it).
//
// Do not compile with -ffast-math, which treats NaN as a number.

#ifndef PARTIALFC_NCCL_H
#define PARTIALFC_NCCL_H

#include <cuda_runtime.h>
#include <nccl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

#if !defined(NCCL_VERSION_CODE) || NCCL_VERSION_CODE < 21400
#error "partialfc_nccl.h needs NCCL 2.14 or later: older ones have no non-blocking communicators"
#endif

////////////////////////////////////////////////////////////////////////////////////////////////////
// Functions for programs.

// Makes a communicator of the ranks of an NCCL communicator. Local: no other rank takes part, and
// the call does not wait.
//
// @param comm the caller's variable, which must outlive the result; set to NULL if the communicator
//   had to be aborted, see the top of this file
// @param out the communicator; free with pfc_comm_free
// @return INVALID_ARGUMENT if comm or *comm is NULL, or if the communicator is still being made
//   (call ncclCommGetAsyncError until it is done); COMM if it has failed; DEVICE or OUT_OF_MEMORY
//   if CUDA fails. pfc_nccl_last_error has the text.
static inline pfc_status pfc_comm_from_nccl(ncclComm_t *comm, pfc_comm **out);

// Fills the functions of pfc_comm_from_nccl without making a communicator, for programs that wrap
// them.
//
// @param ops written. ops->free(ops->ctx) frees its ctx: a communicator made of it calls that, else
//   the caller must.
static inline pfc_status pfc_nccl_ops(ncclComm_t *comm, pfc_comm_ops *ops);

// The text of this thread's last error of the two functions above in this source file, or of
// pfc_last_error if the library failed.
static inline const char *pfc_nccl_last_error(void);

////////////////////////////////////////////////////////////////////////////////////////////////////
// Implementation. Names that end in _ are internal.

// Codes that the functions return, beside NCCL's own results, which are positive.
enum {
  PFC_NCCL_ENDED_ = -1,    // The communicator was aborted.
  PFC_NCCL_MAXIMUM_ = -2,  // A maximum of floats in device memory.
  PFC_NCCL_MEMORY_ = -3,   // No host memory.
  PFC_NCCL_TYPE_ = -4,     // An element type or a reduction that this header does not know.
  PFC_NCCL_CUDA_ = 1 << 16  // Plus an error code of CUDA's.
};

enum { PFC_NCCL_TEXT_ = 256 };

// First size in bytes of the buffer on the GPU; heads need less in host memory. Growing it may wait
// for everything on the GPU.
enum { PFC_NCCL_BUFFER_ = 1 << 20 };

// Bytes that a maximum of floats gathers from each rank at a time.
enum { PFC_NCCL_MAXIMUM_BYTES_ = 1 << 20 };

// A rank's side of the communicator.
struct pfc_nccl_ {
  // The caller's variable; *comm is NULL once it is aborted. Read and used under the mutex.
  ncclComm_t *comm;
  pthread_mutex_t mutex;
  int ended;  // Set by abort, before it waits for the mutex.
  int rank, size, device;
  // For host memory.
  cudaStream_t stream;
  unsigned char *buffer;
  size_t bytes;
};

enum {
  PFC_NCCL_ALL_GATHER_ = 1,
  PFC_NCCL_ALL_REDUCE_ = 2,
  PFC_NCCL_REDUCE_SCATTER_ = 3,
  PFC_NCCL_BROADCAST_ = 4
};

// One operation; count is that of NCCL's function.
struct pfc_nccl_call_ {
  int kind, root;
  const void *send;
  void *recv;
  size_t count, element;
  ncclDataType_t type;
  ncclRedOp_t op;
};

static inline char *pfc_nccl_text_(void) {
  static __thread char text[PFC_NCCL_TEXT_];
  return text;
}

static inline const char *pfc_nccl_last_error(void) {
  return pfc_nccl_text_()[0] != 0 ? pfc_nccl_text_() : pfc_last_error();
}

static inline void pfc_nccl_describe_(int32_t code, char *buffer, size_t size) {
  const char *last;
  switch (code) {
    case PFC_NCCL_ENDED_:
      snprintf(buffer, size, "the NCCL communicator was aborted");
      return;
    case PFC_NCCL_MAXIMUM_:
      snprintf(buffer, size, "unsupported: NCCL loses a NaN in a maximum of floats in device memory");
      return;
    case PFC_NCCL_MEMORY_:
      snprintf(buffer, size, "cannot allocate host memory to combine the ranks' values");
      return;
    case PFC_NCCL_TYPE_:
      snprintf(buffer, size, "unsupported: an element type or a reduction");
      return;
    default:
      break;
  }
  if (code >= PFC_NCCL_CUDA_) {
    snprintf(buffer, size, "%.180s", cudaGetErrorString((cudaError_t)(code - PFC_NCCL_CUDA_)));
    return;
  }
  last = ncclGetLastError(NULL);
  if (last == NULL || last[0] == 0) last = "no more is known";
  snprintf(buffer, size, "%.80s: %.160s", ncclGetErrorString((ncclResult_t)code), last);
}

// Yields: most waits take microseconds, but a rank that has not come yet takes seconds.
static inline void pfc_nccl_rest_(int *idle) {
  if ((*idle)++ < 1000) sched_yield();
  else poll(NULL, 0, 1);
}

static inline int pfc_nccl_has_ended_(struct pfc_nccl_ *self) {
  return __atomic_load_n(&self->ended, __ATOMIC_SEQ_CST);
}

static inline int32_t pfc_nccl_cuda_(cudaError_t error) {
  return error == cudaSuccess ? 0 : PFC_NCCL_CUDA_ + (int32_t)error;
}

// Makes the communicator's GPU current on this thread, until pfc_nccl_leave_.
static inline int32_t pfc_nccl_enter_(int device, int *before) {
  const int32_t code = pfc_nccl_cuda_(cudaGetDevice(before));
  return code != 0 ? code : pfc_nccl_cuda_(cudaSetDevice(device));
}

static inline void pfc_nccl_leave_(int device, int before) {
  if (before != device) (void)cudaSetDevice(before);
}

// The result of ncclCommGetAsyncError.
static inline int32_t pfc_nccl_state_(struct pfc_nccl_ *self) {
  int32_t code = PFC_NCCL_ENDED_;
  pthread_mutex_lock(&self->mutex);
  if (*self->comm != NULL) {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(*self->comm, &state);
    code = (int32_t)(asked != ncclSuccess ? asked : state);
  }
  pthread_mutex_unlock(&self->mutex);
  return code;
}

// Passes an operation to NCCL, and returns when NCCL has enqueued it.
static inline int32_t pfc_nccl_enqueue_(struct pfc_nccl_ *self, const struct pfc_nccl_call_ *call,
                                        const void *send, void *recv, cudaStream_t stream) {
  int32_t code = PFC_NCCL_ENDED_;
  int idle = 0;
  pthread_mutex_lock(&self->mutex);
  if (*self->comm != NULL) {
    const ncclComm_t comm = *self->comm;
    switch (call->kind) {
      case PFC_NCCL_ALL_GATHER_:
        code = (int32_t)ncclAllGather(send, recv, call->count, call->type, comm, stream);
        break;
      case PFC_NCCL_ALL_REDUCE_:
        code = (int32_t)ncclAllReduce(send, recv, call->count, call->type, call->op, comm, stream);
        break;
      case PFC_NCCL_REDUCE_SCATTER_:
        code = (int32_t)ncclReduceScatter(send, recv, call->count, call->type, call->op, comm,
                                          stream);
        break;
      default:
        code = (int32_t)ncclBroadcast(send, recv, call->count, call->type, call->root, comm,
                                      stream);
        break;
    }
  }
  pthread_mutex_unlock(&self->mutex);
  while (code == (int32_t)ncclInProgress) {
    // Between two polls abort can take the mutex.
    pfc_nccl_rest_(&idle);
    code = pfc_nccl_has_ended_(self) ? PFC_NCCL_ENDED_ : pfc_nccl_state_(self);
  }
  return code;
}

// Waits for NCCL's work on a stream.
static inline int32_t pfc_nccl_wait_(struct pfc_nccl_ *self, cudaStream_t stream) {
  int idle = 0;
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state == cudaSuccess) break;
    if (state != cudaErrorNotReady) return pfc_nccl_cuda_(state);
    (void)cudaGetLastError();  // A query that came too early is not an error of the program.
    if (!pfc_nccl_has_ended_(self)) {
      const int32_t code = pfc_nccl_state_(self);
      if (code != 0 && code != (int32_t)ncclInProgress) return code;
    } else {
      return PFC_NCCL_ENDED_;
    }
    pfc_nccl_rest_(&idle);
  }
  // An aborted operation has also ended.
  return pfc_nccl_has_ended_(self) ? PFC_NCCL_ENDED_ : 0;
}

// Makes the buffer on the GPU at least so large.
static inline int32_t pfc_nccl_reserve_(struct pfc_nccl_ *self, size_t bytes) {
  size_t needed = PFC_NCCL_BUFFER_;
  cudaError_t error;
  if (self->buffer != NULL && bytes <= self->bytes) return 0;
  while (needed < bytes && needed <= SIZE_MAX / 2) needed *= 2;
  if (needed < bytes) needed = bytes;
  // Free the old one first: both might not fit.
  if (self->buffer != NULL) (void)cudaFree(self->buffer);
  self->buffer = NULL;
  error = cudaMalloc((void **)&self->buffer, needed);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    self->buffer = NULL;
    return pfc_nccl_cuda_(error);
  }
  self->bytes = needed;
  return 0;
}

// A copy on the stream for host memory, where nothing can hang.
static inline int32_t pfc_nccl_copy_(struct pfc_nccl_ *self, void *to, const void *from,
                                     size_t bytes, enum cudaMemcpyKind direction) {
  int32_t code;
  if (bytes == 0) return 0;
  code = pfc_nccl_cuda_(cudaMemcpyAsync(to, from, bytes, direction, self->stream));
  return code != 0 ? code : pfc_nccl_cuda_(cudaStreamSynchronize(self->stream));
}

// An operation on host memory, done in place in the buffer on the GPU.
static inline int32_t pfc_nccl_through_device_(struct pfc_nccl_ *self,
                                               const struct pfc_nccl_call_ *call) {
  const size_t block = call->count * call->element, own = (size_t)self->rank * block;
  const size_t whole = (size_t)self->size * block;
  // Bytes copied into the buffer and out of it, and their offsets.
  size_t sent = block, put = 0, received = block, get = 0, needed = block;
  int32_t code;
  switch (call->kind) {
    case PFC_NCCL_ALL_GATHER_: put = own; received = needed = whole; break;
    case PFC_NCCL_ALL_REDUCE_: break;
    case PFC_NCCL_REDUCE_SCATTER_: get = own; sent = needed = whole; break;
    default: *(self->rank == call->root ? &received : &sent) = 0; break;
  }
  if ((code = pfc_nccl_reserve_(self, needed)) != 0) return code;
  code = pfc_nccl_copy_(self, self->buffer + put, call->send, sent, cudaMemcpyHostToDevice);
  if (code == 0) {
    code = pfc_nccl_enqueue_(self, call, self->buffer + put, self->buffer + get, self->stream);
  }
  // Copied back only when NCCL is done: after an abort nothing writes to the caller's memory.
  if (code == 0) code = pfc_nccl_wait_(self, self->stream);
  if (code != 0) return code;
  return pfc_nccl_copy_(self, call->recv, self->buffer + get, received, cudaMemcpyDeviceToHost);
}

#define PFC_NCCL_LARGEST_(type)                                                     \
  do {                                                                              \
    type *to = (type *)largest;                                                     \
    const type *from = (const type *)blocks;                                        \
    for (i = 0; i < count; i++) {                                                   \
      type value = from[i];                                                         \
      for (r = 1; r < size; r++) {                                                  \
        const type other = from[r * count + i];                                     \
        if (!(value > other || value != value)) value = other; /* A NaN wins. */    \
      }                                                                             \
      to[i] = value;                                                                \
    }                                                                               \
  } while (0)

// The element-wise maximum of `size` blocks of `count` floats.
static inline void pfc_nccl_combine_(void *largest, const void *blocks, size_t size, size_t count,
                                     size_t element) {
  size_t i, r;
  if (element == 8) PFC_NCCL_LARGEST_(double);
  else PFC_NCCL_LARGEST_(float);
}
#undef PFC_NCCL_LARGEST_

// A maximum of floats in host memory.
static inline int32_t pfc_nccl_largest_(struct pfc_nccl_ *self, const struct pfc_nccl_call_ *call) {
  const size_t size = (size_t)self->size, most = PFC_NCCL_MAXIMUM_BYTES_ / call->element;
  const size_t longest = call->count < most ? call->count : most;
  const size_t parts = call->kind == PFC_NCCL_REDUCE_SCATTER_ ? size : 1;
  unsigned char *blocks = (unsigned char *)malloc(size * longest * call->element);
  size_t part, first;
  int32_t code = blocks == NULL ? PFC_NCCL_MEMORY_ : 0;
  for (part = 0; part < parts && code == 0; part++) {
    for (first = 0; first < call->count && code == 0; first += longest) {
      const size_t left = call->count - first, count = left < longest ? left : longest;
      struct pfc_nccl_call_ gather = *call;
      gather.kind = PFC_NCCL_ALL_GATHER_;
      gather.send =
          (const unsigned char *)call->send + (part * call->count + first) * call->element;
      gather.recv = blocks;
      gather.count = count;
      code = pfc_nccl_through_device_(self, &gather);
      // Every rank gathers all blocks; recv may be this rank's own block of send.
      if (code == 0 && (parts == 1 || part == (size_t)self->rank)) {
        pfc_nccl_combine_((unsigned char *)call->recv + first * call->element, blocks, size, count,
                          call->element);
      }
    }
  }
  free(blocks);
  return code;
}

// Runs an operation in the kind of memory that it was given.
static inline int32_t pfc_nccl_run_(struct pfc_nccl_ *self, const struct pfc_nccl_call_ *call,
                                    void *stream) {
  const int floats = call->type == ncclFloat32 || call->type == ncclFloat64;
  const int loses_nan = floats && call->op == ncclMax;
  enum cudaMemoryType where = cudaMemoryTypeHost;
  struct cudaPointerAttributes attributes;
  int before = 0;
  int32_t code;
  if (pfc_nccl_has_ended_(self)) return PFC_NCCL_ENDED_;
  if (call->count == 0) return 0;  // On all ranks.
  if ((code = pfc_nccl_enter_(self->device, &before)) != 0) return code;
  if (cudaPointerGetAttributes(&attributes, call->recv) == cudaSuccess) where = attributes.type;
  else (void)cudaGetLastError();  // Older runtimes do not know host memory.
  if (where != cudaMemoryTypeDevice && where != cudaMemoryTypeManaged) {
    code = loses_nan ? pfc_nccl_largest_(self, call) : pfc_nccl_through_device_(self, call);
  } else if (loses_nan) {
    code = PFC_NCCL_MAXIMUM_;
  } else {
    code = pfc_nccl_enqueue_(self, call, call->send, call->recv, (cudaStream_t)stream);
    // Managed memory may come from a caller of the host functions, who passes no stream.
    if (code == 0 && where == cudaMemoryTypeManaged && stream == NULL) {
      code = pfc_nccl_wait_(self, NULL);
    }
  }
  pfc_nccl_leave_(self->device, before);
  return code;
}

static inline struct pfc_nccl_call_ pfc_nccl_call_of_(int kind, const void *send, void *recv,
                                                      uint64_t count) {
  struct pfc_nccl_call_ call;
  call.kind = kind;
  call.root = 0;
  call.send = send;
  call.recv = recv;
  call.count = (size_t)count;
  call.element = 1;
  call.type = ncclUint8;
  call.op = ncclSum;
  return call;
}

static inline int32_t pfc_nccl_reduce_(struct pfc_nccl_ *self, struct pfc_nccl_call_ call,
                                       int32_t dtype, int32_t op, void *stream) {
  switch (dtype) {
    case PFC_F32: call.type = ncclFloat32; call.element = 4; break;
    case PFC_F64: call.type = ncclFloat64; call.element = 8; break;
    case PFC_I32: call.type = ncclInt32; call.element = 4; break;
    case PFC_I64: call.type = ncclInt64; call.element = 8; break;
    default: return PFC_NCCL_TYPE_;
  }
  if (op != PFC_SUM && op != PFC_MAX) return PFC_NCCL_TYPE_;
  call.op = op == PFC_SUM ? ncclSum : ncclMax;
  return pfc_nccl_run_(self, &call, stream);
}

static inline int32_t pfc_nccl_all_gather_(void *ctx, const void *send, void *recv, uint64_t bytes,
                                           void *stream) {
  const struct pfc_nccl_call_ call = pfc_nccl_call_of_(PFC_NCCL_ALL_GATHER_, send, recv, bytes);
  return pfc_nccl_run_((struct pfc_nccl_ *)ctx, &call, stream);
}

static inline int32_t pfc_nccl_all_reduce_(void *ctx, const void *send, void *recv, uint64_t count,
                                           int32_t dtype, int32_t op, void *stream) {
  return pfc_nccl_reduce_((struct pfc_nccl_ *)ctx,
                          pfc_nccl_call_of_(PFC_NCCL_ALL_REDUCE_, send, recv, count), dtype, op,
                          stream);
}

static inline int32_t pfc_nccl_reduce_scatter_(void *ctx, const void *send, void *recv,
                                               uint64_t count, int32_t dtype, int32_t op,
                                               void *stream) {
  return pfc_nccl_reduce_((struct pfc_nccl_ *)ctx,
                          pfc_nccl_call_of_(PFC_NCCL_REDUCE_SCATTER_, send, recv, count), dtype, op,
                          stream);
}

static inline int32_t pfc_nccl_broadcast_(void *ctx, void *buffer, uint64_t bytes, uint32_t root,
                                          void *stream) {
  struct pfc_nccl_call_ call = pfc_nccl_call_of_(PFC_NCCL_BROADCAST_, buffer, buffer, bytes);
  call.root = (int)root;
  return pfc_nccl_run_((struct pfc_nccl_ *)ctx, &call, stream);
}

static inline int32_t pfc_nccl_barrier_(void *ctx) {
  int32_t token = 0;
  return pfc_nccl_all_reduce_(ctx, &token, &token, 1, PFC_I32, PFC_SUM, NULL);
}

static inline void pfc_nccl_abort_(void *ctx) {
  struct pfc_nccl_ *self = (struct pfc_nccl_ *)ctx;
  int before = 0, entered;
  __atomic_store_n(&self->ended, 1, __ATOMIC_SEQ_CST);
  pthread_mutex_lock(&self->mutex);
  if (*self->comm != NULL) {
    entered = pfc_nccl_enter_(self->device, &before) == 0;
    // Even if this fails, the communicator is gone.
    (void)ncclCommAbort(*self->comm);
    *self->comm = NULL;
    if (entered) pfc_nccl_leave_(self->device, before);
  }
  pthread_mutex_unlock(&self->mutex);
}

static inline int32_t pfc_nccl_async_error_(void *ctx) {
  const int32_t code = pfc_nccl_state_((struct pfc_nccl_ *)ctx);
  return code == (int32_t)ncclInProgress ? 0 : code;
}

static inline void pfc_nccl_error_string_(void *ctx, int32_t code, char *buffer, uint64_t size) {
  (void)ctx;
  pfc_nccl_describe_(code, buffer, (size_t)size);
}

static inline void pfc_nccl_free_(void *ctx) {
  struct pfc_nccl_ *self = (struct pfc_nccl_ *)ctx;
  int before = 0;
  // Without these not even the GPU may be known.
  const int used = self->stream != NULL || self->buffer != NULL;
  if (used && pfc_nccl_enter_(self->device, &before) == 0) {
    if (self->stream != NULL) (void)cudaStreamDestroy(self->stream);
    if (self->buffer != NULL) (void)cudaFree(self->buffer);
    pfc_nccl_leave_(self->device, before);
  }
  pthread_mutex_destroy(&self->mutex);
  free(self);
}

// Sets the text of what failed while a communicator was being made.
static inline pfc_status pfc_nccl_refuse_(pfc_status status, const char *what, int32_t code) {
  char reason[PFC_NCCL_TEXT_];
  pfc_nccl_describe_(code, reason, sizeof reason);
  snprintf(pfc_nccl_text_(), PFC_NCCL_TEXT_, "%.50s: %.200s", what, reason);
  return status;
}

// Reads rank, size and GPU of the communicator, and checks that it can be used.
static inline pfc_status pfc_nccl_look_(struct pfc_nccl_ *self) {
  ncclResult_t state = ncclSuccess, result = ncclCommGetAsyncError(*self->comm, &state);
  const char *what = "ncclCommGetAsyncError";
  if (result == ncclSuccess && state == ncclInProgress) {
    snprintf(pfc_nccl_text_(), PFC_NCCL_TEXT_,
             "the communicator is still being made: ask ncclCommGetAsyncError until it is done");
    return PFC_ERROR_INVALID_ARGUMENT;
  }
  if (result == ncclSuccess && state != ncclSuccess) {
    return pfc_nccl_refuse_(PFC_ERROR_COMM, "the communicator has failed", (int32_t)state);
  }
  if (result == ncclSuccess) {
    what = "ncclCommUserRank";
    result = ncclCommUserRank(*self->comm, &self->rank);
  }
  if (result == ncclSuccess) {
    what = "ncclCommCount";
    result = ncclCommCount(*self->comm, &self->size);
  }
  if (result == ncclSuccess) {
    what = "ncclCommCuDevice";
    result = ncclCommCuDevice(*self->comm, &self->device);
  }
  return result == ncclSuccess ? PFC_OK : pfc_nccl_refuse_(PFC_ERROR_COMM, what, (int32_t)result);
}

// The stream and the buffer for host memory.
static inline pfc_status pfc_nccl_prepare_(struct pfc_nccl_ *self) {
  const int32_t no_memory = PFC_NCCL_CUDA_ + (int32_t)cudaErrorMemoryAllocation;
  const char *what = "the communicator's GPU";
  int before = 0;
  int32_t code = pfc_nccl_enter_(self->device, &before);
  if (code == 0) {
    what = "a stream";
    code = pfc_nccl_cuda_(cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking));
    if (code == 0) {
      what = "1 MiB on the GPU";
      code = pfc_nccl_reserve_(self, PFC_NCCL_BUFFER_);
    }
    pfc_nccl_leave_(self->device, before);
  }
  if (code == 0) return PFC_OK;
  return pfc_nccl_refuse_(code == no_memory ? PFC_ERROR_OUT_OF_MEMORY : PFC_ERROR_DEVICE, what,
                          code);
}

static inline pfc_status pfc_nccl_ops(ncclComm_t *comm, pfc_comm_ops *ops) {
  struct pfc_nccl_ *self;
  char *text = pfc_nccl_text_();
  pfc_status status;
  text[0] = 0;
  if (comm == NULL || *comm == NULL || ops == NULL) {
    snprintf(text, PFC_NCCL_TEXT_, "%s must not be NULL",
             comm == NULL ? "comm" : *comm == NULL ? "*comm" : "ops");
    return PFC_ERROR_INVALID_ARGUMENT;
  }
  self = (struct pfc_nccl_ *)calloc(1, sizeof *self);
  if (self == NULL || pthread_mutex_init(&self->mutex, NULL) != 0) {
    free(self);
    snprintf(text, PFC_NCCL_TEXT_, "cannot allocate %u bytes for a communicator",
             (unsigned)sizeof *self);
    return PFC_ERROR_OUT_OF_MEMORY;
  }
  self->comm = comm;
  if ((status = pfc_nccl_look_(self)) != PFC_OK || (status = pfc_nccl_prepare_(self)) != PFC_OK ||
      (status = pfc_comm_ops_init(ops)) != PFC_OK) {
    pfc_nccl_free_(self);
    return status;
  }
  ops->ctx = self;
  ops->rank = (uint32_t)self->rank;
  ops->size = (uint32_t)self->size;
  ops->flags = PFC_COMM_HOST_MEMORY | PFC_COMM_DEVICE_MEMORY | PFC_COMM_STREAM_ORDERED;
  ops->all_gather = pfc_nccl_all_gather_;
  ops->all_reduce = pfc_nccl_all_reduce_;
  ops->reduce_scatter = pfc_nccl_reduce_scatter_;
  ops->broadcast = pfc_nccl_broadcast_;
  ops->barrier = pfc_nccl_barrier_;
  ops->abort = pfc_nccl_abort_;
  ops->async_error = pfc_nccl_async_error_;
  ops->error_string = pfc_nccl_error_string_;
  ops->free = pfc_nccl_free_;
  return PFC_OK;
}

static inline pfc_status pfc_comm_from_nccl(ncclComm_t *comm, pfc_comm **out) {
  pfc_comm_ops ops;
  pfc_status status = pfc_nccl_ops(comm, &ops);
  if (status == PFC_OK && (status = pfc_comm_custom(&ops, out)) != PFC_OK) ops.free(ops.ctx);
  return status;
}

#endif  // PARTIALFC_NCCL_H
