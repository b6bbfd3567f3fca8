// What a test asks of the stand-in for NCCL itself, beside the NCCL functions that it exports. All
// of it is of this process; other processes are told by their environment:
//
//   PFC_STANDIN_PLAN=rank:operation:fault:value[,..]   as standin_plan, the fault by its name below
//                                                      in lower case, without STANDIN_
//   PFC_STANDIN_TELL=1   PFC_STANDIN_VERSION=23203   PFC_STANDIN_SLOT=4194304
//   PFC_STANDIN_PROGRESS=polls                         as standin_in_progress
//
// Findings are also written to stderr, so that those of a process that ends are seen.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef STANDIN_API
#define STANDIN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    // The call gives `value` (an ncclResult_t) and enqueues nothing. Where the communicator does
    // not block, ncclCommGetAsyncError gives it too.
    STANDIN_ENQUEUE = 1,
    // When the stream comes to the operation, ncclCommGetAsyncError gives `value` from then on, and
    // the operation never completes.
    STANDIN_ASYNC = 2,
    // The operation never completes until the communicator is aborted.
    STANDIN_HANG = 3,
    // The operation completes `value` milliseconds later.
    STANDIN_DELAY = 4,
    // All bits of what this rank receives as its element number `value` are inverted.
    STANDIN_WRONG = 5,
    // Only the first half of the bytes arrive at this rank, the rest of its memory stays.
    STANDIN_SHORT = 6,
};

// What ncclGetVersion tells; 23203 (2.32.3) unless told.
STANDIN_API void standin_version(int version);
// Forgets plans, findings and counts, and sets all the other knobs to what they are unless told,
// the environment included. Communicators stay.
STANDIN_API void standin_reset(void);
// Plans a fault for the collective number `operation` of a communicator's rank `rank`, counted from
// 0 over that communicator's life; -1: its initialization (enqueue, async, hang and delay; the rank
// that hangs or fails does not join, so that its peers' never completes either). It happens once,
// to the first communicator that comes to it. A rank below 0: to whichever rank does.
STANDIN_API void standin_plan(int rank, int operation, int fault, int value);
// Collectives of communicators that do not block return ncclInProgress, and ncclCommGetAsyncError
// gives it so many times; the call of ncclCommGetAsyncError after them enqueues the operation.
// 0 unless told: collectives are enqueued at the call.
STANDIN_API void standin_in_progress(int polls);
// Whether a rank that has aborted, or whose process has died, makes ncclCommGetAsyncError give
// ncclRemoteError to its peers. 0 unless told: they learn nothing, and what they wait for hangs.
STANDIN_API void standin_tell(int tell);
// Bytes of a rank's data that are under way at once; longer messages go in pieces. 4 MiB unless
// told. The first rank of a communicator decides.
STANDIN_API void standin_slot(uint64_t bytes);
// Whether findings are kept from stderr, for tests that provoke them.
STANDIN_API void standin_quiet(int quiet);
// Communicators that were made in this process and neither destroyed nor aborted.
STANDIN_API int standin_live(void);
// Collectives that were enqueued by a rank, over all communicators.
STANDIN_API uint64_t standin_operations(int rank);
// Writes the findings so far as text, a line for each, at most `size` bytes with the final 0, and
// returns their length without it: 0 where there are none.
STANDIN_API size_t standin_findings(char* buffer, size_t size);

#ifdef __cplusplus
}
#endif
