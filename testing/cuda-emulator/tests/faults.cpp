// The emulator itself is tested by faults put in on purpose: one for each rule, which it must name,
// and the same program without the fault, in which it must find nothing. Under many seeds: what is
// a fault is one whatever the schedule.
#include <sys/mman.h>

#include <thread>

#include "harness.h"

namespace {

// Runs what launches; the finding must have all of `words` (null: there must be none).
void expect(const char* what, const char* words, const std::function<void()>& program) {
    for (uint64_t seed = 1; seed <= 12; ++seed) {
        simt_seed(seed);
        program();
        const CUresult result = cuCtxSynchronize();
        const std::string found = take_findings();
        const bool caught = !found.empty();
        if (words ? caught && found.find(words) != std::string::npos
            && result == CUDA_ERROR_LAUNCH_FAILED
                  : !caught && result == CUDA_SUCCESS)
            continue;
        ++failures;
        fprintf(stderr, "%s, seed %llu: expected \"%s\", found \"%s\", error %d\n", what,
                (unsigned long long)seed, words ? words : "nothing", found.c_str(), result);
        return;
    }
}

template <class... A>
void start(const char* name, unsigned grid, unsigned block, unsigned shared, A... arguments) {
    MUST(try_launch(name, grid, block, shared, nullptr, arguments...));
}

// A kernel whose first argument says whether it is right.
template <class... A>
void expect_kernel(const char* name, const char* words, unsigned grid, unsigned block,
    unsigned shared,
                   A... arguments) {
    expect(name, words, [&] { start(name, grid, block, shared, int32_t(0), arguments...); });
    expect(name, nullptr, [&] { start(name, grid, block, shared, int32_t(1), arguments...); });
}

void check_memory() {
    Buffer<uint32_t> words(64, 0), out(256, 0);
    Buffer<float> floats(64, 1.0f), results(64, 0.0f);
    expect_kernel("past_the_end", "out of bounds: 4-byte write", 1, 96, 0, words.device(), 64u);
    expect_kernel("past_shared",
        "out of bounds: 4-byte write of byte 256 of the 256 of shared memory", 1,
                  96, 256, 64u);
    expect_kernel("wide_read", "misaligned", 1, 32, 0, (const float*)floats.device(),
        results.device());
    expect_kernel("wide_shared", "misaligned", 1, 32, 1024, results.device());
    expect_kernel("shared_never_written", "never written", 1, 64, 256, out.device());
    expect("never_written", "never written", [&] {
        Buffer<uint32_t> fresh(64);
        start("never_written", 1, 64, 0, int32_t(0), fresh.device(), out.device());
        MUST(cuStreamSynchronize(nullptr) == 719 ? CUDA_SUCCESS : 1);
    });
    expect("never_written", nullptr, [&] {
        Buffer<uint32_t> fresh(64);
        start("never_written", 1, 64, 0, int32_t(1), fresh.device(), out.device());
        MUST(cuStreamSynchronize(nullptr));
    });
    std::vector<uint32_t> host(64);
    expect("host memory", "host memory in a kernel",
           [&] { start("add_one", 1, 64, 0, host.data()); });
    expect("null", "host memory in a kernel",
           [&] { start("set_words", 1, 64, 0, (uint32_t*)nullptr, 1u); });
    expect("after free", "in no allocation", [&] {
        CUdeviceptr at;
        MUST(cuMemAlloc_v2(&at, 256));
        MUST(cuMemFree_v2(at));
        start("set_words", 1, 64, 0, (uint32_t*)at, 1u);
    });
    // Bytes that were never written stay so in a copy.
    expect("copied", "never written", [&] {
        CUdeviceptr from, to;
        MUST(cuMemAlloc_v2(&from, 256));
        MUST(cuMemAlloc_v2(&to, 256));
        MUST(cuMemsetD32_v2(from, 1, 63));
        MUST(cuMemcpyDtoD_v2(to, from, 256));
        start("add_one", 1, 64, 0, (uint32_t*)to);
        cuCtxSynchronize();
        MUST(cuMemFree_v2(from));
        MUST(cuMemFree_v2(to));
    });
    // What was never written comes to the host as 0xff, and is no finding.
    expect("poison", nullptr, [&] {
        Buffer<uint32_t> fresh(5);
        CHECK(fresh.host() == std::vector<uint32_t>(5, 0xffffffffu));
    });
}

void check_races() {
    Buffer<uint32_t> out(256, 0), words(64, 0);
    Buffer<uint16_t> halves(64, 0);
    expect_kernel("no_barrier", "race", 1, 96, 384, out.device());
    expect_kernel("no_second_barrier", "race", 1, 96, 384, out.device());
    expect_kernel("shuffle_is_no_barrier", "race", 1, 64, 256, out.device());
    expect_kernel("barrier_of_others", "race", 1, 96, 384, out.device());
    expect_kernel("blocks_meet", "race", 3, 32, 0, words.device());
    expect_kernel("half_words", "race", 1, 64, 0, halves.device(), out.device());
    expect_kernel("atomic_and_plain", "race", 2, 64, 4, words.device(), out.device());
}

void check_copies() {
    Buffer<uint32_t> in(512, 1), out(128, 0);
    const char* expected[] = {nullptr, "copy_async_16 is under way there", "",
                              "copy_async_16 is under way there",
                                  "copy_async_16 is under way there",
                              "copy_async_16 is under way there"};
    for (int32_t what = 0; what <= 5; ++what)
        expect("copy_ahead", expected[what], [&] {
            start("copy_ahead", 1, 64, 1024, what, (const uint32_t*)in.device(), out.device());
        });
    expect_kernel("copy_over", "race", 1, 64, 1024, (const uint32_t*)in.device(), out.device());
    expect_kernel("copy_of_nothing", "misaligned: copy_async_16", 1, 32, 512,
                  (const uint32_t*)in.device(), out.device());
    expect_kernel("matrix_of_global", "not of shared memory", 1, 32, 512,
        (const uint32_t*)in.device(),
                  out.device());
}

void check_waits() {
    Buffer<uint32_t> out(256, 0);
    expect_kernel("early_exit", "wait at __syncthreads (63 of 64 came); threads 5 have exited", 1,
        64, 0);
    expect_kernel("lane_exits", "wait at shuffle_xor (31 of the 32 of warp 0 came)", 1, 64, 0,
                  out.device());
    expect_kernel("lanes_part", "divergence: a warp's threads meet at", 1, 32, 0, out.device());
    expect_kernel("barrier_in_branch", "deadlock", 1, 64, 0);
    expect_kernel("barrier_counts", "barrier 1 is met by", 1, 96, 0);
    expect_kernel("barrier_of_halves", "is met by a part of warp", 1, 64, 0);
}

void check_launches() {
    Buffer<uint32_t> out(256, 0);
    module();
    const CUfunction f = function("early_exit");
    int32_t right = 1;
    void* arguments[] = {&right};
    auto run = [&](unsigned shared) {
        return cuLaunchKernel(f, 1, 1, 1, 64, 1, 1, shared, nullptr, arguments, nullptr);
    };
    expect("limits", nullptr, [&] {
        MUST(cuFuncSetAttribute(f, 8, 48 << 10));
        CHECK(run((48 << 10) + 4) == CUDA_ERROR_INVALID_VALUE);
        CHECK(cuFuncSetAttribute(f, 8, (163 << 10) + 4) == CUDA_ERROR_INVALID_VALUE);
        CHECK(cuFuncSetAttribute(f, 8, 163 << 10) == CUDA_SUCCESS);
        // The share of a multiprocessor's memory that it prefers is a percentage, or the driver's choice; registers cannot be set.
        int carveout = 0;
        CHECK(cuFuncSetAttribute(f, 9, -1) == CUDA_SUCCESS);
        CHECK(cuFuncSetAttribute(f, 9, 101) == CUDA_ERROR_INVALID_VALUE);
        CHECK(cuFuncSetAttribute(f, 9, -2) == CUDA_ERROR_INVALID_VALUE);
        CHECK(cuFuncGetAttribute(&carveout, 9, f) == CUDA_SUCCESS && carveout == -1);
        CHECK(cuFuncSetAttribute(f, 9, 100) == CUDA_SUCCESS);
        CHECK(cuFuncGetAttribute(&carveout, 9, f) == CUDA_SUCCESS && carveout == 100);
        CHECK(cuFuncSetAttribute(f, 4, 32) == CUDA_ERROR_INVALID_VALUE);
        CHECK(run((48 << 10) + 4) == CUDA_SUCCESS);
        CHECK(run(163 << 10) == CUDA_SUCCESS);
        CHECK(run((163 << 10) + 4) == CUDA_ERROR_INVALID_VALUE);
        simt_profile(8, 6);
        CHECK(cuFuncSetAttribute(f, 8, 100 << 10) == CUDA_ERROR_INVALID_VALUE);
        simt_profile(9, 0);
        CHECK(cuFuncSetAttribute(f, 8, 227 << 10) == CUDA_SUCCESS);
        CHECK(run(227 << 10) == CUDA_SUCCESS);
        simt_profile(8, 0);
        CHECK(try_launch("of_64_threads", 1, 96, 0, nullptr, out.device()) ==
              CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
        // PFC_KERNEL's own bound.
        CHECK(try_launch("add_one", 1, 288, 0, nullptr, out.device()) ==
              CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
        CHECK(cuLaunchKernel(f, 1, 2, 1, 64, 1, 1, 0, nullptr, arguments, nullptr) ==
              CUDA_ERROR_INVALID_VALUE);
    });
    expect("memory", nullptr, [&] {
        CUdeviceptr at;
        simt_memory(1 << 20);
        CHECK(cuMemAlloc_v2(&at, 2 << 20) == CUDA_ERROR_OUT_OF_MEMORY);
        simt_memory(1 << 30);
        CHECK(cuMemAlloc_v2(&at, 2 << 20) == CUDA_SUCCESS);
        CHECK(cuMemFree_v2(at) == CUDA_SUCCESS);
        CHECK(cuMemFree_v2(at) == CUDA_ERROR_INVALID_VALUE);
    });
    const uint64_t before = simt_count("cuStreamQuery");
    cuStreamQuery(nullptr);
    CHECK(simt_count("cuStreamQuery") == before + 1);
}

void check_streams() {
    Buffer<uint32_t> words(64, 0);
    CUstream a, b;
    CUevent event;
    MUST(cuStreamCreate(&a, CU_STREAM_NON_BLOCKING));
    MUST(cuStreamCreate(&b, CU_STREAM_NON_BLOCKING));
    MUST(cuEventCreate(&event, 0));
    auto two = [&](bool wait) {
        MUST(try_launch("set_words", 1, 64, 0, a, words.device(), 1u));
        MUST(cuEventRecord(event, a));
        if (wait) MUST(cuStreamWaitEvent(b, event, 0));
        MUST(try_launch("add_one", 1, 64, 0, b, words.device()));
    };
    expect("streams", "race, written by operation", [&] {
        two(false);
        cuCtxSynchronize();
    });
    expect("streams", nullptr, [&] {
        two(true);
        MUST(cuCtxSynchronize());
        CHECK(words.host() == std::vector<uint32_t>(64, 2));
    });
    // By the host's wait, and by polling.
    expect("host wait", nullptr, [&] {
        MUST(try_launch("set_words", 1, 64, 0, a, words.device(), 1u));
        MUST(cuStreamSynchronize(a));
        MUST(try_launch("add_one", 1, 64, 0, b, words.device()));
        MUST(cuEventRecord(event, b));
        while (cuEventQuery(event) == CUDA_ERROR_NOT_READY) {}
        MUST(try_launch("add_one", 1, 64, 0, a, words.device()));
        MUST(cuStreamSynchronize(a));
        CHECK(words.host() == std::vector<uint32_t>(64, 3));
    });
    // A stream that blocks on the legacy stream, and one that does not.
    expect("legacy", nullptr, [&] {
        CUstream c;
        MUST(cuStreamCreate(&c, 0));
        MUST(try_launch("set_words", 1, 64, 0, nullptr, words.device(), 1u));
        MUST(try_launch("add_one", 1, 64, 0, c, words.device()));
        CHECK(words.host() == std::vector<uint32_t>(64, 2));
        MUST(cuStreamDestroy_v2(c));
    });
    expect("legacy", "race", [&] {
        MUST(try_launch("set_words", 1, 64, 0, nullptr, words.device(), 1u));
        MUST(try_launch("add_one", 1, 64, 0, a, words.device()));
        cuCtxSynchronize();
    });
    expect("free", "freed with work pending", [&] {
        CUdeviceptr at;
        MUST(cuMemAlloc_v2(&at, 256));
        MUST(try_launch("set_words", 1, 64, 0, a, (uint32_t*)at, 1u));
        MUST(cuMemFree_v2(at));
    });
    expect("free of a stream", "freed with work pending", [&] {
        CUdeviceptr at;
        MUST(cuMemAllocAsync(&at, 256, a));
        MUST(try_launch("set_words", 1, 64, 0, a, (uint32_t*)at, 1u));
        MUST(cuMemFreeAsync(at, b));
    });
    expect("free of pinned memory", "freed with work pending", [&] {
        void* pinned;
        MUST(cuMemAllocHost_v2(&pinned, 256));
        MUST(cuMemcpyDtoHAsync_v2(pinned, CUdeviceptr(words.device()), 256, a));
        MUST(cuMemFreeHost(pinned));
    });
    expect("free of a stream", nullptr, [&] {
        CUdeviceptr at;
        MUST(cuMemAllocAsync(&at, 256, a));
        MUST(try_launch("set_words", 1, 64, 0, a, (uint32_t*)at, 1u));
        MUST(cuMemFreeAsync(at, a));
    });
    // Pageable memory may be read at the call or when the copy runs.
    expect("pageable memory that changes", "was changed or freed before the copy ran", [&] {
        std::vector<uint32_t> pageable(64, 1);
        MUST(cuMemcpyHtoDAsync_v2((CUdeviceptr)words.device(), pageable.data(), 256, a));
        pageable[63] = 2;
        cuStreamSynchronize(a);
    });
    expect("pageable memory that goes", "was changed or freed before the copy ran", [&] {
        const size_t size = size_t(1) << 20;  // so much goes back to the system
        Buffer<uint32_t> many(size / 4);
        void* const pageable = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        // Not zeros: those another mapping at its place may have.
        memset(pageable, 7, size);
        MUST(cuMemcpyHtoDAsync_v2((CUdeviceptr)many.device(), pageable, size, a));
        munmap(pageable, size);
        cuStreamSynchronize(a);
    });
    // Pinned memory is read when the copy runs.
    expect("pinned", nullptr, [&] {
        uint32_t* pinned;
        MUST(cuMemAllocHost_v2((void**)&pinned, 256));
        std::vector<uint32_t> pageable(64, 1);
        for (int i = 0; i < 64; ++i) pinned[i] = 1;
        MUST(cuMemcpyHtoDAsync_v2((CUdeviceptr)words.device(), pinned, 256, a));
        pinned[0] = 2;
        MUST(cuStreamSynchronize(a));
        CHECK(words.host()[0] == 2);
        MUST(cuMemcpyHtoDAsync_v2((CUdeviceptr)words.device(), pageable.data(), 256, a));
        MUST(cuStreamSynchronize(a));
        CHECK(words.host()[0] == 1);
        unsigned type = 0;
        MUST(cuPointerGetAttribute(&type, 2, (CUdeviceptr)words.device()));
        CHECK(type == 2);
        MUST(cuPointerGetAttribute(&type, 2, (CUdeviceptr)pinned));
        CHECK(type == 1);
        CHECK(cuPointerGetAttribute(&type, 2,
            (CUdeviceptr)pageable.data()) == CUDA_ERROR_INVALID_VALUE);
        MUST(cuMemFreeHost(pinned));
    });
    expect("host function", nullptr, [&] {
        int called = 0;
        MUST(cuLaunchHostFunc(a, [](void* data) { ++*static_cast<int*>(data); }, &called));
        CHECK(called == 0);
        MUST(cuStreamSynchronize(a));
        CHECK(called == 1);
    });
    MUST(cuEventDestroy_v2(event));
    MUST(cuStreamDestroy_v2(a));
    MUST(cuStreamDestroy_v2(b));
}

// What a capture forbids, to whom, and what becomes of it then.
void check_captures() {
    Buffer<uint32_t> words(64);
    CUstream captured, other;
    CUevent event;
    MUST(cuStreamCreate(&captured, CU_STREAM_NON_BLOCKING));
    MUST(cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    MUST(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    MUST(cuEventRecord(event, other));
    const auto ends = [&](int mode, const std::function<CUresult()>& meanwhile, CUresult told) {
        CUgraph graph = nullptr;
        MUST(cuStreamBeginCapture_v2(captured, mode));
        const bool allowed = told == CUDA_SUCCESS;
        CHECK(meanwhile() == told);
        CHECK(cuStreamEndCapture(captured, &graph)
              == (allowed ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        CHECK((graph != nullptr) == allowed);
        if (graph) MUST(cuGraphDestroy(graph));
    };
    const int global = CU_STREAM_CAPTURE_MODE_GLOBAL, own = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    const int relaxed = CU_STREAM_CAPTURE_MODE_RELAXED;
    const CUresult unsupported = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    const auto query = [&] { return cuEventQuery(event); };
    const auto on_a_thread = [](const std::function<CUresult()>& call) {
        CUresult told = CUDA_SUCCESS;
        CUcontext context;
        MUST(cuCtxGetCurrent(&context));
        std::thread([&] {
            MUST(cuCtxSetCurrent(context));
            told = call();
        }).join();
        return told;
    };
    ends(global, query, unsupported);
    ends(relaxed, query, CUDA_SUCCESS);
    ends(global, [&] { return on_a_thread(query); }, unsupported);
    ends(own, [&] { return on_a_thread(query); }, CUDA_SUCCESS);
    ends(global, [&] {
        int mode = relaxed;
        MUST(cuThreadExchangeStreamCaptureMode(&mode));
        CHECK(mode == global);
        const CUresult told = query();
        MUST(cuThreadExchangeStreamCaptureMode(&mode));
        CHECK(mode == relaxed);
        return told;
    }, CUDA_SUCCESS);
    // Whatever the mode: a wait for what never runs, or for everything, and an order across its border.
    ends(relaxed, [&] { return cuStreamSynchronize(captured); }, unsupported);
    ends(relaxed, [&] { return cuCtxSynchronize(); }, unsupported);
    ends(relaxed, [&] { return cuStreamWaitEvent(captured, event, 0); },
         CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    // What is enqueued there does not run.
    ends(relaxed, [&] {
        return try_launch("set_words", 1, 64, 0, captured, words.device(), 7u);
    }, CUDA_SUCCESS);
    MUST(cuStreamSynchronize(captured));
    CHECK(words.host()[0] != 7);
    MUST(cuEventDestroy_v2(event));
    MUST(cuStreamDestroy_v2(captured));
    MUST(cuStreamDestroy_v2(other));
}

}  // namespace

int main() {
    // The findings below are on purpose: only what is wrong with them is of interest.
    if (!getenv("SIMT_LOUD")) simt_quiet(1);
    module();
    check_memory();
    check_races();
    check_copies();
    check_waits();
    check_launches();
    check_streams();
    check_captures();
    return finish();
}
