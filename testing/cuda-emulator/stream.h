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

// What an operation has to do with a word in memory; see values.cpp.
enum class Word { kNone, kWait, kWrite };

struct Operation {
    uint32_t id = 0;
    Stream* stream = nullptr;
    std::function<void()> run;
    std::vector<std::shared_ptr<Operation>> after;  // of other streams
    // What it comes after: a count for each stream. Complete when it runs: a wait for a word comes
    // after whoever wrote it.
    std::vector<uint32_t> clock;
    std::vector<uint64_t> mentions;                 // words that may be device addresses
    std::vector<Range> ranges;                      // device memory that it copies or fills
    bool host_function = false;                     // runs without the lock
    bool frees = false;                             // is done although the context is broken
    bool started = false, done = false;
    Word word = Word::kNone;
    uintptr_t word_at = 0;
    uint64_t word_value = 0, word_before = 0;
    unsigned word_flags = 0, word_bytes = 8;
    // What it comes after is not all known before the waits in front of it are over.
    bool uncertain = false;
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
    // The last that ran.
    OperationPointer ran;
    // When the last that ran ended.
    uint64_t end = 0;
    // See capture.h.
    int capture = CU_STREAM_CAPTURE_STATUS_NONE;
    int capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    const void* capturing_thread = nullptr;
};

struct Event {
    OperationPointer recorded;
    unsigned flags = 0;
    bool captured = false;  // recorded on a captured stream
};

// The stream that a handle names (0 and 1: the legacy stream, 2: the thread's own), or null.
Stream* find_stream(CUstream handle);
void for_each_stream(const std::function<void(Stream*)>& body);

OperationPointer enqueue(Stream* stream, OperationPointer operation);
// Runs what `operation` needs (and, by the seed, more) and it; the host then comes after it.
void complete(const OperationPointer& operation);
void complete_all();
// Runs one operation that can run: `operation`'s turn comes if this is called again and again.
void progress(const OperationPointer& operation);
// The same for several; false where none of what they need can run.
bool progress_all(const std::vector<OperationPointer>& operations);

// Whether some operation that has not run mentions memory in [begin, end), other than those before
// which `freeing` comes (null: the host frees).
bool is_pending(uintptr_t begin, uintptr_t end, const Operation* freeing);

}  // namespace simt
