// A communicator of one rank.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "nccl_api.h"
#include "plan.h"
#include "shared.h"

namespace standin {

enum class Kind { kAllGather = 1, kAllReduce, kReduceScatter, kBroadcast };

// A collective as the caller asked for it. `count` is that of the function's argument.
struct Call {
    Kind kind;
    const void* send;
    void* receive;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t reduction;
    int root;
    CUstream stream;
    // When it is issued.
    int number = 0;
    Fault fault = {};
};

// One piece of a collective, as its host function needs it.
struct Piece {
    struct Comm* comm;
    Call call;
    uint64_t number;
    uint64_t signature;
    size_t length;  // elements of one rank
    bool first, last;
};

// Words of a rank that only its own process has.
struct Gate {
    uint64_t open;  // the last piece that may complete, + 1: the host writes it
    uint64_t done;  // the last that is through, + 1: the stream does
};

// A value past all pieces.
constexpr uint64_t kReleased = uint64_t(1) << 62;

struct Comm : std::enable_shared_from_this<Comm> {
    int rank = 0, ranks = 0;
    bool blocks = true;
    CUdevice device = 0;
    CUcontext context = nullptr;

    // Kept as long as the device may have work of this rank.
    std::shared_ptr<Shared> shared;
    std::unique_ptr<Mapping> own;  // the gate, and a piece's result behind it
    std::deque<std::unique_ptr<Piece>> pieces;
    uint64_t enqueued = 0;         // pieces
    CUevent last = nullptr;        // behind the last collective, which was on last_stream
    CUstream last_stream = nullptr;

    // Of calls: at most one thread makes them, but for abort and the question for errors.
    std::atomic<bool> busy{false};
    std::mutex mutex;              // of what follows and of what is above
    int calls = 0;                 // collectives so far
    bool ready = false;            // all ranks are known to have come
    bool joined = false;
    Fault at_start;
    int64_t join_at = 0;           // milliseconds
    std::deque<Call> pending;      // to be enqueued when they were asked about often enough
    int polls = 0;
    bool finalizing = false;
    std::atomic<int> error{ncclSuccess};
    std::atomic<bool> aborted{false};

    Gate& gate() const { return *reinterpret_cast<Gate*>(own->data()); }
    char* result() const { return own->data() + 4096; }
    // Whether the device is through with what was enqueued, or will never come to it.
    bool drained() const;
    void open_gate(uint64_t piece);
};

using CommPointer = std::shared_ptr<Comm>;

int64_t now_ms();

// What ncclGetLastError tells.
ncclResult_t fail(ncclResult_t result, const std::string& text);

// The communicator behind a handle; null, and a finding, where it has been destroyed or aborted.
CommPointer find(ncclComm_t handle, const char* function);

// A call that must be the only one on its communicator.
class Turn {
public:
    Turn(Comm& comm, const char* function);
    ~Turn();
    Turn(const Turn&) = delete;

private:
    Comm& comm_;
    bool first_;
};

// The communicator's state as ncclCommGetAsyncError tells it; goes on with what is in progress.
ncclResult_t poll(Comm& comm);
// Waits for the initialization of one that blocks.
ncclResult_t wait_until_ready(const CommPointer& comm);
// With the communicator's lock: enqueues, or says what is in its way.
ncclResult_t issue(Comm& comm, const Call& call);
ncclResult_t enqueue(Comm& comm, const Call& call);

// What a thread's group has begun; nothing outside groups.
bool in_group();
void add_to_group(const CommPointer& comm);

}  // namespace standin
