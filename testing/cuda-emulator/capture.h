// Stream capture: the rules that a capture lays on the streams and the threads of a process. The
// graphs themselves are not kept: what is enqueued on a captured stream never runs.
#pragma once

#include "stream.h"

namespace simt {

bool is_captured(const Stream* stream);
// What a call gives that a capture forbids to this thread, and then the capture is invalid; 0: go on.
CUresult refuse_unsafe();
// The same for a wait or a question about a stream, an event or (null) everything.
CUresult refuse_wait(const Stream* stream);
CUresult refuse_captured(const Event* event);
// Lets `stream` wait for `event` as far as captures are concerned.
CUresult capture_wait(Stream* stream, const Event* event);

}  // namespace simt

// After an entry's first line, for what the API calls potentially unsafe while streams are captured.
#define PFC_UNSAFE \
    if (const CUresult refused = simt::refuse_unsafe()) return refused
