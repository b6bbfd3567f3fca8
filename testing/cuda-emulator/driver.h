// What the files of the driver API share: the lock, the count of calls, the current context.
#pragma once

#include "cuda_api.h"

namespace simt {

// Held by every entry. Recursive, so that one entry may use another; a host function that a stream
// runs is called without it.
struct Lock {
    Lock();
    ~Lock();
    Lock(const Lock&) = delete;
};
// Gives the lock up around a host function, however deep it is held, and takes it again.
unsigned unlock_all();
void lock_again(unsigned depth);
// Sleeps until another thread has enqueued or run something, or for so many microseconds; 0: for as
// long as it takes.
void wait_for_others(unsigned microseconds);
void wake_others();

// Counts a call; false where the driver was not initialized.
bool count_call(const char* name);
// What a test has a call or a launch give instead of doing anything; 0: nothing.
CUresult planned_failure(const char* name);
bool has_context();
// The thread's, or null.
CUcontext current_context();
CUdevice device_of(CUcontext context);
// Frees the device memory that was allocated in a context.
void release_all_of(CUcontext context);

int shared_limit();
int multiprocessors();

const struct Kernel* find_kernel(const char* name);

}  // namespace simt

// An entry's first line; the second form is for entries that need a current context.
#define PFC_ENTRY                                                                  \
    simt::Lock lock;                                                               \
    if (const CUresult planned = simt::planned_failure(__func__)) return planned;  \
    if (!simt::count_call(__func__)) return CUDA_ERROR_NOT_INITIALIZED
#define PFC_CONTEXT_ENTRY                                                          \
    PFC_ENTRY;                                                                     \
    if (!simt::has_context()) return CUDA_ERROR_INVALID_CONTEXT
