// A communicator's life: ranks come, go, or give up.
//
// Giving up releases what the rank's streams wait for, and what they then do is of no effect for
// others: a peer that finds the rank gone does not complete. The memory that those streams use is
// kept until they are through with it, by a thread where that takes long.
#include "comm.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

#include <set>
#include <thread>

#include "driver.h"
#include "standin.h"

using namespace standin;

// A handle is never freed, so that the use of one that is gone is found.
struct ncclComm {
    CommPointer comm;
    const char* gone = nullptr;  // the function that ended it
    int rank = 0;
};

namespace standin {
namespace {

constexpr int kShortly = 500, kPatience = 30000;  // milliseconds

struct Handles {
    std::mutex mutex;
    std::set<ncclComm_t> all;
    std::string last_error;
};

Handles& handles() {
    static Handles* const made = new Handles;
    return *made;
}

// With the lock: comes as soon as it may.
void join(Comm& comm) {
    if (comm.joined || comm.aborted || comm.error) return;
    switch (comm.at_start.kind) {
        case STANDIN_HANG: return;
        case STANDIN_ASYNC: comm.error = comm.at_start.value; return;
        case STANDIN_DELAY:
            if (now_ms() < comm.join_at) return;
    }
    comm.joined = true;
    if (comm.shared->attach(comm.rank)) return;
    finding(format("rank %d of %d: there is such a rank already", comm.rank, comm.ranks));
    comm.error = ncclInvalidUsage;
}

void release(Comm& comm) {
    const Current current(comm.context);
    if (comm.last) driver()->cuEventDestroy_v2(comm.last);
    comm.last = nullptr;
    comm.own.reset();
    comm.shared.reset();
}

// Again and again: a peer's stream may still write the same words.
bool release_waits(Comm& comm, int milliseconds) {
    Header& header = comm.shared->header();
    for (const int64_t until = now_ms() + milliseconds; !comm.drained();) {
        if (now_ms() > until) return false;
        for (int from = 0; from < comm.ranks; ++from)
            __atomic_store_n(&header.words[comm.rank][from], kReleased, __ATOMIC_RELEASE);
        __atomic_store_n(&comm.gate().open, kReleased, __ATOMIC_RELEASE);
        usleep(200);
    }
    return true;
}

void give_up(const CommPointer& comm) {
    comm->aborted = true;
    comm->shared->leave(comm->rank, Presence::kAborted);
    const std::lock_guard<std::mutex> guard(comm->mutex);
    comm->pending.clear();
    if (release_waits(*comm, kShortly)) return release(*comm);
    std::thread([comm] {
        const std::lock_guard<std::mutex> later(comm->mutex);
        if (release_waits(*comm, kPatience)) return release(*comm);
        // The streams still have it, and may come to it.
        new CommPointer(comm);
    }).detach();
}

// Takes the communicator off its handle; null: it is none, or gone.
CommPointer take(ncclComm_t handle, const char* function) {
    CommPointer comm = find(handle, function);
    if (!comm) return nullptr;
    const std::lock_guard<std::mutex> guard(handles().mutex);
    if (handle->gone) return nullptr;
    handle->gone = function;
    handle->comm.reset();
    note_live(-1);
    return comm;
}

// Of a configuration, what is of consequence here: whether calls block.
ncclResult_t read(const ncclConfig_t* config, bool& blocks) {
    if (!config) return ncclSuccess;
    if (config->size < offsetof(ncclConfig_t, blocking) || config->magic != NCCL_MAGIC)
        return fail(ncclInvalidArgument, format("a configuration of size %zu with magic 0x%x",
                                                config->size, config->magic));
    auto field = [&](size_t offset) {
        int value = NCCL_UNDEFINED;
        if (config->size >= offset + sizeof value)
            memcpy(&value, reinterpret_cast<const char*>(config) + offset, sizeof value);
        return value;
    };
    struct Limit {
        const char* name;
        size_t offset;
        int least, most;
    } const limits[] = {
        {"blocking", offsetof(ncclConfig_t, blocking), 0, 1},
        {"cgaClusterSize", offsetof(ncclConfig_t, cgaClusterSize), 0, 8},
        {"minCTAs", offsetof(ncclConfig_t, minCTAs), 1, INT_MAX},
        {"maxCTAs", offsetof(ncclConfig_t, maxCTAs), 1, INT_MAX},
    };
    for (const Limit& limit : limits) {
        const int value = field(limit.offset);
        if (value != NCCL_UNDEFINED && (value < limit.least || value > limit.most))
            return fail(ncclInvalidArgument, format("%s is %d", limit.name, value));
    }
    // 2.14 has the field.
    const int value = field(offsetof(ncclConfig_t, blocking));
    if (config->version >= 21400 && value != NCCL_UNDEFINED) blocks = value != 0;
    return ncclSuccess;
}

ncclResult_t start(const CommPointer& comm, const std::string& name) {
    const Driver* cuda = driver();
    if (!cuda) return fail(ncclUnhandledCudaError, "no CUDA driver");
    if (cuda->cuCtxGetCurrent(&comm->context) != CUDA_SUCCESS || !comm->context
        || cuda->cuCtxGetDevice(&comm->device) != CUDA_SUCCESS) {
        finding(format("rank %d of %d: initialized with no current context", comm->rank,
                       comm->ranks));
        return fail(ncclUnhandledCudaError, "no current context");
    }
    comm->at_start = take_fault(comm->rank, -1);
    if (comm->at_start.kind == STANDIN_ENQUEUE)
        return fail(ncclResult_t(comm->at_start.value), "as planned");
    comm->join_at = now_ms() + comm->at_start.value;
    std::string wrong;
    comm->shared = Shared::open(name, comm->ranks, wrong);
    if (!comm->shared) return fail(ncclSystemError, wrong);
    comm->own = std::make_unique<Mapping>();
    const size_t size = 4096 + size_t(comm->ranks) * comm->shared->header().slot;
    if (!comm->own->map(-1, size) || cuda->cuEventCreate(&comm->last, CU_EVENT_DISABLE_TIMING)) {
        release(*comm);
        return fail(ncclUnhandledCudaError, "no pinned memory");
    }
    const std::lock_guard<std::mutex> guard(comm->mutex);
    join(*comm);
    return ncclSuccess;
}

}  // namespace

bool Comm::drained() const {
    if (__atomic_load_n(&gate().done, __ATOMIC_ACQUIRE) >= enqueued) return true;
    // In a broken context nothing is written any more.
    const Current current(context);
    return driver()->cuEventQuery(last) != CUDA_ERROR_NOT_READY;
}

void Comm::open_gate(uint64_t piece) {
    if (!aborted) __atomic_store_n(&gate().open, piece + 1, __ATOMIC_RELEASE);
}

int64_t now_ms() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1000 + time.tv_nsec / 1000000;
}

ncclResult_t fail(ncclResult_t result, const std::string& text) {
    const std::lock_guard<std::mutex> guard(handles().mutex);
    handles().last_error = text;
    return result;
}

CommPointer find(ncclComm_t handle, const char* function) {
    std::string wrong;
    {
        const std::lock_guard<std::mutex> guard(handles().mutex);
        if (handles().all.count(handle) == 0)
            wrong = format("%s on what is no communicator", function);
        else if (handle->gone)
            wrong = format("%s on rank %d's communicator after %s", function, handle->rank,
                           handle->gone);
        else return handle->comm;
    }
    finding(wrong);
    fail(ncclInvalidArgument, wrong);
    return nullptr;
}

Turn::Turn(Comm& comm, const char* function) : comm_(comm), first_(!comm.busy.exchange(true)) {
    if (!first_)
        finding(format("%s on rank %d's communicator while another thread calls on it", function,
                       comm.rank));
}

Turn::~Turn() {
    if (first_) comm_.busy = false;
}

ncclResult_t poll(Comm& comm) {
    // An abort has the lock for as long as its release takes.
    if (comm.aborted) return ncclInvalidUsage;
    const std::lock_guard<std::mutex> guard(comm.mutex);
    if (comm.aborted) return ncclInvalidUsage;
    join(comm);
    if (comm.error) return ncclResult_t(comm.error.load());
    if (tells() && comm.shared->find_lost() >= 0) {
        comm.error = ncclRemoteError;
        return fail(ncclRemoteError, format("rank %d is lost", comm.shared->find_lost()));
    }
    if (!comm.ready) {
        comm.ready = comm.joined && comm.shared->all_attached();
        if (!comm.ready) return ncclInProgress;
    }
    if (!comm.pending.empty()) {
        if (comm.polls-- > 0) return ncclInProgress;
        while (!comm.pending.empty()) {
            const Call call = comm.pending.front();
            comm.pending.pop_front();
            const ncclResult_t result = enqueue(comm, call);
            if (result != ncclSuccess) return result;
        }
    }
    return comm.finalizing && !comm.drained() ? ncclInProgress : ncclSuccess;
}

ncclResult_t wait_until_ready(const CommPointer& comm) {
    for (;;) {
        const ncclResult_t result = poll(*comm);
        if (result != ncclInProgress) return result;
        usleep(200);
    }
}

}  // namespace standin

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
    if (!version) return fail(ncclInvalidArgument, "ncclGetVersion: null");
    *version = standin::version();
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    if (!id) return fail(ncclInvalidArgument, "ncclGetUniqueId: null");
    remove_stale();
    memset(id->internal, 0, sizeof id->internal);
    const std::string name = new_name();
    memcpy(id->internal, name.data(), name.size());
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* handle, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
    if (!handle) return fail(ncclInvalidArgument, "ncclCommInitRankConfig: null");
    *handle = nullptr;
    if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks)
        return fail(ncclInvalidArgument, format("rank %d of %d", rank, ranks));
    const std::string name(id.internal, strnlen(id.internal, sizeof id.internal));
    if (name.compare(0, 5, "/pfc-") != 0) return fail(ncclInvalidArgument, "not a unique id");
    auto comm = std::make_shared<Comm>();
    comm->rank = rank;
    comm->ranks = ranks;
    ncclResult_t result = read(config, comm->blocks);
    if (result != ncclSuccess) return result;
    result = start(comm, name);
    if (result != ncclSuccess) return result;
    const bool waits = comm->blocks && !in_group();
    if (waits) {
        result = wait_until_ready(comm);
        if (result != ncclSuccess) {
            give_up(comm);
            return result;
        }
    }
    auto* made = new ncclComm;
    made->comm = comm;
    made->rank = rank;
    {
        const std::lock_guard<std::mutex> guard(handles().mutex);
        handles().all.insert(made);
    }
    note_live(1);
    *handle = made;
    if (in_group()) add_to_group(comm);
    return waits || in_group() ? ncclSuccess : ncclInProgress;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, ranks, id, rank, nullptr);
}

ncclResult_t ncclCommFinalize(ncclComm_t handle) {
    const CommPointer comm = find(handle, __func__);
    if (!comm) return ncclInvalidArgument;
    const Turn turn(*comm, __func__);
    const ncclResult_t state = poll(*comm);
    if (state == ncclInProgress) {
        finding(format("ncclCommFinalize on rank %d's communicator while it is in progress",
                       comm->rank));
        return fail(ncclInvalidArgument, "in progress");
    }
    if (state != ncclSuccess) return state;
    {
        const std::lock_guard<std::mutex> guard(comm->mutex);
        if (comm->finalizing) return fail(ncclInvalidArgument, "finalized already");
        comm->finalizing = true;
    }
    return comm->blocks ? wait_until_ready(comm) : ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t handle) {
    if (!handle) return ncclSuccess;
    const CommPointer comm = take(handle, __func__);
    if (!comm) return ncclInvalidArgument;
    const Turn turn(*comm, __func__);
    bool pending, broken = false;
    {
        const std::lock_guard<std::mutex> guard(comm->mutex);
        pending = !comm->pending.empty() || !comm->drained();
        if (!pending) {
            const Current current(comm->context);
            broken = driver()->cuEventQuery(comm->last) != CUDA_SUCCESS;
            comm->shared->leave(comm->rank, Presence::kLeft);
            release(*comm);
            comm->aborted = true;
        }
    }
    if (pending) {
        finding(format("ncclCommDestroy of rank %d's communicator with work pending",
                       comm->rank));
        give_up(comm);
    }
    return broken ? fail(ncclUnhandledCudaError, "the context is broken") : ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t handle) {
    if (!handle) return ncclSuccess;
    const CommPointer comm = take(handle, __func__);
    if (!comm) return ncclInvalidArgument;
    give_up(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
    const CommPointer comm = find(handle, __func__);
    if (!comm || !error) return ncclInvalidArgument;
    *error = poll(*comm);
    return ncclSuccess;
}

ncclResult_t ncclCommCount(ncclComm_t handle, int* ranks) {
    const CommPointer comm = find(handle, __func__);
    if (!comm || !ranks) return ncclInvalidArgument;
    *ranks = comm->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(ncclComm_t handle, int* rank) {
    const CommPointer comm = find(handle, __func__);
    if (!comm || !rank) return ncclInvalidArgument;
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(ncclComm_t handle, int* device) {
    const CommPointer comm = find(handle, __func__);
    if (!comm || !device) return ncclInvalidArgument;
    *device = comm->device;
    return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess: return "no error";
        case ncclUnhandledCudaError: return "unhandled cuda error";
        case ncclSystemError: return "unhandled system error";
        case ncclInternalError: return "internal error";
        case ncclInvalidArgument: return "invalid argument";
        case ncclInvalidUsage: return "invalid usage";
        case ncclRemoteError: return "remote process exited or there was a network error";
        case ncclInProgress: return "operation in progress";
    }
    return "unknown result code";
}

const char* ncclGetLastError(ncclComm_t) {
    static thread_local std::string text;
    const std::lock_guard<std::mutex> guard(handles().mutex);
    text = handles().last_error;
    return text.c_str();
}

}  // extern "C"
