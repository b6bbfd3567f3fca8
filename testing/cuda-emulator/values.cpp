// Waits for words and writes of words, as operations of streams.
//
// A wait is over when the word has the value, whoever wrote it: a stream of this process, its host,
// or another process that has the memory too. That the value never comes is no finding: a peer may
// take its time, and who gives up writes the word itself. What waits for a stream's write comes
// after what that stream did before, on the clocks and in time; of other writers neither is known.
//
// A GPU works while its host does something else, and a peer in another process cannot make it: so
// writes to registered memory that have waited for a while are run, with what they need, by a
// thread that is there from the first such write on.
#include "values.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "driver.h"
#include "findings.h"
#include "memory.h"

namespace simt {
namespace {

// Of each word so many writes are known. A wait for an older one takes the oldest that is.
constexpr size_t kKept = 64;
// Late, so that what does not wait for its results is found out, but not for ever.
constexpr int64_t kPatience = 3000000;

std::map<uintptr_t, std::deque<Written>> written;
std::multimap<uintptr_t, OperationPointer> enqueued;

struct Due {
    int64_t at;
    OperationPointer write;
};
std::deque<Due> due;  // to registered memory, oldest first
bool started, stopping, running;

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

bool satisfies(uint64_t value, const Operation& wait) {
    const uint64_t wanted = wait.word_value;
    switch (wait.word_flags) {
        case CU_STREAM_WAIT_VALUE_GEQ:
            return wait.word_bytes == 8 ? int64_t(value - wanted) >= 0
                : int32_t(uint32_t(value) - uint32_t(wanted)) >= 0;
        case CU_STREAM_WAIT_VALUE_EQ: return value == wanted;
        case CU_STREAM_WAIT_VALUE_AND: return (value & wanted) != 0;
        default:
            return wait.word_bytes == 8 ? ~(value | wanted) != 0
                : ~uint32_t(value | wanted) != 0;
    }
}

uint64_t load(uintptr_t at, unsigned bytes) {
    if (bytes == 8) return __atomic_load_n(reinterpret_cast<uint64_t*>(at), __ATOMIC_ACQUIRE);
    return __atomic_load_n(reinterpret_cast<uint32_t*>(at), __ATOMIC_ACQUIRE);
}

void store(uintptr_t at, uint64_t value, unsigned bytes) {
    if (is_device(at))
        for (uintptr_t word = at; word < at + bytes; word += 4) device_cell(word).written = 15;
    if (bytes == 8) __atomic_store_n(reinterpret_cast<uint64_t*>(at), value, __ATOMIC_RELEASE);
    else __atomic_store_n(reinterpret_cast<uint32_t*>(at), uint32_t(value), __ATOMIC_RELEASE);
}

// Runs one operation that an overdue write needs; false: none is ready.
bool run_overdue() {
    while (!due.empty() && due.front().write->done) due.pop_front();
    std::vector<OperationPointer> writes;
    const int64_t latest = now() - kPatience;
    for (const Due& d : due) {
        if (d.at > latest) break;
        if (!d.write->done) writes.push_back(d.write);
    }
    return !writes.empty() && progress_all(writes);
}

void* run_late_writes(void*) {
    for (;;) {
        bool more;
        {
            Lock lock;
            if (stopping) return nullptr;
            running = true;
            more = run_overdue();
            running = false;
        }
        // Others want the lock too.
        if (more) sched_yield();
        else usleep(1000);
    }
}

// The process ends: nothing may run while its variables are taken down.
void stop() {
    for (int turn = 0; turn < 1000; ++turn) {
        {
            Lock lock;
            stopping = true;
            if (!running) return;
        }
        usleep(1000);
    }
}

void start() {
    if (started) return;
    started = true;
    pthread_t thread;
    if (pthread_create(&thread, nullptr, &run_late_writes, nullptr) != 0) return;
    pthread_detach(thread);
    atexit(&stop);
}

CUresult enqueue_word(CUstream handle, Word kind, CUdeviceptr at, uint64_t value, unsigned flags,
                      unsigned bytes) {
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (at % bytes != 0 || flags > CU_STREAM_WAIT_VALUE_NOR) return CUDA_ERROR_INVALID_VALUE;
    if (!is_allocated(at, bytes) && !is_pinned(reinterpret_cast<void*>(at)))
        return CUDA_ERROR_INVALID_VALUE;
    auto operation = std::make_shared<Operation>();
    operation->word = kind;
    operation->word_at = at;
    operation->word_value = value;
    operation->word_flags = flags;
    operation->word_bytes = bytes;
    operation->ranges.push_back({at, at + bytes});
    if (kind == Word::kWrite) {
        Operation* self = operation.get();
        operation->run = [=] {
            self->word_before = load(at, bytes);
            store(at, value, bytes);
        };
        enqueued.insert({at, operation});
        if (is_registered(at)) {
            due.push_back({now(), operation});
            start();
        }
    }
    enqueue(stream, operation);
    return CUDA_SUCCESS;
}

}  // namespace

bool is_satisfied(const Operation& wait) {
    return satisfies(load(wait.word_at, wait.word_bytes), wait);
}

const Written* written_for(const Operation& wait) {
    const auto found = written.find(wait.word_at);
    if (found == written.end()) return nullptr;
    const Written* by = nullptr;
    for (const Written& w : found->second) {
        if (!satisfies(w.value, wait)) continue;
        by = &w;
        // A count stays satisfied; another value may have been there before.
        if (wait.word_flags == CU_STREAM_WAIT_VALUE_GEQ) break;
    }
    return by;
}

void add_writers(const Operation& wait, std::vector<const Operation*>& to) {
    const auto range = enqueued.equal_range(wait.word_at);
    for (auto i = range.first; i != range.second; ++i)
        if (satisfies(i->second->word_value, wait)) to.push_back(i->second.get());
}

void note_written(const OperationPointer& write) {
    const auto range = enqueued.equal_range(write->word_at);
    for (auto i = range.first; i != range.second; ++i)
        if (i->second == write) {
            enqueued.erase(i);
            break;
        }
    if (broken()) return;
    auto& writes = written[write->word_at];
    // Another wrote it meanwhile, or a count starts again: what was written before is history.
    if (!writes.empty() && (writes.back().value != write->word_before
        || int64_t(write->word_value - write->word_before) < 0)) writes.clear();
    writes.push_back({write->word_value, write->clock, write->end});
    if (writes.size() > kKept) writes.pop_front();
}

void forget_words(uintptr_t begin, uintptr_t end) {
    written.erase(written.lower_bound(begin), written.lower_bound(end));
}

}  // namespace simt

using namespace simt;

extern "C" {

CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr at, uint32_t value, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    return enqueue_word(stream, Word::kWait, at, value, flags, 4);
}

CUresult cuStreamWaitValue64_v2(CUstream stream, CUdeviceptr at, uint64_t value, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    return enqueue_word(stream, Word::kWait, at, value, flags, 8);
}

CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr at, uint32_t value, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    return enqueue_word(stream, Word::kWrite, at, value, flags, 4);
}

CUresult cuStreamWriteValue64_v2(CUstream stream, CUdeviceptr at, uint64_t value, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    return enqueue_word(stream, Word::kWrite, at, value, flags, 8);
}

}  // extern "C"
