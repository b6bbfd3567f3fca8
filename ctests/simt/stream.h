// Streams as queues of operations that run as late as they may.
#pragma once

#include <stdint.h>

#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_api.h"

namespace simt {

struct Range {
    uintptr_t begin, end;
};

struct Operation {
    uint32_t id = 0;
    Stream* stream = nullptr;
    std::function<void()> run;
    std::vector<std::shared_ptr<Operation>> after;  // of other streams
    std::vector<uint32_t> clock;                    // what it comes after: a count for each stream
    std::vector<uint64_t> mentions;                 // words that may be device addresses
    std::vector<Range> ranges;                      // device memory that it copies or fills
    bool host_function = false;                     // runs without the lock
    bool frees = false;                             // is done although the context is broken
    bool started = false, done = false;
    uint64_t begin = 0;                             // no earlier than this, in nanoseconds
    uint64_t end = 0;                               // of the time that events tell
};
using OperationPointer = std::shared_ptr<Operation>;

struct Stream {
    uint32_t slot;
    int priority = 0;
    unsigned flags = 0;
    bool destroyed = false;
    CUcontext context = nullptr;  // null: a default stream, which every context has
    std::deque<OperationPointer> queue;
    // The last enqueued, done or not: the next one comes after what it came after.
    OperationPointer last;
    // When the last that ran ended.
    uint64_t end = 0;
};

struct Event {
    OperationPointer recorded;
    unsigned flags = 0;
};

// The stream that a handle names (0 and 1: the legacy stream, 2: the thread's own), or null.
Stream* find_stream(CUstream handle);

OperationPointer enqueue(Stream* stream, OperationPointer operation);
// Runs what `operation` needs (and, by the seed, more) and it; the host then comes after it.
void complete(const OperationPointer& operation);
void complete_all();
// Runs one operation that can run: `operation`'s turn comes if this is called again and again.
void progress(const OperationPointer& operation);

// Whether some operation that has not run mentions memory in [begin, end), other than those before
// which `freeing` comes (null: the host frees).
bool is_pending(uintptr_t begin, uintptr_t end, const Operation* freeing);

}  // namespace simt
