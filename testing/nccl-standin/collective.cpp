// A collective, as work on the caller's stream, piece by piece: this rank's data go to its slot,
// its peers are told, theirs are waited for, a host function puts the result together, in the order
// of ranks, and it goes to the device. Then the peers are told that their slots were read; before
// the next piece each waits to hear that of its own.
#include <string.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "comm.h"
#include "driver.h"
#include "reduce.h"
#include "standin.h"

using namespace standin;

namespace standin {
namespace {

const char* const kNames[] = {"", "ncclAllGather", "ncclAllReduce", "ncclReduceScatter",
                              "ncclBroadcast"};

// What all ranks must agree on.
uint64_t sign(const Call& call) {
    const bool reduces = call.kind == Kind::kAllReduce || call.kind == Kind::kReduceScatter;
    return uint64_t(call.kind) << 60 | uint64_t(call.type) << 56
        | uint64_t(reduces ? call.reduction : 0) << 52
        | uint64_t(call.kind == Kind::kBroadcast ? call.root : 0) << 44
        | (uint64_t(call.count) & ((uint64_t(1) << 44) - 1));
}

std::string describe(uint64_t signature) {
    const int kind = int(signature >> 60);
    if (kind < 1 || kind > 4) return "nothing known";
    return format("%s of %llu elements of type %d, reduction %d, root %d", kNames[kind],
                  (unsigned long long)(signature & ((uint64_t(1) << 44) - 1)),
                  int(signature >> 56 & 15), int(signature >> 52 & 15),
                  int(signature >> 44 & 255));
}

// Whether this piece's peers are there and do the same.
bool agrees(const Piece& piece) {
    const Comm& comm = *piece.comm;
    const Header& header = comm.shared->header();
    for (int peer = 0; peer < comm.ranks; ++peer) {
        if (header.presence[peer] == Presence::kAborted) return false;
        const uint64_t theirs = __atomic_load_n(&header.signature[peer], __ATOMIC_ACQUIRE);
        if (theirs == piece.signature) continue;
        finding(format("rank %d's operation %d is %s; rank %d's is %s", comm.rank,
                       piece.call.number, describe(piece.signature).c_str(), peer,
                       describe(theirs).c_str()));
        return false;
    }
    return true;
}

void assemble(const Piece& piece) {
    const Comm& comm = *piece.comm;
    const size_t element = size_of(piece.call.type), bytes = piece.length * element;
    std::vector<const char*> sources;
    for (int peer = 0; peer < comm.ranks; ++peer) sources.push_back(comm.shared->slot(peer));
    switch (piece.call.kind) {
        case Kind::kAllGather:
            for (int peer = 0; peer < comm.ranks; ++peer)
                memcpy(comm.result() + size_t(peer) * bytes, sources[size_t(peer)], bytes);
            break;
        case Kind::kBroadcast:
            memcpy(comm.result(), sources[size_t(piece.call.root)], bytes);
            break;
        case Kind::kReduceScatter:
            for (const char*& source : sources) source += size_t(comm.rank) * bytes;
            [[fallthrough]];
        case Kind::kAllReduce:
            reduce(piece.call.type, piece.call.reduction, sources, comm.result(), piece.length);
    }
    if (piece.call.fault.kind != STANDIN_WRONG || !piece.first) return;
    const size_t which = std::min(size_t(piece.call.fault.value), piece.length - 1);
    for (size_t i = 0; i < element; ++i) comm.result()[which * element + i] ^= char(0xff);
}

// The host function between the peers' data and the result. It never waits: what is not to complete
// leaves the gate shut, which the stream waits for.
void run_piece(void* data) {
    const Piece& piece = *static_cast<const Piece*>(data);
    Comm& comm = *piece.comm;
    if (comm.aborted) return;
    const Fault& fault = piece.call.fault;
    if (fault.kind == STANDIN_HANG) return;
    if (fault.kind == STANDIN_ASYNC) {
        comm.error = fault.value;
        return;
    }
    if (piece.length > 0) {
        if (!agrees(piece)) return;
        assemble(piece);
    }
    if (fault.kind != STANDIN_DELAY || !piece.last) return comm.open_gate(piece.number);
    std::thread([comm = comm.shared_from_this(), number = piece.number, fault] {
        std::this_thread::sleep_for(std::chrono::milliseconds(fault.value));
        // Not while an abort gives the memory back.
        const std::lock_guard<std::mutex> guard(comm->mutex);
        if (comm->own) comm->open_gate(number);
    }).detach();
}

// The driver's calls one after another; the first that fails is what counts.
class Enqueuer {
public:
    explicit Enqueuer(CUstream stream) : cuda_(*driver()), stream_(stream) {}

    void wait(const uint64_t& word, uint64_t value) {
        keep(cuda_.cuStreamWaitValue64_v2(stream_, address(&word), value,
                                          CU_STREAM_WAIT_VALUE_GEQ));
    }
    void write(const uint64_t& word, uint64_t value) {
        keep(cuda_.cuStreamWriteValue64_v2(stream_, address(&word), value, 0));
    }
    void out(char* to, const void* from, size_t offset, size_t size) {
        if (size > 0)
            keep(cuda_.cuMemcpyDtoHAsync_v2(to, address(from) + offset, size, stream_));
    }
    // As far as `limit` of the destination.
    void in(void* to, size_t offset, const char* from, size_t size, size_t limit) {
        size = offset < limit ? std::min(size, limit - offset) : 0;
        if (size > 0) keep(cuda_.cuMemcpyHtoDAsync_v2(address(to) + offset, from, size, stream_));
    }
    void call(void (*function)(void*), void* data) {
        keep(cuda_.cuLaunchHostFunc(stream_, function, data));
    }
    void after(CUevent event) { keep(cuda_.cuStreamWaitEvent(stream_, event, 0)); }
    void record(CUevent event) { keep(cuda_.cuEventRecord(event, stream_)); }
    CUresult result() const { return result_; }

private:
    void keep(CUresult result) {
        if (result_ == CUDA_SUCCESS) result_ = result;
    }

    const Driver& cuda_;
    CUstream stream_;
    CUresult result_ = CUDA_SUCCESS;
};

void enqueue_piece(Comm& comm, Enqueuer& to, const Call& call, size_t from, size_t length,
                   size_t limit) {
    const size_t ranks = size_t(comm.ranks), rank = size_t(comm.rank);
    Header& header = comm.shared->header();
    const size_t element = size_of(call.type), bytes = length * element, at = from * element;
    const uint64_t number = comm.enqueued++;
    const bool last = from + length >= call.count;
    comm.pieces.emplace_back(
        new Piece{&comm, call, number, sign(call), length, from == 0, last});
    auto for_peers = [&](auto f) {
        for (size_t peer = 0; peer < ranks; ++peer)
            if (peer != rank) f(peer);
    };

    for_peers([&](size_t peer) { to.wait(header.words[rank][peer], 2 * number); });
    char* slot = comm.shared->slot(comm.rank);
    if (call.kind == Kind::kReduceScatter)
        for (size_t part = 0; part < ranks; ++part)
            to.out(slot + part * bytes, call.send, part * call.count * element + at, bytes);
    else if (call.kind != Kind::kBroadcast || call.root == comm.rank)
        to.out(slot, call.send, at, bytes);
    to.write(header.signature[rank], sign(call));
    for_peers([&](size_t peer) { to.write(header.words[peer][rank], 2 * number + 1); });
    for_peers([&](size_t peer) { to.wait(header.words[rank][peer], 2 * number + 1); });
    to.call(&run_piece, comm.pieces.back().get());
    to.wait(comm.gate().open, number + 1);
    const size_t parts = call.kind == Kind::kAllGather ? ranks : 1;
    for (size_t part = 0; part < parts; ++part)
        to.in(call.receive, part * call.count * element + at, comm.result() + part * bytes, bytes,
              limit);
    for_peers([&](size_t peer) { to.write(header.words[peer][rank], 2 * number + 2); });
    to.write(comm.gate().done, number + 1);
}

// What a thread has begun since its outermost ncclGroupStart.
struct Group {
    int depth = 0;
    ncclResult_t first = ncclSuccess;
    std::vector<CommPointer> started;
    std::vector<std::pair<CommPointer, Call>> calls;
};
thread_local Group group;

void keep_first(ncclResult_t& first, ncclResult_t result) {
    if (first == ncclSuccess || (first == ncclInProgress && result != ncclSuccess)) first = result;
}

// What does not depend on the communicator's state.
ncclResult_t check(const Comm& comm, const Call& call) {
    const char* name = kNames[int(call.kind)];
    if (size_of(call.type) == 0 || call.reduction < ncclSum || call.reduction > ncclAvg)
        return fail(ncclInvalidArgument, format("%s: type %d, reduction %d", name, call.type,
                                                call.reduction));
    if (call.root < 0 || call.root >= comm.ranks)
        return fail(ncclInvalidArgument, format("%s: root %d of %d ranks", name, call.root,
                                                comm.ranks));
    const bool sends = call.kind != Kind::kBroadcast || call.root == comm.rank;
    if (call.count > 0 && (!call.receive || (sends && !call.send)))
        return fail(ncclInvalidArgument, format("%s: a null buffer", name));
    if ((call.kind == Kind::kAllReduce || call.kind == Kind::kReduceScatter)
        && !can_reduce(call.type))
        return fail(ncclInternalError, format("%s: the stand-in reduces no type %d", name,
                                              call.type));
    return ncclSuccess;
}

void check_device(const Comm& comm, const char* name) {
    CUdevice device = 0;
    if (driver()->cuCtxGetDevice(&device) != CUDA_SUCCESS)
        finding(format("%s on rank %d's communicator with no current context", name, comm.rank));
    else if (device != comm.device)
        finding(format("%s on rank %d's communicator of device %d with a context of device %d",
                       name, comm.rank, comm.device, device));
}

ncclResult_t collective(ncclComm_t handle, const Call& call) {
    const char* name = kNames[int(call.kind)];
    const CommPointer comm = find(handle, name);
    if (!comm) return ncclInvalidArgument;
    const Turn turn(*comm, name);
    check_device(*comm, name);
    ncclResult_t result = check(*comm, call);
    if (group.depth > 0) {
        if (result == ncclSuccess) group.calls.emplace_back(comm, call);
        keep_first(group.first, result);
        return result;
    }
    if (result != ncclSuccess) return result;
    const std::lock_guard<std::mutex> guard(comm->mutex);
    if (!comm->ready || !comm->pending.empty()) {
        finding(format("%s on rank %d's communicator while it is in progress", name, comm->rank));
        return fail(ncclInvalidArgument, "in progress");
    }
    return issue(*comm, call);
}

}  // namespace

bool in_group() { return group.depth > 0; }
void add_to_group(const CommPointer& comm) { group.started.push_back(comm); }

ncclResult_t issue(Comm& comm, const Call& asked) {
    if (comm.aborted) return fail(ncclInvalidUsage, "aborted");
    if (comm.error) return ncclResult_t(comm.error.load());
    if (comm.finalizing) {
        finding(format("%s on rank %d's communicator after ncclCommFinalize",
                       kNames[int(asked.kind)], comm.rank));
        return fail(ncclInvalidUsage, "finalized");
    }
    Call call = asked;
    call.number = comm.calls++;
    call.fault = take_fault(comm.rank, call.number);
    if (call.fault.kind == STANDIN_ENQUEUE) {
        if (!comm.blocks) comm.error = call.fault.value;
        return fail(ncclResult_t(call.fault.value), "as planned");
    }
    if (comm.blocks || polls_in_progress() == 0) return enqueue(comm, call);
    if (comm.pending.empty()) comm.polls = polls_in_progress();
    comm.pending.push_back(call);
    return ncclInProgress;
}

ncclResult_t enqueue(Comm& comm, const Call& call) {
    const Current current(comm.context);
    const uint64_t done = __atomic_load_n(&comm.gate().done, __ATOMIC_ACQUIRE);
    while (!comm.pieces.empty() && comm.pieces.front()->number < done) comm.pieces.pop_front();
    const size_t element = size_of(call.type), slot = comm.shared->header().slot;
    const size_t parts = call.kind == Kind::kReduceScatter ? size_t(comm.ranks) : 1;
    const size_t longest = std::max(size_t(1), slot / element / parts);
    const bool gathers = call.kind == Kind::kAllGather;
    const size_t all = call.count * element * (gathers ? size_t(comm.ranks) : 1);
    const size_t limit = call.fault.kind == STANDIN_SHORT ? all / 2 : all;
    Enqueuer to(call.stream);
    // In the order of calls, whatever the streams.
    if (comm.enqueued > 0 && comm.last_stream != call.stream) to.after(comm.last);
    if (call.count == 0) {
        // Nothing is to be done, but a fault waits all the same, for nobody.
        const int kind = call.fault.kind;
        if (kind == STANDIN_HANG || kind == STANDIN_ASYNC || kind == STANDIN_DELAY)
            enqueue_piece(comm, to, call, 0, 0, 0);
    }
    for (size_t from = 0; from < call.count; from += longest)
        enqueue_piece(comm, to, call, from, std::min(longest, call.count - from), limit);
    to.record(comm.last);
    comm.last_stream = call.stream;
    if (to.result() != CUDA_SUCCESS) {
        comm.error = ncclUnhandledCudaError;
        return fail(ncclUnhandledCudaError, format("%s: the driver's error %d",
                                                   kNames[int(call.kind)], to.result()));
    }
    note_operation(comm.rank);
    return ncclSuccess;
}

}  // namespace standin

extern "C" {

ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type,
                           ncclComm_t comm, CUstream stream) {
    return collective(comm, {Kind::kAllGather, send, receive, count, type, ncclSum, 0, stream});
}

ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type,
                           ncclRedOp_t reduction, ncclComm_t comm, CUstream stream) {
    return collective(comm, {Kind::kAllReduce, send, receive, count, type, reduction, 0, stream});
}

ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count,
                               ncclDataType_t type, ncclRedOp_t reduction, ncclComm_t comm,
                               CUstream stream) {
    return collective(comm,
                      {Kind::kReduceScatter, send, receive, count, type, reduction, 0, stream});
}

ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, CUstream stream) {
    return collective(comm, {Kind::kBroadcast, send, receive, count, type, ncclSum, root, stream});
}

ncclResult_t ncclGroupStart() {
    ++group.depth;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    if (group.depth == 0) {
        finding("ncclGroupEnd without ncclGroupStart");
        return fail(ncclInvalidUsage, "no group");
    }
    if (--group.depth > 0) return ncclSuccess;
    const Group ended = std::exchange(group, Group());
    ncclResult_t first = ended.first;
    if (first != ncclSuccess) return first;
    for (const CommPointer& comm : ended.started)
        keep_first(first, comm->blocks ? wait_until_ready(comm) : ncclInProgress);
    // What was in progress before this group began must not be.
    std::vector<Comm*> found;
    for (const auto& [comm, call] : ended.calls) {
        const std::lock_guard<std::mutex> guard(comm->mutex);
        const bool known = std::find(found.begin(), found.end(), comm.get()) != found.end();
        if (!known && (!comm->ready || !comm->pending.empty())) {
            finding(format("%s on rank %d's communicator while it is in progress",
                           kNames[int(call.kind)], comm->rank));
            return fail(ncclInvalidArgument, "in progress");
        }
        if (!known) found.push_back(comm.get());
        keep_first(first, issue(*comm, call));
    }
    return first;
}

}  // extern "C"
