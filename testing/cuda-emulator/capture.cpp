// The state of captures is each stream's; the mode is each thread's.
#include "capture.h"

#include "driver.h"

namespace simt {

struct Graph {};

namespace {

thread_local int mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

// Threads by an address of their own.
const void* this_thread() { return &mode; }

}  // namespace

bool is_captured(const Stream* stream) { return stream->capture != CU_STREAM_CAPTURE_STATUS_NONE; }

CUresult refuse_unsafe() {
    if (mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
    bool refused = false;
    for_each_stream([&](Stream* stream) {
        if (stream->capture != CU_STREAM_CAPTURE_STATUS_ACTIVE) return;
        const bool mine = stream->capturing_thread == this_thread();
        const bool forbids = mine ? stream->capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED
            : mode == CU_STREAM_CAPTURE_MODE_GLOBAL
                && stream->capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (!forbids) return;
        stream->capture = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
        refused = true;
    });
    return refused ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult refuse_wait(const Stream* stream) {
    bool refused = false;
    for_each_stream([&](Stream* other) {
        if ((stream && other != stream) || !is_captured(other)) return;
        other->capture = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
        refused = true;
    });
    return refused ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult refuse_captured(const Event* event) {
    return event->captured ? CUDA_ERROR_CAPTURED_EVENT : CUDA_SUCCESS;
}

CUresult capture_wait(Stream* stream, const Event* event) {
    if (is_captured(stream) && event->recorded && !event->captured) {
        stream->capture = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (!is_captured(stream) && event->captured) {
        // It joins the capture.
        stream->capture = CU_STREAM_CAPTURE_STATUS_ACTIVE;
        stream->capture_mode = mode;
        stream->capturing_thread = this_thread();
    }
    return CUDA_SUCCESS;
}

}  // namespace simt

using namespace simt;

extern "C" {

CUresult cuThreadExchangeStreamCaptureMode(int* wanted) {
    PFC_ENTRY;
    if (!wanted || *wanted < 0 || *wanted > CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_ERROR_INVALID_VALUE;
    const int before = mode;
    mode = *wanted;
    *wanted = before;
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture_v2(CUstream handle, int wanted) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    // A default stream cannot be captured.
    if (reinterpret_cast<uintptr_t>(handle) <= 1) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (is_captured(stream)) return CUDA_ERROR_INVALID_VALUE;
    stream->capture = CU_STREAM_CAPTURE_STATUS_ACTIVE;
    stream->capture_mode = wanted;
    stream->capturing_thread = this_thread();
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream || !graph || !is_captured(stream)) return CUDA_ERROR_INVALID_VALUE;
    const bool valid = stream->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE;
    stream->capture = CU_STREAM_CAPTURE_STATUS_NONE;
    *graph = valid ? new Graph : nullptr;
    return valid ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
}

CUresult cuStreamIsCapturing(CUstream handle, int* status) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    bool implicit = false;
    if (reinterpret_cast<uintptr_t>(handle) <= 1)
        for_each_stream([&](Stream* other) {
            implicit = implicit || (is_captured(other) && !(other->flags & CU_STREAM_NON_BLOCKING));
        });
    if (implicit) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    *status = stream->capture;
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
    PFC_CONTEXT_ENTRY;
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    delete graph;
    return CUDA_SUCCESS;
}

}  // extern "C"
