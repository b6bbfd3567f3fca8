// Each knob of standin.h, aborts, ranks that die, and each misuse planted once.
#include "harness.h"

#include <dirent.h>
#include <signal.h>

namespace {

const size_t kCount = 8;

// The sum of rank + 1 over the ranks, in every element.
std::vector<float> sum_of(int ranks) {
    return std::vector<float>(kCount, float(ranks * (ranks + 1) / 2));
}

struct Data {
    Buffer<float> send, receive;
    explicit Data(const Rank& r)
        : send(std::vector<float>(kCount, float(r.rank + 1))),
          receive(std::vector<float>(kCount, -1)) {}
};

ncclResult_t all_reduce(const Rank& r, const Data& data) {
    return ncclAllReduce(data.send.device(), data.receive.device(), kCount, ncclFloat32, ncclSum,
                         r.comm, r.stream);
}

void abort(Rank& r) {
    MUST(ncclCommAbort(r.comm));
    r.comm = nullptr;
    // Its work is out of the way.
    CHECK(is_done(r.stream, 5000));
}

// The findings must have these words (null: there must be none).
void expect(const char* what, const char* words) {
    const std::string found = findings();
    if (words ? found.find(words) == std::string::npos : !found.empty()) {
        ++failures;
        fprintf(stderr, "%s: expected \"%s\", found \"%s\"\n", what, words ? words : "nothing",
                found.c_str());
    }
    CHECK(standin_live() == 0);
    standin_reset();
    standin_quiet(1);
}

// Peers of a rank whose operation hangs complete by themselves: it is its own.
void check_hang() {
    for (const int fault : {STANDIN_HANG, STANDIN_ASYNC}) {
        standin_plan(1, 1, fault, ncclSystemError);
        run_threads(3, 0, [&](Rank& r) {
            const Data data(r);
            MUST(all_reduce(r, data));
            MUST(cuStreamSynchronize(r.stream));
            MUST(all_reduce(r, data));
            if (r.rank != 1) {
                MUST(cuStreamSynchronize(r.stream));
                CHECK(data.receive.host() == sum_of(3));
                return;
            }
            // A thread that waits for the stream returns when another one aborts.
            std::atomic<bool> over{false};
            CUcontext context;
            MUST(cuCtxGetCurrent(&context));
            std::thread waits([&] {
                MUST(cuCtxSetCurrent(context));
                MUST(cuStreamSynchronize(r.stream));
                over = true;
            });
            sleep_ms(30);
            CHECK(!over);
            CHECK(state_of(r.comm) == (fault == STANDIN_HANG ? ncclSuccess : ncclSystemError));
            if (fault == STANDIN_ASYNC) CHECK(all_reduce(r, data) == ncclSystemError);
            abort(r);
            waits.join();
        });
        expect("hang", nullptr);
    }
    // At its start: nobody comes to an end.
    standin_plan(0, -1, STANDIN_HANG, 0);
    const ncclUniqueId id = new_id();
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank)
        threads.emplace_back([&, rank] {
            context_of();
            ncclConfig_t how = config(0);
            ncclComm_t comm;
            CHECK(ncclCommInitRankConfig(&comm, 2, id, rank, &how) == ncclInProgress);
            CHECK(settle(comm, 30) == ncclInProgress);
            MUST(ncclCommAbort(comm));
        });
    for (auto& thread : threads) thread.join();
    expect("hang at the start", nullptr);
}

void check_codes() {
    standin_plan(1, 1, STANDIN_ENQUEUE, ncclInternalError);
    run_threads(2, 0, [](Rank& r) {
        const Data data(r);
        MUST(all_reduce(r, data));
        const ncclResult_t result = all_reduce(r, data);
        CHECK(result == (r.rank == 1 ? ncclInternalError : ncclSuccess));
        CHECK(state_of(r.comm) == result);
        // The peer waits for what was never enqueued.
        if (r.rank == 0) CHECK(!is_done(r.stream, 30));
        else CHECK(is_done(r.stream, 5000));
        abort(r);
    });
    CHECK(standin_operations(0) == 2 && standin_operations(1) == 1);
    expect("enqueue", nullptr);
    for (const int fault : {STANDIN_ENQUEUE, STANDIN_ASYNC}) {
        standin_plan(0, -1, fault, ncclSystemError);
        context_of();
        ncclConfig_t how = config(0);
        ncclComm_t comm = nullptr;
        const ncclResult_t result = ncclCommInitRankConfig(&comm, 2, new_id(), 0, &how);
        CHECK(result == (fault == STANDIN_ENQUEUE ? ncclSystemError : ncclInProgress));
        CHECK((comm == nullptr) == (fault == STANDIN_ENQUEUE));
        if (comm) {
            CHECK(state_of(comm) == ncclSystemError);
            MUST(ncclCommAbort(comm));
        }
        expect("at the start", nullptr);
    }
}

void check_data() {
    standin_plan(0, 0, STANDIN_DELAY, 60);
    standin_plan(1, 1, STANDIN_WRONG, 3);
    standin_plan(1, 2, STANDIN_SHORT, 0);
    standin_plan(0, -1, STANDIN_DELAY, 40);
    run_threads(2, 1, [](Rank& r) {
        const Data data(r);
        const auto begin = std::chrono::steady_clock::now();
        MUST(all_reduce(r, data));
        MUST(cuStreamSynchronize(r.stream));
        const auto took = std::chrono::steady_clock::now() - begin;
        CHECK(data.receive.host() == sum_of(2));
        // The one time that a test may ask about: the knob's.
        if (r.rank == 0) CHECK(took >= std::chrono::milliseconds(60));
        std::vector<float> expected = sum_of(2);
        MUST(all_reduce(r, data));
        MUST(cuStreamSynchronize(r.stream));
        if (r.rank == 1) {
            uint32_t bits;
            memcpy(&bits, &expected[3], 4);
            bits = ~bits;
            memcpy(&expected[3], &bits, 4);
        }
        CHECK(memcmp(data.receive.host().data(), expected.data(), kCount * 4) == 0);
        data.receive.write(std::vector<float>(kCount, -1));
        MUST(all_reduce(r, data));
        MUST(cuStreamSynchronize(r.stream));
        expected = sum_of(2);
        if (r.rank == 1) std::fill(expected.begin() + kCount / 2, expected.end(), -1.0f);
        CHECK(data.receive.host() == expected);
    });
    expect("data", nullptr);
}

void check_progress() {
    standin_in_progress(3);
    run_threads(2, 0, [](Rank& r) {
        const Data data(r);
        CHECK(all_reduce(r, data) == ncclInProgress);
        CHECK(standin_operations(r.rank) == 0);
        for (int i = 0; i < 3; ++i) CHECK(state_of(r.comm) == ncclInProgress);
        CHECK(state_of(r.comm) == ncclSuccess);
        CHECK(standin_operations(r.rank) == 1);
        MUST(cuStreamSynchronize(r.stream));
        CHECK(data.receive.host() == sum_of(2));
        MUST(ncclGroupStart());
        MUST(all_reduce(r, data));
        MUST(all_reduce(r, data));
        CHECK(ncclGroupEnd() == ncclInProgress);
        MUST(settle(r.comm));
        CHECK(standin_operations(r.rank) == 3);
        MUST(cuStreamSynchronize(r.stream));
    });
    expect("in progress", nullptr);
    run_threads(1, 0, [](Rank& r) {
        standin_in_progress(1);
        const Data data(r);
        CHECK(all_reduce(r, data) == ncclInProgress);
        CHECK(all_reduce(r, data) == ncclInvalidArgument);
        MUST(settle(r.comm));
        MUST(cuStreamSynchronize(r.stream));
    });
    expect("a second while the first is in progress", "while it is in progress");
}

void check_lost(bool tells) {
    standin_tell(tells);
    std::atomic<int> begun{0};
    run_threads(3, 0, [&](Rank& r) {
        const Data data(r);
        ++begun;
        while (begun < 3) sleep_ms(1);
        if (r.rank == 2) return abort(r);
        MUST(all_reduce(r, data));
        if (tells) {
            for (int i = 0; i < 5000 && state_of(r.comm) == ncclSuccess; ++i) sleep_ms(1);
            CHECK(state_of(r.comm) == ncclRemoteError);
        } else {
            CHECK(!is_done(r.stream, 30) && state_of(r.comm) == ncclSuccess);
        }
        abort(r);
    });
    expect("lost", nullptr);
}

// A rank whose process dies, with work under way.
void check_death(bool tells) {
    standin_tell(tells);
    const ncclUniqueId id = new_id();
    pid_t children[2];
    for (int rank = 0; rank < 2; ++rank) {
        children[rank] = fork();
        if (children[rank] != 0) continue;
        be_rank(rank, 2, id, 0, [&](Rank& r) {
            const Data data(r);
            MUST(all_reduce(r, data));
            MUST(cuStreamSynchronize(r.stream));
            if (r.rank == 1) kill(getpid(), SIGKILL);
            MUST(all_reduce(r, data));
            for (int i = 0; i < 5000 && tells && state_of(r.comm) == ncclSuccess; ++i) sleep_ms(1);
            CHECK(!is_done(r.stream, 30));
            CHECK(state_of(r.comm) == (tells ? ncclRemoteError : ncclSuccess));
            abort(r);
        });
        exit(finish());
    }
    int status = 0;
    CHECK(waitpid(children[0], &status, 0) == children[0] && status == 0);
    CHECK(waitpid(children[1], &status, 0) == children[1] && WIFSIGNALED(status));
}

// The knobs of a process that starts.
void check_environment(const char* program) {
    const pid_t child = fork();
    if (child == 0) {
        setenv("PFC_STANDIN_PLAN", "0:1:wrong:0,-1:0:short:0", 1);
        setenv("PFC_STANDIN_VERSION", "21800", 1);
        execl(program, program, "environment", nullptr);
        _exit(1);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

int run_in_environment() {
    int version = 0;
    MUST(ncclGetVersion(&version));
    CHECK(version == 21800);
    run_threads(1, 1, [](Rank& r) {
        const Data data(r);
        MUST(all_reduce(r, data));
        MUST(cuStreamSynchronize(r.stream));
        CHECK(data.receive.host()[kCount - 1] == -1);
        MUST(all_reduce(r, data));
        MUST(cuStreamSynchronize(r.stream));
        CHECK(data.receive.host()[0] != 1 && data.receive.host()[kCount - 1] == 1);
    });
    return finish();
}

void check_misuse() {
    ncclResult_t state;
    for (const bool aborts : {true, false}) {
        run_threads(1, 1, [&](Rank& r) {
            const ncclComm_t gone = r.comm;
            const Data data(r);
            MUST(aborts ? ncclCommAbort(r.comm) : ncclCommDestroy(r.comm));
            CHECK(all_reduce(r, data) == ncclInvalidArgument);
            r.comm = nullptr;
            CHECK(ncclCommGetAsyncError(gone, &state) == ncclInvalidArgument);
            CHECK(ncclCommAbort(gone) == ncclInvalidArgument);
        });
        expect("after its end", aborts
            ? "ncclAllReduce on rank 0's communicator after ncclCommAbort"
            : "ncclCommGetAsyncError on rank 0's communicator after ncclCommDestroy");
    }
    run_threads(1, 1, [](Rank& r) {
        std::atomic<bool> over{false};
        auto hammer = [&] {
            context_of();
            const Data data(r);
            for (int i = 0; i < 20000 && !over; ++i) {
                MUST(all_reduce(r, data));
                if (i % 50 == 49) MUST(cuStreamSynchronize(r.stream));
                over = over || standin_findings(nullptr, 0) > 0;
            }
            MUST(cuStreamSynchronize(r.stream));
        };
        std::thread a(hammer), b(hammer);
        a.join();
        b.join();
    });
    expect("two threads", "while another thread calls on it");
    simt_devices(2);
    run_threads(1, 1, [](Rank& r) {
        const Data data(r);
        context_of(1);
        MUST(all_reduce(r, data));
        context_of(0);
        MUST(cuStreamSynchronize(r.stream));
    });
    simt_devices(1);
    expect("another device", "of device 0 with a context of device 1");
    struct Differs {
        size_t count;
        ncclDataType_t type;
        ncclRedOp_t reduction;
        bool gathers;
    };
    for (const Differs& d : {Differs{kCount / 2, ncclFloat32, ncclSum, false},
                             Differs{kCount, ncclInt32, ncclSum, false},
                             Differs{kCount, ncclFloat32, ncclMax, false},
                             Differs{kCount / 2, ncclFloat32, ncclSum, true}}) {
        run_threads(2, 1, [&](Rank& r) {
            const Data data(r);
            if (r.rank == 0) MUST(all_reduce(r, data));
            else if (d.gathers)
                MUST(ncclAllGather(data.send.device(), data.receive.device(), d.count, d.type,
                                   r.comm, r.stream));
            else
                MUST(ncclAllReduce(data.send.device(), data.receive.device(), d.count, d.type,
                                   d.reduction, r.comm, r.stream));
            CHECK(!is_done(r.stream, 30));
            abort(r);
        });
        expect("differs", d.gathers ? "rank 1's is ncclAllGather of 4 elements"
            : "'s operation 0 is ncclAllReduce of");
    }
    standin_plan(0, 0, STANDIN_HANG, 0);
    run_threads(1, 1, [](Rank& r) {
        const Data data(r);
        MUST(all_reduce(r, data));
        MUST(ncclCommDestroy(r.comm));
        r.comm = nullptr;
        CHECK(is_done(r.stream, 5000));
    });
    expect("pending", "ncclCommDestroy of rank 0's communicator with work pending");
    CHECK(ncclGroupEnd() == ncclInvalidUsage);
    expect("group", "ncclGroupEnd without");
    ncclComm_t comm;
    ncclConfig_t how = config(0);
    how.magic = 1;
    CHECK(ncclCommInitRankConfig(&comm, 1, new_id(), 0, &how) == ncclInvalidArgument);
    CHECK(ncclCommInitRank(&comm, 1, ncclUniqueId(), 0) == ncclInvalidArgument);
    CHECK(ncclCommInitRank(&comm, 2, new_id(), 2) == ncclInvalidArgument);
    // An old caller's configuration, of four fields and a version that had no more.
    how = config(0);
    how.size = offsetof(ncclConfig_t, cgaClusterSize);
    CHECK(ncclCommInitRankConfig(&comm, 1, new_id(), 0, &how) == ncclInProgress);
    MUST(settle(comm));
    MUST(ncclCommDestroy(comm));
    expect("configurations", nullptr);
}

// A kernel that fails breaks the context: no collective behind it completes, nor does the stand-in
// take what is left of them for misuse.
void check_broken() {
    simt_quiet(1);
    for (const bool aborts : {true, false})
        run_threads(1, 1, [&](Rank& r) {
            const Data data(r);
            CUmodule module;
            CUfunction kernel;
            MUST(cuModuleLoadData(&module, "any"));
            MUST(cuModuleGetFunction(&kernel, module, "trivial_scale"));
            float* at = data.receive.device();
            double rule[2] = {};
            uint32_t count = kCount;
            void* arguments[] = {&at, &at, rule, &count};
            simt_fail("trivial_scale", 1, CUDA_ERROR_LAUNCH_FAILED);
            MUST(cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, r.stream, arguments, nullptr));
            MUST(all_reduce(r, data));
            CHECK(cuStreamSynchronize(r.stream) == CUDA_ERROR_LAUNCH_FAILED);
            CHECK((aborts ? ncclCommAbort(r.comm) : ncclCommDestroy(r.comm)) ==
                  (aborts ? ncclSuccess : ncclUnhandledCudaError));
            r.comm = nullptr;
            simt_forgive();
        });
    simt_quiet(0);
    expect("broken", nullptr);
}

// One thread makes the communicators of all ranks.
void check_group() {
    context_of();
    const ncclUniqueId id = new_id();
    ncclComm_t comms[2];
    MUST(ncclGroupStart());
    for (int rank = 0; rank < 2; ++rank) MUST(ncclCommInitRank(&comms[rank], 2, id, rank));
    MUST(ncclGroupEnd());
    CUstream streams[2];
    std::vector<Rank> ranks;
    for (int rank = 0; rank < 2; ++rank) {
        MUST(cuStreamCreate(&streams[rank], CU_STREAM_NON_BLOCKING));
        ranks.push_back({rank, 2, comms[rank], streams[rank]});
    }
    const Data first(ranks[0]), second(ranks[1]);
    MUST(ncclGroupStart());
    MUST(all_reduce(ranks[0], first));
    CHECK(standin_operations(0) == 0);
    MUST(all_reduce(ranks[1], second));
    MUST(ncclGroupEnd());
    for (const Rank& r : ranks) MUST(cuStreamSynchronize(r.stream));
    CHECK(first.receive.host() == sum_of(2) && second.receive.host() == sum_of(2));
    for (const Rank& r : ranks) {
        MUST(ncclCommDestroy(r.comm));
        MUST(cuStreamDestroy_v2(r.stream));
    }
    expect("group", nullptr);
}

// Of this process and its children.
bool leaves_nothing() {
    DIR* folder = opendir("/dev/shm");
    bool found = false;
    const std::string mine = "pfc-standin-" + std::to_string(getpid()) + "-";
    while (const dirent* entry = readdir(folder))
        found = found || mine.compare(0, mine.size(), entry->d_name, mine.size()) == 0;
    closedir(folder);
    return !found;
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1) return run_in_environment();
    check_environment(arguments[0]);
    check_death(false);
    check_death(true);
    standin_reset();
    standin_quiet(1);
    for (uint64_t seed = 1; seed <= 3; ++seed) {
        simt_seed(seed);
        check_hang();
        check_codes();
        check_data();
        check_progress();
        check_lost(false);
        check_lost(true);
        check_misuse();
        check_broken();
        check_group();
    }
    CHECK(leaves_nothing());
    return finish();
}
