// The queues. An operation waits for its predecessor in the stream, for the events and for the
// words in memory that the stream was told to wait for, and for nothing else: which of several
// ready ones runs is the seed's choice.
//
// The host has a clock too: it comes after what it synchronized with, and whatever it enqueues
// comes after that. One clock for all host threads: how they order each other is not seen here.
//
// The time that events tell is that of a GPU with room for everything at once: an operation begins
// when what it waits for has ended, and takes a nanosecond for each access to memory it makes (for a
// copy: so many bytes). Two operations' times overlap where nothing orders them.
#include "stream.h"

#include <string.h>

#include <algorithm>

#include "access.h"
#include "capture.h"
#include "driver.h"
#include "findings.h"
#include "shadow.h"
#include "values.h"

namespace simt {
namespace {

std::vector<Stream*> streams;  // by slot; null: free
std::vector<uint32_t> counts;  // of a slot's operations, over all streams that had it
std::vector<uint32_t> host_clock;
thread_local uint64_t host_time;  // when what this thread last synchronized with had ended
uint32_t next_id = 1;
Stream* legacy;
thread_local Stream* own;

void join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) {
    if (clock.size() < other.size()) clock.resize(other.size());
    for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

// The host comes after an operation that is done.
void meet(const Operation& operation) {
    join(host_clock, operation.clock);
    host_time = std::max(host_time, operation.end);
}

Stream* new_stream(unsigned flags, int priority) {
    size_t slot = 0;
    while (slot < streams.size() && streams[slot]) ++slot;
    if (slot == streams.size()) {
        streams.push_back(nullptr);
        counts.push_back(0);
    }
    Stream* made = new Stream;
    made->slot = uint32_t(slot);
    made->flags = flags;
    made->priority = priority;
    streams[slot] = made;
    return made;
}

void retire(Stream* stream) {
    if (!stream->destroyed || !stream->queue.empty()) return;
    streams[stream->slot] = nullptr;
    delete stream;
}

// Of kernels and copies, before their accesses; other operations take no time.
constexpr uint64_t kLaunchTime = 1000;
constexpr uint64_t kCopied = 16;

bool is_ready(const Stream* stream) {
    if (!stream || stream->queue.empty() || stream->queue.front()->started) return false;
    const Operation& operation = *stream->queue.front();
    for (const auto& other : operation.after)
        if (!other->done) return false;
    // In a broken context nothing is written any more.
    return operation.word != Word::kWait || broken() || is_satisfied(operation);
}

// Sleeps until there may be something to run. What a stream waits for may be written by another
// process, or by the host, and nobody tells: so it is looked at again after a short while.
void rest(unsigned& turns) {
    bool polls = false;
    for (const Stream* stream : streams)
        polls = polls || (stream && !stream->queue.empty()
            && stream->queue.front()->word == Word::kWait);
    wait_for_others(polls ? std::min(1000u, 50u << std::min(turns++, 5u)) : 0);
}

void run_head(Stream* stream) {
    OperationPointer operation = stream->queue.front();
    operation->started = true;
    uint64_t begin = std::max(operation->begin, stream->end);
    if (stream->ran) join(operation->clock, stream->ran->clock);
    for (const auto& other : operation->after) {
        begin = std::max(begin, other->end);
        join(operation->clock, other->clock);
    }
    if (operation->word == Word::kWait)
        if (const Written* by = written_for(*operation)) {
            begin = std::max(begin, by->end);
            join(operation->clock, by->clock);
        }
    const uint64_t accesses = access_count;
    const bool works = bool(operation->run);
    accessor.operations = operation->clock.data();
    accessor.streams = operation->clock.size();
    accessor.clocks = nullptr;
    accessor.stamp = make_stamp(operation->id, 0, 0, 1);
    // After a finding nothing runs any more, as in a context with a sticky error.
    if (operation->run && (!broken() || operation->frees)) {
        if (operation->host_function) {
            const unsigned depth = unlock_all();
            operation->run();
            lock_again(depth);
        } else {
            operation->run();
        }
    }
    uint64_t time = works ? kLaunchTime + access_count - accesses : 0;
    for (const Range& r : operation->ranges) time += (r.end - r.begin) / kCopied;
    operation->end = begin + time;
    stream->end = operation->end;
    if (operation->word == Word::kWrite) note_written(operation);
    operation->done = true;
    stream->ran = operation;
    operation->run = nullptr;
    operation->after.clear();
    stream->queue.pop_front();
    retire(stream);
    wake_others();
}

// Marks the streams with something to run before `operation` is done.
void find_needed(std::vector<const Operation*> left, std::vector<char>& needed) {
    std::vector<size_t> seen(streams.size(), 0);  // how many of a stream's queue were looked at
    while (!left.empty()) {
        const Operation* o = left.back();
        left.pop_back();
        if (o->done) continue;
        const uint32_t slot = o->stream->slot;
        needed[slot] = 1;
        const auto& queue = o->stream->queue;
        while (seen[slot] < queue.size()) {
            const Operation* before = queue[seen[slot]].get();
            if (before->clock[slot] > o->clock[slot]) break;
            ++seen[slot];
            for (const auto& other : before->after)
                if (!other->done) left.push_back(other.get());
            if (before->word != Word::kWait || is_satisfied(*before)) continue;
            add_writers(*before, left);
            // What is behind it comes no nearer by anything else.
            seen[slot] = queue.size();
        }
    }
}

// Runs a ready head of the streams that are needed, or of any. A host function may wait for what
// its own host thread does next, so that a thread runs those alone that it needs.
bool run_one(const std::vector<char>& needed, bool any) {
    std::vector<Stream*> ready;
    for (Stream* stream : streams) {
        if (!is_ready(stream)) continue;
        if (needed[stream->slot] || (any && !stream->queue.front()->host_function))
            ready.push_back(stream);
    }
    if (ready.empty()) return false;
    run_head(ready[choose(uint32_t(ready.size()))]);
    return true;
}

}  // namespace

Stream* find_stream(CUstream handle) {
    const uintptr_t number = reinterpret_cast<uintptr_t>(handle);
    if (number <= 1) {
        if (!legacy) legacy = new_stream(0, 0);
        return legacy;
    }
    if (number == 2) {
        if (!own) own = new_stream(0, 0);
        return own;
    }
    for (Stream* stream : streams)
        if (stream == handle && !stream->destroyed) return stream;
    return nullptr;
}

void for_each_stream(const std::function<void(Stream*)>& body) {
    for (Stream* stream : streams)
        if (stream && !stream->destroyed) body(stream);
}

OperationPointer enqueue(Stream* stream, OperationPointer operation) {
    if (is_captured(stream)) {
        operation->clock = host_clock;
        operation->done = true;
        return operation;
    }
    operation->id = next_id++;
    operation->stream = stream;
    operation->clock = host_clock;
    operation->begin = host_time;
    if (stream->last) join(operation->clock, stream->last->clock);
    auto wait_for = [&](Stream* other) {
        if (other && other != stream && other->last) operation->after.push_back(other->last);
    };
    // The legacy stream and those that did not say otherwise wait for each other.
    if (stream == legacy) {
        for (Stream* other : streams)
            if (other && !(other->flags & CU_STREAM_NON_BLOCKING)) wait_for(other);
    } else if (!(stream->flags & CU_STREAM_NON_BLOCKING)) {
        wait_for(legacy);
    }
    operation->uncertain = operation->word == Word::kWait
        || (stream->last && !stream->last->done && stream->last->uncertain);
    for (const auto& other : operation->after) {
        join(operation->clock, other->clock);
        if (!other->done && other->uncertain) operation->uncertain = true;
    }
    if (operation->clock.size() < streams.size()) operation->clock.resize(streams.size());
    operation->clock[stream->slot] = ++counts[stream->slot];
    name_operation(operation->id, stream->slot, counts[stream->slot]);
    stream->queue.push_back(operation);
    stream->last = operation;
    // A thread that waits may need it.
    wake_others();
    return operation;
}

void complete(const OperationPointer& operation) {
    for (unsigned turns = 0; !operation->done;) {
        std::vector<char> needed(streams.size(), 0);
        find_needed({operation.get()}, needed);
        const bool more = choose(4) == 0;
        if (run_one(needed, more) || run_one(needed, true)) turns = 0;
        else rest(turns);
    }
    meet(*operation);
}

void complete_all() {
    for (unsigned turns = 0;;) {
        bool left = false;
        for (Stream* stream : streams) left = left || (stream && !stream->queue.empty());
        if (!left) break;
        if (run_one(std::vector<char>(streams.size(), 1), true)) turns = 0;
        else rest(turns);
    }
    join(host_clock, counts);
    for (const Stream* stream : streams)
        if (stream) host_time = std::max(host_time, stream->end);
}

void progress(const OperationPointer& operation) {
    std::vector<char> needed(streams.size(), 0);
    find_needed({operation.get()}, needed);
    run_one(needed, true);
}

bool progress_all(const std::vector<OperationPointer>& operations) {
    std::vector<char> needed(streams.size(), 0);
    std::vector<const Operation*> left;
    for (const auto& operation : operations) left.push_back(operation.get());
    find_needed(std::move(left), needed);
    return run_one(needed, false);
}

bool is_pending(uintptr_t begin, uintptr_t end, const Operation* freeing) {
    for (Stream* stream : streams) {
        if (!stream) continue;
        for (const auto& o : stream->queue) {
            if (o.get() == freeing) continue;
            if (freeing && o->clock[stream->slot] <= freeing->clock[stream->slot]) continue;
            for (uint64_t word : o->mentions)
                if (word - begin < end - begin) return true;
            for (const Range& r : o->ranges)
                if (r.begin < end && begin < r.end) return true;
        }
    }
    return false;
}

}  // namespace simt

using namespace simt;

namespace {

CUresult status() { return broken() ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS; }

}  // namespace

extern "C" {

CUresult cuCtxSynchronize() {
    PFC_CONTEXT_ENTRY;
    if (const CUresult refused = refuse_wait(nullptr)) return refused;
    PFC_UNSAFE;
    complete_all();
    return status();
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    PFC_CONTEXT_ENTRY;
    if (flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *stream = new_stream(flags, std::max(-5, std::min(0, priority)));
    (*stream)->context = current_context();
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    if (flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *stream = new_stream(flags, 0);
    (*stream)->context = current_context();
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream || reinterpret_cast<uintptr_t>(handle) <= 2) return CUDA_ERROR_INVALID_HANDLE;
    stream->destroyed = true;
    retire(stream);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult refused = refuse_wait(stream)) return refused;
    PFC_UNSAFE;
    const OperationPointer last = stream->last;
    if (last) complete(last);
    return status();
}

CUresult cuStreamQuery(CUstream handle) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult refused = refuse_wait(stream)) return refused;
    PFC_UNSAFE;
    if (!stream->queue.empty()) progress(stream->queue.back());
    if (!stream->queue.empty()) return CUDA_ERROR_NOT_READY;
    if (stream->last) meet(*stream->last);
    return status();
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult refused = capture_wait(stream, event)) return refused;
    if (!event->recorded) return CUDA_SUCCESS;
    auto operation = std::make_shared<Operation>();
    operation->after.push_back(event->recorded);
    enqueue(stream, operation);
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
    PFC_CONTEXT_ENTRY;
    const Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *context = stream->context ? stream->context : current_context();
    return CUDA_SUCCESS;
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *priority = stream->priority;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *flags = stream->flags;
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    *event = new Event;
    (*event)->flags = flags;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event) {
    PFC_CONTEXT_ENTRY;
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    delete event;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream handle) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
    event->captured = is_captured(stream);
    event->recorded = enqueue(stream, std::make_shared<Operation>());
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
    PFC_CONTEXT_ENTRY;
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult refused = refuse_captured(event)) return refused;
    PFC_UNSAFE;
    if (event->recorded && !event->recorded->done) progress(event->recorded);
    if (event->recorded && !event->recorded->done) return CUDA_ERROR_NOT_READY;
    if (event->recorded) meet(*event->recorded);
    return status();
}

CUresult cuEventSynchronize(CUevent event) {
    PFC_CONTEXT_ENTRY;
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (const CUresult refused = refuse_captured(event)) return refused;
    PFC_UNSAFE;
    const OperationPointer recorded = event->recorded;
    if (recorded) complete(recorded);
    return status();
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    PFC_CONTEXT_ENTRY;
    if (!start || !end || !start->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
    if (!start->recorded->done || !end->recorded->done) return CUDA_ERROR_NOT_READY;
    const double from = double(start->recorded->end), to = double(end->recorded->end);
    *milliseconds = float((to - from) * 1e-6);
    return status();
}

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime(milliseconds, start, end);
}

CUresult cuLaunchHostFunc(CUstream handle, void (*function)(void*), void* data) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    auto operation = std::make_shared<Operation>();
    operation->host_function = true;
    operation->run = [=] { function(data); };
    enqueue(stream, operation);
    return CUDA_SUCCESS;
}

}  // extern "C"
