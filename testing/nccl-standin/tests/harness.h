// For tests of the stand-in: ranks as threads, each with a context and a stream, or as processes.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "nccl_api.h"
#include "simt.h"
#include "standin.h"

inline std::atomic<int> failures{0};

#define CHECK(...)                                                                    \
    do {                                                                              \
        if (!(__VA_ARGS__)) {                                                         \
            ++failures;                                                               \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
        }                                                                             \
    } while (0)

// A call, of the driver or of NCCL, that has to succeed.
#define MUST(call)                                                                         \
    do {                                                                                   \
        const int result_ = int(call);                                                     \
        if (result_ != 0) {                                                                \
            fprintf(stderr, "%s:%d: %s is %d (%s)\n", __FILE__, __LINE__, #call, result_,  \
                    ncclGetLastError(nullptr));                                            \
            _exit(1);                                                                      \
        }                                                                                  \
    } while (0)

inline void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

inline CUcontext context_of(CUdevice device = 0) {
    CUcontext context;
    MUST(cuInit(0));
    MUST(cuDevicePrimaryCtxRetain(&context, device));
    MUST(cuCtxSetCurrent(context));
    return context;
}

inline CUdeviceptr address(const void* at) {
    return CUdeviceptr(reinterpret_cast<uintptr_t>(at));
}

template <class T>
class Buffer {
public:
    explicit Buffer(const std::vector<T>& values) : count_(values.size()) {
        MUST(cuMemAlloc_v2(&at_, bytes() + 1));
        write(values);
    }
    ~Buffer() { cuMemFree_v2(at_); }
    Buffer(const Buffer&) = delete;
    T* device() const { return reinterpret_cast<T*>(at_); }
    void write(const std::vector<T>& values) const {
        MUST(cuMemcpyHtoD_v2(at_, values.data(), bytes()));
    }
    std::vector<T> host() const {
        std::vector<T> values(count_);
        MUST(cuMemcpyDtoH_v2(values.data(), at_, bytes()));
        return values;
    }

private:
    size_t bytes() const { return count_ * sizeof(T); }
    CUdeviceptr at_ = 0;
    size_t count_;
};

// What a rank of a test has.
struct Rank {
    int rank, ranks;
    ncclComm_t comm;
    CUstream stream;
};

inline ncclConfig_t config(int blocking) {
    ncclConfig_t made{sizeof(ncclConfig_t), NCCL_MAGIC, 23203, blocking, NCCL_UNDEFINED,
                      NCCL_UNDEFINED, NCCL_UNDEFINED, nullptr, NCCL_UNDEFINED};
    return made;
}

inline ncclResult_t state_of(ncclComm_t comm) {
    ncclResult_t state = ncclInternalError;
    MUST(ncclCommGetAsyncError(comm, &state));
    return state;
}

// Asks until nothing is in progress, at most so long.
inline ncclResult_t settle(ncclComm_t comm, int milliseconds = 20000) {
    ncclResult_t state = state_of(comm);
    for (int i = 0; state == ncclInProgress && i < milliseconds; ++i) {
        sleep_ms(1);
        state = state_of(comm);
    }
    return state;
}

// Whether a stream's work is done within so long.
inline bool is_done(CUstream stream, int milliseconds) {
    for (int i = 0; i < milliseconds; ++i) {
        if (cuStreamQuery(stream) == CUDA_SUCCESS) return true;
        sleep_ms(1);
    }
    return false;
}

// A rank that begins, and what is left of it when `body` has not ended its communicator.
inline void be_rank(int rank, int ranks, const ncclUniqueId& id, int blocking,
                    const std::function<void(Rank&)>& body) {
    context_of();
    Rank self{rank, ranks, nullptr, nullptr};
    MUST(cuStreamCreate(&self.stream, CU_STREAM_NON_BLOCKING));
    ncclConfig_t how = config(blocking);
    const ncclResult_t begun = ncclCommInitRankConfig(&self.comm, ranks, id, rank, &how);
    CHECK(begun == (blocking ? ncclSuccess : ncclInProgress));
    if (!blocking) MUST(settle(self.comm));
    body(self);
    if (self.comm) {
        MUST(cuStreamSynchronize(self.stream));
        MUST(ncclCommDestroy(self.comm));
    }
    MUST(cuStreamDestroy_v2(self.stream));
}

inline ncclUniqueId new_id() {
    ncclUniqueId id;
    MUST(ncclGetUniqueId(&id));
    return id;
}

inline void run_threads(int ranks, int blocking, const std::function<void(Rank&)>& body) {
    const ncclUniqueId id = new_id();
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank)
        threads.emplace_back([&, rank] { be_rank(rank, ranks, id, blocking, body); });
    for (auto& thread : threads) thread.join();
}

inline std::string findings() {
    std::string text(standin_findings(nullptr, 0) + 1, 0);
    standin_findings(&text[0], text.size());
    text.pop_back();
    return text;
}

inline int finish() {
    const std::string found = findings();
    std::string emulator(simt_report(nullptr, 0) + 1, 0);
    simt_report(&emulator[0], emulator.size());
    emulator.pop_back();
    if (!found.empty() || !emulator.empty()) {
        ++failures;
        fprintf(stderr, "found:\n%s%s", found.c_str(), emulator.c_str());
    }
    CHECK(standin_live() == 0);
    if (failures) fprintf(stderr, "%d failures\n", failures.load());
    return failures ? 1 : 0;
}

// In processes of their own. Not in one that has used the driver: a child has but one thread.
inline void run_processes(int ranks, int blocking, const std::function<void(Rank&)>& body) {
    const ncclUniqueId id = new_id();
    std::vector<pid_t> children;
    for (int rank = 0; rank < ranks; ++rank) {
        children.push_back(fork());
        if (children.back() != 0) continue;
        simt_seed(uint64_t(rank) + 3);
        be_rank(rank, ranks, id, blocking, body);
        exit(finish());
    }
    for (const pid_t child : children) {
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
}
