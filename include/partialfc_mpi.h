// partialfc over MPI: makes a communicator of the caller's MPI_Comm. For C99 and C++11 and later.
//
// SPDX-License-Identifier: MIT OR Apache-2.0
//
//   MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
//   if (pfc_comm_mpi(MPI_COMM_WORLD, &comm) != PFC_OK) puts(pfc_mpi_last_error());
//   ... pfc_head_create(device, comm, &options, &head) ...
//   pfc_comm_free(comm);
//   MPI_Finalize();
//
// The program compiles this header with its own MPI (mpicc). libpartialfc links with no MPI, so one
// build of it serves every MPI. The header fills a pfc_comm_ops with functions that take host
// memory; for a head on a GPU the library copies to host memory and back.
//
// HOW. Every operation is a set of messages from each rank to each other rank (MPI_Isend,
// MPI_Irecv), which suits tens of ranks. The header does not use MPI's own collectives, for four
// reasons:
// - Sums are taken in the order of the ranks. So every MPI gives the bits of pfc_comm_threads, and
//   the maximum of a NaN and a number is the NaN.
// - A wait is a loop around MPI_Testsome that also checks the deadline and pfc_comm_abort. The text
//   of the error names the ranks that it waited for.
// - A rank that fails tells the other ranks in its last messages, so they fail at once. Every
//   message carries its operation and its length, so ranks in different operations are detected.
// - After a failure MPI may still read and write the messages in flight. All messages lie in this
//   header's own memory, PFC_MPI_STAGE bytes each way, which is then kept; the caller's data are
//   copied. Larger buffers are sent in messages of at most 1 MiB, so no count comes near 2^31.
//
// THREADS. MPI is called only by a thread that is inside a pfc_ call, and by pfc_comm_abort if that
// runs on MPI's main thread or under MPI_THREAD_MULTIPLE. So MPI_THREAD_FUNNELED is enough if all
// pfc_ calls on the communicator come from MPI's main thread. From another thread pfc_comm_abort
// stops a running operation; if none is running, the other ranks are told when the communicator is
// freed.
//
// AFTER A FAILURE (COMM, TIMEOUT, ABORTED) the duplicate of the MPI_Comm is not freed, because that
// is collective. If a rank is gone, MPI_Finalize may wait for it: end the program with MPI_Abort.
//
// ERRORS OF MPI come back as COMM with MPI's own text. Those of MPI_Testsome go to the error handler
// of MPI_COMM_SELF or MPI_COMM_WORLD in some MPIs, so an operation sets both to MPI_ERRORS_RETURN
// until it is over. Under MPI_THREAD_MULTIPLE it does not, because other threads may do the same:
// there set them yourself, or such an error ends the process.
//
// Do not compile with -ffast-math, which treats NaN as a number. All ranks must have the same byte
// order.

#ifndef PARTIALFC_MPI_H
#define PARTIALFC_MPI_H

// MPI's C++ bindings, which were removed from the standard, do not compile without warnings.
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif

#include <limits.h>
#include <mpi.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

// Bytes of memory for messages each way, divided equally among the ranks. It is touched only as
// messages need it. You may define it before including this header, the same on all ranks: another
// value makes pfc_comm_mpi fail with MISMATCH on all of them.
#ifndef PFC_MPI_STAGE
#define PFC_MPI_STAGE (32u << 20)
#endif

////////////////////////////////////////////////////////////////////////////////////////////////////
// Functions for programs.

// Makes a communicator of the ranks of an MPI communicator. Collective over comm. No timeout
// applies.
//
// The MPI communicator is duplicated; the caller keeps it. Free the result with pfc_comm_free
// before MPI_Finalize.
//
// @param comm an intracommunicator
// @param out the communicator
// @return INVALID_ARGUMENT if MPI is not initialized, or does not allow calls from this thread;
//   COMM if MPI fails; REMOTE if another rank could not make its communicator; MISMATCH on all
//   ranks if they were compiled with another PFC_MPI_STAGE or another version of this header.
//   pfc_mpi_last_error has the text.
static inline pfc_status pfc_comm_mpi(MPI_Comm comm, pfc_comm **out);

// Fills the functions of pfc_comm_mpi without making a communicator, for programs that wrap them.
// Collective, as pfc_comm_mpi.
//
// @param ops written. ops->free(ops->ctx) frees its ctx: a communicator made of it calls that, else
//   the caller must.
static inline pfc_status pfc_mpi_ops(MPI_Comm comm, pfc_comm_ops *ops);

// Sends the id of an NCCL communicator from rank 0 to all ranks. Collective over comm. No timeout
// applies.
//
//   status = rank == 0 ? pfc_nccl_unique_id(id) : PFC_OK;
//   if ((status = pfc_mpi_share_nccl_id(MPI_COMM_WORLD, status, id)) == PFC_OK)
//     status = pfc_comm_nccl(id, rank, size, device, &comm);
//
// Ends with a barrier: a rank that enters NCCL makes no more progress in MPI, and other ranks may
// still need it for their copy.
//
// @param made rank 0: the status of making the id; ignored on other ranks
// @param id 128 bytes, read on rank 0 and written on the others, if made is OK
// @return made on rank 0, and REMOTE on the others if made is an error; COMM if MPI fails
static inline pfc_status pfc_mpi_share_nccl_id(MPI_Comm comm, pfc_status made, uint8_t id[128]);

// The text of the last error of the three functions above in this source file, or of
// pfc_last_error if the library failed.
static inline const char *pfc_mpi_last_error(void);

////////////////////////////////////////////////////////////////////////////////////////////////////
// Implementation. Names that end in _ are internal.

// Codes that the functions return, beside MPI's own error codes, which are positive.
enum {
  PFC_MPI_ENDED_ = -1,   // The deadline has passed, or abort was called.
  PFC_MPI_REMOTE_ = -2,  // Another rank has ended the communicator.
  PFC_MPI_MISMATCH_ = -3   // Another rank is in another operation, or sends another length.
};

// Changes whenever ranks with this header and with an older one would not understand each other.
enum { PFC_MPI_MESSAGES_ = 1 };

// The operation of a message: the lowest bits of its tag.
enum {
  PFC_MPI_ALL_GATHER_ = 1,
  PFC_MPI_ALL_REDUCE_ = 2,
  PFC_MPI_REDUCE_SCATTER_ = 3,
  PFC_MPI_BROADCAST_ = 4,
  PFC_MPI_BARRIER_ = 5,
  PFC_MPI_FAREWELL_ = 6  // A failed rank's last message: a text.
};

// Bytes of the longest error text, with its terminating zero.
enum { PFC_MPI_TEXT_ = 256 };

// A rank's side of the communicator.
struct pfc_mpi_ {
  MPI_Comm comm;  // A duplicate, so that its messages meet no others.
  int rank, size, level;
  // Bytes of one rank's slot in the staging memory, and of the largest message.
  size_t slot, message_bytes;
  unsigned char *out, *in;
  // Bytes sent to and received from each rank in an operation; -1: no message.
  int *sent, *received;
  // Receives by rank, then sends by rank, then farewells by rank.
  MPI_Request *requests;
  MPI_Status *statuses;
  int *indices;
  int kind, tag;
  unsigned sequence;
  // Those of MPI_COMM_SELF and MPI_COMM_WORLD, while an operation has its own.
  MPI_Errhandler handlers[2];
  int own_handlers;
  // Set by abort, from any thread. The farewells are sent once.
  int ended, farewells_sent, running;
  char text[PFC_MPI_TEXT_];
  char farewell[PFC_MPI_TEXT_];
};

static inline char *pfc_mpi_text_(void) {
  static char text[2 * PFC_MPI_TEXT_];
  return text;
}

static inline const char *pfc_mpi_last_error(void) {
  return pfc_mpi_text_()[0] != 0 ? pfc_mpi_text_() : pfc_last_error();
}

static inline const char *pfc_mpi_kind_name_(int kind) {
  static const char *const names[] = {"?",         "all_gather", "all_reduce", "reduce_scatter",
                                      "broadcast", "barrier",    "?",          "?"};
  return names[kind & 7];
}

// Writes "what: MPI's text of the code" and returns the code.
static inline int32_t pfc_mpi_explain_(char *text, size_t size, const char *what, int code) {
  char reason[MPI_MAX_ERROR_STRING + 1];
  int length = 0;
  if (MPI_Error_string(code, reason, &length) != MPI_SUCCESS) length = 0;
  reason[length] = 0;
  snprintf(text, size, "%s: %.180s", what, reason);
  return code;
}

// The ranks that a stopped operation waits for: those whose message has not come or, if all have
// come, those that have not received this rank's.
static inline void pfc_mpi_name_the_late_(struct pfc_mpi_ *self) {
  int half, r, length, late = 0;
  length = snprintf(self->text, sizeof self->text, "%s waits for rank",
                    pfc_mpi_kind_name_(self->kind));
  for (half = 0; half < 2 && late == 0; half++) {
    for (r = 0; r < self->size && length < (int)sizeof self->text - 24; r++) {
      if (self->requests[half * self->size + r] == MPI_REQUEST_NULL) continue;
      length += snprintf(self->text + length, sizeof self->text - (size_t)length, "%s %d",
                         late++ > 0 ? "," : "", r);
    }
    if (r < self->size) snprintf(self->text + length, sizeof self->text - (size_t)length, ", ..");
  }
  if (late == 0) {
    snprintf(self->text, sizeof self->text, "rank %d has ended the communicator", self->rank);
  }
}

// Sends the text of the failure to all other ranks: once, and only if this thread may call MPI.
static inline void pfc_mpi_tell_(struct pfc_mpi_ *self, int inside) {
  int r, flag = 0;
  if (!inside) {
    if (MPI_Finalized(&flag) != MPI_SUCCESS || flag) return;
    if (self->level != MPI_THREAD_MULTIPLE) {
      if (self->level == MPI_THREAD_SERIALIZED) return;
      if (MPI_Is_thread_main(&flag) != MPI_SUCCESS || !flag) return;
    }
  }
  if (__atomic_exchange_n(&self->farewells_sent, 1, __ATOMIC_SEQ_CST)) return;
  if (self->text[0] != 0) {
    snprintf(self->farewell, sizeof self->farewell, "%.200s", self->text);
  } else {
    snprintf(self->farewell, sizeof self->farewell, "it was aborted there");
  }
  for (r = 0; r < self->size; r++) {
    if (r == self->rank) continue;
    // A rank that cannot be reached notices by its own timeout.
    (void)MPI_Isend(self->farewell, PFC_MPI_TEXT_, MPI_BYTE, r, PFC_MPI_FAREWELL_, self->comm,
                    &self->requests[2 * self->size + r]);
  }
}

// Leaves a failed operation. Messages that cannot be cancelled stay in the staging memory.
static inline int32_t pfc_mpi_leave_(struct pfc_mpi_ *self, int32_t code) {
  int r, done;
  for (r = 0; r < self->size; r++) {
    if (self->requests[r] == MPI_REQUEST_NULL) continue;
    if (MPI_Cancel(&self->requests[r]) != MPI_SUCCESS) continue;
    (void)MPI_Test(&self->requests[r], &done, MPI_STATUS_IGNORE);
  }
  __atomic_store_n(&self->ended, 1, __ATOMIC_SEQ_CST);
  pfc_mpi_tell_(self, 1);
  return code;
}

static inline int32_t pfc_mpi_failed_(struct pfc_mpi_ *self, const char *function, int r,
                                      int code) {
  char what[64];
  snprintf(what, sizeof what, "%s of rank %d", function, r);
  return pfc_mpi_leave_(self, pfc_mpi_explain_(self->text, sizeof self->text, what, code));
}

// Checks a message from rank r: does it belong to this operation, with the expected length?
static inline int32_t pfc_mpi_judge_(struct pfc_mpi_ *self, int r, const MPI_Status *status) {
  const unsigned char *words = self->in + (size_t)r * self->slot;
  const char *mine = pfc_mpi_kind_name_(self->kind);
  const int kind = status->MPI_TAG & 7;
  int bytes = -1;
  if (MPI_Get_count(status, MPI_BYTE, &bytes) != MPI_SUCCESS) bytes = -1;
  if (kind == PFC_MPI_FAREWELL_) {
    snprintf(self->text, sizeof self->text, "rank %d has ended the communicator: %.180s", r,
             bytes == PFC_MPI_TEXT_ ? (const char *)words : "?");
    __atomic_store_n(&self->farewells_sent, 1, __ATOMIC_SEQ_CST);  // Its farewell went to all.
    return pfc_mpi_leave_(self, PFC_MPI_REMOTE_);
  }
  if (status->MPI_TAG == self->tag && bytes == self->received[r]) return 0;
  if (kind != self->kind) {
    snprintf(self->text, sizeof self->text, "rank %d is in %s, rank %d in %s", r,
             pfc_mpi_kind_name_(kind), self->rank, mine);
  } else if (status->MPI_TAG != self->tag) {
    snprintf(self->text, sizeof self->text, "ranks %d and %d are not in the same %s", r, self->rank,
             mine);
  } else {
    snprintf(self->text, sizeof self->text,
             "rank %d sends %d bytes to this %s, rank %d waits for %d", r, bytes, mine, self->rank,
             self->received[r]);
  }
  return pfc_mpi_leave_(self, PFC_MPI_MISMATCH_);
}

// Sends self->sent[r] bytes to every rank r, from the r-th part of the staging memory or (same)
// from the first, and receives self->received[r] bytes from every rank into its part.
static inline int32_t pfc_mpi_exchange_(struct pfc_mpi_ *self, int same) {
  const int n = self->size;
  int k, r, code, done, left = 0, idle = 0;
  for (k = 1; k < n; k++) {
    r = (self->rank + n - k) % n;
    if (self->received[r] < 0) continue;
    // A whole slot, so that a farewell or a message of a wrong length fits.
    code = MPI_Irecv(self->in + (size_t)r * self->slot, (int)self->slot, MPI_BYTE, r, MPI_ANY_TAG,
                     self->comm, &self->requests[r]);
    if (code != MPI_SUCCESS) return pfc_mpi_failed_(self, "MPI_Irecv", r, code);
    left++;
  }
  for (k = 1; k < n; k++) {
    r = (self->rank + k) % n;
    if (self->sent[r] < 0) continue;
    code = MPI_Isend(self->out + (same ? 0 : (size_t)r * self->slot), self->sent[r], MPI_BYTE, r,
                     self->tag, self->comm, &self->requests[n + r]);
    if (code != MPI_SUCCESS) return pfc_mpi_failed_(self, "MPI_Isend", r, code);
    left++;
  }
  while (left > 0) {
    if (__atomic_load_n(&self->ended, __ATOMIC_SEQ_CST)) {
      pfc_mpi_name_the_late_(self);
      return pfc_mpi_leave_(self, PFC_MPI_ENDED_);
    }
    done = 0;
    code = MPI_Testsome(2 * n, self->requests, &done, self->indices, self->statuses);
    if (code != MPI_SUCCESS) {
      int class_of = MPI_SUCCESS;
      (void)MPI_Error_class(code, &class_of);
      if (class_of != MPI_ERR_IN_STATUS) return pfc_mpi_failed_(self, "MPI_Testsome", -1, code);
      for (k = 0; k < done; k++) {
        const int error = self->statuses[k].MPI_ERROR;
        if (error == MPI_SUCCESS || error == MPI_ERR_PENDING) continue;
        r = self->indices[k];
        return pfc_mpi_failed_(self, r < n ? "the message" : "the message to and taking", r % n,
                               error);
      }
    }
    for (k = 0; k < done; k++) {
      if (self->indices[k] >= n) continue;
      code = pfc_mpi_judge_(self, self->indices[k], &self->statuses[k]);
      if (code != 0) return code;
    }
    if (done > 0) {
      left -= done;
      idle = 0;
    } else if (idle++ < 1000) {
      sched_yield();  // There may be more ranks than cores.
    } else {
      poll(NULL, 0, 1);
    }
  }
  return 0;
}

// Lets MPI's errors come back, and keeps the caller's error handlers, or sets these again.
static inline void pfc_mpi_handlers_(struct pfc_mpi_ *self, int own) {
  const MPI_Comm comms[2] = {MPI_COMM_SELF, MPI_COMM_WORLD};
  int i;
  if (self->level == MPI_THREAD_MULTIPLE || self->own_handlers == own) return;
  self->own_handlers = own;
  for (i = 0; i < 2; i++) {
    if (own) {
      if (MPI_Comm_get_errhandler(comms[i], &self->handlers[i]) != MPI_SUCCESS) {
        self->handlers[i] = MPI_ERRHANDLER_NULL;
        continue;
      }
      (void)MPI_Comm_set_errhandler(comms[i], MPI_ERRORS_RETURN);
    } else if (self->handlers[i] != MPI_ERRHANDLER_NULL) {
      (void)MPI_Comm_set_errhandler(comms[i], self->handlers[i]);
      (void)MPI_Errhandler_free(&self->handlers[i]);
    }
  }
}

// Begins an operation.
static inline int32_t pfc_mpi_begin_(struct pfc_mpi_ *self, int kind) {
  int r;
  pfc_mpi_handlers_(self, 1);
  __atomic_store_n(&self->running, 1, __ATOMIC_SEQ_CST);
  self->kind = kind;
  self->tag = (int)(++self->sequence & 0xfff) << 3 | kind;  // At most 32767, which all MPI have.
  for (r = 0; r < self->size; r++) self->sent[r] = self->received[r] = 0;
  if (!__atomic_load_n(&self->ended, __ATOMIC_SEQ_CST)) return 0;
  snprintf(self->text, sizeof self->text, "rank %d has ended the communicator", self->rank);
  return pfc_mpi_leave_(self, PFC_MPI_ENDED_);
}

static inline int32_t pfc_mpi_end_(struct pfc_mpi_ *self, int32_t code) {
  pfc_mpi_handlers_(self, 0);
  __atomic_store_n(&self->running, 0, __ATOMIC_SEQ_CST);
  return code;
}

static inline void pfc_mpi_copy_(void *to, const void *from, size_t bytes) {
  if (bytes > 0 && to != from) memcpy(to, from, bytes);
}

static inline size_t pfc_mpi_least_(uint64_t a, size_t b) { return a < b ? (size_t)a : b; }

static inline int32_t pfc_mpi_all_gather_(void *ctx, const void *send, void *recv, uint64_t bytes,
                                          void *stream) {
  struct pfc_mpi_ *self = (struct pfc_mpi_ *)ctx;
  uint64_t at = 0;
  int32_t code = pfc_mpi_begin_(self, PFC_MPI_ALL_GATHER_);
  int r;
  (void)stream;
  for (; code == 0 && at < bytes; at += self->message_bytes) {
    const size_t part = pfc_mpi_least_(bytes - at, self->message_bytes);
    for (r = 0; r < self->size; r++) self->sent[r] = self->received[r] = (int)part;
    memcpy(self->out, (const char *)send + at, part);
    if ((code = pfc_mpi_exchange_(self, 1)) != 0) break;
    for (r = 0; r < self->size; r++) {
      const unsigned char *from = r == self->rank ? self->out : self->in + (size_t)r * self->slot;
      char *to = (char *)recv + (uint64_t)r * bytes + at;
      if (r != self->rank || to != (const char *)send + at) memcpy(to, from, part);
    }
  }
  return pfc_mpi_end_(self, code);
}

// Integers wrap: their sums are those of the unsigned types.
#define PFC_MPI_COMBINE_(type, better)                                       \
  do {                                                                       \
    type *to = (type *)sum;                                                  \
    const type *from = (const type *)part;                                   \
    for (i = 0; i < count; i++) to[i] = (better) ? to[i] : from[i];          \
  } while (0)
#define PFC_MPI_SUM_(type)                                                   \
  do {                                                                       \
    type *to = (type *)sum;                                                  \
    const type *from = (const type *)part;                                   \
    for (i = 0; i < count; i++) to[i] = (type)(to[i] + from[i]);             \
  } while (0)

// Combines a part into a sum; the caller takes the ranks in their order.
static inline void pfc_mpi_combine_(void *sum, const void *part, size_t count, int32_t dtype,
                                    int32_t op) {
  size_t i;
  if (op == PFC_SUM) {
    switch (dtype) {
      case PFC_F32: PFC_MPI_SUM_(float); break;
      case PFC_F64: PFC_MPI_SUM_(double); break;
      case PFC_I32: PFC_MPI_SUM_(uint32_t); break;
      default: PFC_MPI_SUM_(uint64_t); break;
    }
  } else {
    switch (dtype) {  // A NaN wins.
      case PFC_F32: PFC_MPI_COMBINE_(float, to[i] > from[i] || to[i] != to[i]); break;
      case PFC_F64: PFC_MPI_COMBINE_(double, to[i] > from[i] || to[i] != to[i]); break;
      case PFC_I32: PFC_MPI_COMBINE_(int32_t, to[i] > from[i]); break;
      default: PFC_MPI_COMBINE_(int64_t, to[i] > from[i]); break;
    }
  }
}
#undef PFC_MPI_COMBINE_
#undef PFC_MPI_SUM_

// Combines the elements of all ranks, and this rank's own count elements, into `to`, which may be
// `own`.
static inline void pfc_mpi_combine_all_(struct pfc_mpi_ *self, void *to, const void *own,
                                        size_t count, int32_t dtype, int32_t op) {
  const size_t bytes = count * (dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4);
  // The sum is built in the staging memory, because `own` is still needed when its turn comes.
  unsigned char *sum = self->in + (size_t)self->size * self->slot;
  int r;
  for (r = 0; r < self->size; r++) {
    const void *part = r == self->rank ? own : self->in + (size_t)r * self->slot;
    if (r == 0) pfc_mpi_copy_(sum, part, bytes);
    else pfc_mpi_combine_(sum, part, count, dtype, op);
  }
  pfc_mpi_copy_(to, sum, bytes);
}

static inline int32_t pfc_mpi_reduce_scatter_(void *ctx, const void *send, void *recv,
                                              uint64_t count, int32_t dtype, int32_t op,
                                              void *stream) {
  struct pfc_mpi_ *self = (struct pfc_mpi_ *)ctx;
  const size_t size = dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4;
  const uint64_t bytes = count * size;
  uint64_t at = 0;
  int32_t code = pfc_mpi_begin_(self, PFC_MPI_REDUCE_SCATTER_);
  int r;
  (void)stream;
  for (; code == 0 && at < bytes; at += self->message_bytes) {
    const size_t part = pfc_mpi_least_(bytes - at, self->message_bytes);
    for (r = 0; r < self->size; r++) {
      self->sent[r] = self->received[r] = (int)part;
      if (r == self->rank) continue;
      memcpy(self->out + (size_t)r * self->slot, (const char *)send + (uint64_t)r * bytes + at,
             part);
    }
    if ((code = pfc_mpi_exchange_(self, 0)) != 0) break;
    pfc_mpi_combine_all_(self, (char *)recv + at,
                         (const char *)send + (uint64_t)self->rank * bytes + at, part / size, dtype,
                         op);
  }
  return pfc_mpi_end_(self, code);
}

// Each rank combines a share of the elements and sends it to all. For small messages, whose number
// matters more than their size, every rank combines everything: the same sums in one exchange.
static inline int32_t pfc_mpi_all_reduce_(void *ctx, const void *send, void *recv, uint64_t count,
                                          int32_t dtype, int32_t op, void *stream) {
  struct pfc_mpi_ *self = (struct pfc_mpi_ *)ctx;
  const size_t size = dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4;
  const uint64_t bytes = count * size;
  const size_t few = self->message_bytes < 16384 ? self->message_bytes : 16384;
  uint64_t at = 0;
  int32_t code = pfc_mpi_begin_(self, PFC_MPI_ALL_REDUCE_);
  int r;
  (void)stream;
  if (code == 0 && bytes > 0 && bytes <= few) {
    for (r = 0; r < self->size; r++) self->sent[r] = self->received[r] = (int)bytes;
    memcpy(self->out, send, (size_t)bytes);
    if ((code = pfc_mpi_exchange_(self, 1)) == 0) {
      pfc_mpi_combine_all_(self, recv, self->out, (size_t)count, dtype, op);
    }
    return pfc_mpi_end_(self, code);
  }
  while (code == 0 && at < bytes) {
    const size_t whole = pfc_mpi_least_(bytes - at, self->message_bytes * (size_t)self->size);
    const size_t elements = whole / size;
    const size_t share = (elements + (size_t)self->size - 1) / (size_t)self->size;
    const size_t own = pfc_mpi_least_((uint64_t)self->rank * share, elements);
    const size_t mine = pfc_mpi_least_(elements - own, share);
    for (r = 0; r < self->size; r++) {
      const size_t first = pfc_mpi_least_((uint64_t)r * share, elements);
      const size_t part = size * pfc_mpi_least_(elements - first, share);
      self->sent[r] = (int)part;
      self->received[r] = (int)(mine * size);
      if (r == self->rank) continue;
      pfc_mpi_copy_(self->out + (size_t)r * self->slot, (const char *)send + at + first * size,
                    part);
    }
    if ((code = pfc_mpi_exchange_(self, 0)) != 0) break;
    pfc_mpi_combine_all_(self, self->out, (const char *)send + at + own * size, mine, dtype, op);
    for (r = 0; r < self->size; r++) {
      self->received[r] = self->sent[r];
      self->sent[r] = (int)(mine * size);
    }
    if ((code = pfc_mpi_exchange_(self, 1)) != 0) break;
    for (r = 0; r < self->size; r++) {
      const unsigned char *from = r == self->rank ? self->out : self->in + (size_t)r * self->slot;
      const size_t first = pfc_mpi_least_((uint64_t)r * share, elements);
      pfc_mpi_copy_((char *)recv + at + first * size, from,
                    size * pfc_mpi_least_(elements - first, share));
    }
    at += whole;
  }
  return pfc_mpi_end_(self, code);
}

static inline int32_t pfc_mpi_broadcast_(void *ctx, void *buffer, uint64_t bytes, uint32_t root,
                                         void *stream) {
  struct pfc_mpi_ *self = (struct pfc_mpi_ *)ctx;
  const int is_root = (int)root == self->rank;
  uint64_t at = 0;
  int32_t code = pfc_mpi_begin_(self, PFC_MPI_BROADCAST_);
  int r;
  (void)stream;
  for (; code == 0 && at < bytes; at += self->message_bytes) {
    const size_t part = pfc_mpi_least_(bytes - at, self->message_bytes);
    for (r = 0; r < self->size; r++) {
      self->sent[r] = is_root ? (int)part : -1;
      self->received[r] = r == (int)root ? (int)part : -1;
    }
    if (is_root) memcpy(self->out, (const char *)buffer + at, part);
    if ((code = pfc_mpi_exchange_(self, 1)) != 0) break;
    if (!is_root) memcpy((char *)buffer + at, self->in + (size_t)root * self->slot, part);
  }
  return pfc_mpi_end_(self, code);
}

static inline int32_t pfc_mpi_barrier_(void *ctx) {
  struct pfc_mpi_ *self = (struct pfc_mpi_ *)ctx;
  int32_t code = pfc_mpi_begin_(self, PFC_MPI_BARRIER_);
  if (code == 0) code = pfc_mpi_exchange_(self, 1);  // Empty messages.
  return pfc_mpi_end_(self, code);
}

static inline void pfc_mpi_abort_(void *ctx) {
  struct pfc_mpi_ *self = (struct pfc_mpi_ *)ctx;
  __atomic_store_n(&self->ended, 1, __ATOMIC_SEQ_CST);
  // A running operation notices and tells the other ranks itself, with the ranks it waited for.
  if (!__atomic_load_n(&self->running, __ATOMIC_SEQ_CST)) pfc_mpi_tell_(self, 0);
}

static inline void pfc_mpi_error_string_(void *ctx, int32_t code, char *buffer, uint64_t size) {
  (void)code;
  snprintf(buffer, (size_t)size, "%s", ((struct pfc_mpi_ *)ctx)->text);
}

static inline void pfc_mpi_free_(void *ctx) {
  struct pfc_mpi_ *self = (struct pfc_mpi_ *)ctx;
  const int ended = __atomic_load_n(&self->ended, __ATOMIC_SEQ_CST);
  int i, finalized = 1, under_way = 0;
  if (MPI_Finalized(&finalized) != MPI_SUCCESS) finalized = 1;
  if (ended && !finalized) pfc_mpi_tell_(self, 1);
  for (i = 0; i < 3 * self->size && self->requests != NULL; i++) {
    int done = 0;
    if (self->requests[i] == MPI_REQUEST_NULL) continue;
    if (!finalized) (void)MPI_Test(&self->requests[i], &done, MPI_STATUS_IGNORE);
    under_way |= !done;
  }
  if (!ended && !finalized) (void)MPI_Comm_free(&self->comm);
  if (under_way) return;  // MPI may yet touch the memory: it is the process's for good.
  free(self->out);
  free(self->in);
  free(self->sent);
  free(self->received);
  free(self->requests);
  free(self->statuses);
  free(self->indices);
  free(self);
}

// Allocates the memory of a communicator; 0 if there is not enough.
static inline int pfc_mpi_allocate_(struct pfc_mpi_ *self) {
  const size_t n = (size_t)self->size;
  size_t slot = PFC_MPI_STAGE / n / 64 * 64, i;
  if (slot < 1024) slot = 1024;
  if (slot > 1u << 20) slot = 1u << 20;
  self->message_bytes = self->slot = slot;
  self->out = (unsigned char *)malloc(n * self->slot);
  self->in = (unsigned char *)malloc((n + 1) * self->slot);  // One more for sums.
  self->sent = (int *)calloc(n, sizeof *self->sent);
  self->received = (int *)calloc(n, sizeof *self->received);
  self->requests = (MPI_Request *)malloc(3 * n * sizeof *self->requests);
  self->statuses = (MPI_Status *)calloc(2 * n, sizeof *self->statuses);
  self->indices = (int *)calloc(2 * n, sizeof *self->indices);
  for (i = 0; i < 3 * n && self->requests != NULL; i++) self->requests[i] = MPI_REQUEST_NULL;
  return self->out != NULL && self->in != NULL && self->sent != NULL && self->received != NULL &&
         self->requests != NULL && self->statuses != NULL && self->indices != NULL;
}

// Whether this thread may make and use a communicator.
static inline pfc_status pfc_mpi_ready_(MPI_Comm comm, int *level) {
  char *text = pfc_mpi_text_();
  int flag = 0;
  text[0] = 0;
  if (MPI_Initialized(&flag) != MPI_SUCCESS || !flag) {
    snprintf(text, PFC_MPI_TEXT_, "MPI must be initialized: call MPI_Init_thread first");
    return PFC_ERROR_INVALID_ARGUMENT;
  }
  if (MPI_Finalized(&flag) != MPI_SUCCESS || flag) {
    snprintf(text, PFC_MPI_TEXT_, "MPI must not be finalized");
    return PFC_ERROR_INVALID_ARGUMENT;
  }
  if (comm == MPI_COMM_NULL) {
    snprintf(text, PFC_MPI_TEXT_, "comm must not be MPI_COMM_NULL");
    return PFC_ERROR_INVALID_ARGUMENT;
  }
  if (MPI_Query_thread(level) != MPI_SUCCESS) *level = MPI_THREAD_SINGLE;
  if (*level == MPI_THREAD_SINGLE || *level == MPI_THREAD_FUNNELED) {
    if (MPI_Is_thread_main(&flag) == MPI_SUCCESS && !flag) {
      snprintf(text, PFC_MPI_TEXT_,
               "this must be MPI's main thread, since MPI was initialized for that one alone "
               "(MPI_THREAD_SINGLE or MPI_THREAD_FUNNELED)");
      return PFC_ERROR_INVALID_ARGUMENT;
    }
  }
  if (MPI_Comm_test_inter(comm, &flag) != MPI_SUCCESS || flag) {
    snprintf(text, PFC_MPI_TEXT_, "comm must not be an intercommunicator");
    return PFC_ERROR_INVALID_ARGUMENT;
  }
  return PFC_OK;
}

// What the ranks tell each other before there is a communicator. The minimum of a number and of its
// negative show whether it is the same on all ranks.
enum { PFC_MPI_READY_ = 0, PFC_MPI_STAGES_ = 1, PFC_MPI_VERSIONS_ = 3, PFC_MPI_TOLD_ = 5 };

// Whether a number of this header's differs between the ranks.
static inline int pfc_mpi_differs_(const long long *all, int at, const char *name, long long mine) {
  if (all[at] == -all[at + 1]) return 0;
  snprintf(pfc_mpi_text_(), PFC_MPI_TEXT_,
           "%s must be the same on all ranks, got %lld on some, %lld on others, and %lld here",
           name, all[at], -all[at + 1], mine);
  return 1;
}

static inline pfc_status pfc_mpi_ops(MPI_Comm comm, pfc_comm_ops *ops) {
  struct pfc_mpi_ *self;
  char *text = pfc_mpi_text_();
  const long long stage = PFC_MPI_STAGE, version = PFC_MPI_MESSAGES_;
  long long mine[PFC_MPI_TOLD_], all[PFC_MPI_TOLD_];
  int level = 0, code, ready;
  pfc_status status = pfc_mpi_ready_(comm, &level);
  MPI_Comm duplicate;
  if (status != PFC_OK) return status;
  code = MPI_Comm_dup(comm, &duplicate);
  if (code != MPI_SUCCESS) {
    (void)pfc_mpi_explain_(text, PFC_MPI_TEXT_, "MPI_Comm_dup", code);
    return PFC_ERROR_COMM;
  }
  (void)MPI_Comm_set_errhandler(duplicate, MPI_ERRORS_RETURN);
  self = (struct pfc_mpi_ *)calloc(1, sizeof *self);
  ready = self != NULL;
  if (self != NULL) {
    self->comm = duplicate;
    self->level = level;
    ready = ops != NULL && MPI_Comm_rank(duplicate, &self->rank) == MPI_SUCCESS &&
            MPI_Comm_size(duplicate, &self->size) == MPI_SUCCESS && pfc_mpi_allocate_(self);
  }
  mine[PFC_MPI_READY_] = ready;
  mine[PFC_MPI_STAGES_] = stage;
  mine[PFC_MPI_STAGES_ + 1] = -stage;
  mine[PFC_MPI_VERSIONS_] = version;
  mine[PFC_MPI_VERSIONS_ + 1] = -version;
  // All ranks get a communicator or none does, so that nobody waits for a missing rank.
  code = MPI_Allreduce(mine, all, PFC_MPI_TOLD_, MPI_LONG_LONG, MPI_MIN, duplicate);
  if (code != MPI_SUCCESS) {
    (void)pfc_mpi_explain_(text, PFC_MPI_TEXT_, "MPI_Allreduce", code);
    status = PFC_ERROR_COMM;
  } else if (pfc_mpi_differs_(all, PFC_MPI_STAGES_, "PFC_MPI_STAGE", stage) ||
             pfc_mpi_differs_(all, PFC_MPI_VERSIONS_, "the version of partialfc_mpi.h", version)) {
    status = PFC_ERROR_MISMATCH;
  } else if (all[PFC_MPI_READY_]) {
    status = pfc_comm_ops_init(ops);
  } else if (ready) {
    snprintf(text, PFC_MPI_TEXT_, "another rank could not make its communicator");
    status = PFC_ERROR_REMOTE;
  } else if (ops == NULL) {
    snprintf(text, PFC_MPI_TEXT_, "ops must not be NULL");
    status = PFC_ERROR_INVALID_ARGUMENT;
  } else {
    snprintf(text, PFC_MPI_TEXT_, "cannot allocate %u bytes each way for messages",
             (unsigned)PFC_MPI_STAGE);
    status = PFC_ERROR_OUT_OF_MEMORY;
  }
  if (status != PFC_OK) {
    if (self != NULL) pfc_mpi_free_(self);
    else (void)MPI_Comm_free(&duplicate);
    return status;
  }
  ops->ctx = self;
  ops->rank = (uint32_t)self->rank;
  ops->size = (uint32_t)self->size;
  ops->flags = PFC_COMM_HOST_MEMORY;
  ops->all_gather = pfc_mpi_all_gather_;
  ops->all_reduce = pfc_mpi_all_reduce_;
  ops->reduce_scatter = pfc_mpi_reduce_scatter_;
  ops->broadcast = pfc_mpi_broadcast_;
  ops->barrier = pfc_mpi_barrier_;
  ops->abort = pfc_mpi_abort_;
  ops->error_string = pfc_mpi_error_string_;
  ops->free = pfc_mpi_free_;
  return PFC_OK;
}

static inline pfc_status pfc_comm_mpi(MPI_Comm comm, pfc_comm **out) {
  pfc_comm_ops ops;
  pfc_status status = pfc_mpi_ops(comm, &ops);
  if (status == PFC_OK && (status = pfc_comm_custom(&ops, out)) != PFC_OK) ops.free(ops.ctx);
  return status;
}

static inline pfc_status pfc_mpi_share_nccl_id(MPI_Comm comm, pfc_status made, uint8_t id[128]) {
  unsigned char message[132];
  char *text = pfc_mpi_text_();
  int level = 0, rank = 0, code;
  int32_t told = made;
  pfc_status status = pfc_mpi_ready_(comm, &level);
  if (status != PFC_OK) return status;
  memset(message, 0, sizeof message);
  code = MPI_Comm_rank(comm, &rank);
  if (rank == 0 && made == PFC_OK && id == NULL) told = PFC_ERROR_INVALID_ARGUMENT;
  if (code == MPI_SUCCESS) {
    if (rank == 0) {
      memcpy(message, &told, 4);
      if (told == PFC_OK) memcpy(message + 4, id, 128);
    }
    code = MPI_Bcast(message, sizeof message, MPI_BYTE, 0, comm);
  }
  if (code == MPI_SUCCESS) code = MPI_Barrier(comm);
  if (code != MPI_SUCCESS) {
    (void)pfc_mpi_explain_(text, PFC_MPI_TEXT_, "the NCCL id could not be shared", code);
    return PFC_ERROR_COMM;
  }
  if (id == NULL && (rank != 0 || made == PFC_OK)) {
    snprintf(text, PFC_MPI_TEXT_, "id must not be NULL (rank %d)", rank);
    return PFC_ERROR_INVALID_ARGUMENT;
  }
  if (rank == 0) return made;
  memcpy(&told, message, 4);
  if (told != PFC_OK) {
    snprintf(text, PFC_MPI_TEXT_, "rank 0 could not make the NCCL id: %s", pfc_status_name(told));
    return PFC_ERROR_REMOTE;
  }
  memcpy(id, message + 4, 128);
  return PFC_OK;
}

#endif  // PARTIALFC_MPI_H
