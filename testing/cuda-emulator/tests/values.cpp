// Waits for words in memory: between streams of one thread, of several, and of two processes.
#include "harness.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace {

constexpr uint64_t kSeeds = 12;

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

CUstream new_stream() {
    CUstream stream;
    MUST(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    return stream;
}

CUdeviceptr address(const void* at) { return CUdeviceptr(reinterpret_cast<uintptr_t>(at)); }

// A kernel before a write, and one behind the wait for it, in two streams.
void check_order() {
    Buffer<uint32_t> words(64, 0);
    Buffer<uint64_t> value(2, 0);
    const CUstream a = new_stream(), b = new_stream();
    for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
        for (const bool waits : {true, false}) {
            simt_seed(seed);
            value.write({0, 0});
            if (waits) MUST(cuStreamWaitValue64_v2(b, address(value.device()), 7, 0));
            MUST(try_launch("add_one", 1, 64, 0, b, words.device()));
            MUST(try_launch("set_words", 1, 64, 0, a, words.device(), 1u));
            MUST(cuStreamWriteValue64_v2(a, address(value.device()), 7, 0));
            // The fault: without the wait the second kernel may come first.
            const CUresult result = cuStreamSynchronize(b);
            cuStreamSynchronize(a);
            const std::string found = take_findings();
            if (waits) {
                CHECK(result == CUDA_SUCCESS && found.empty());
                CHECK(words.host() == std::vector<uint32_t>(64, 2));
            } else {
                CHECK(found.find("race, written by operation") != std::string::npos);
            }
        }
    }
    // A free behind such a wait comes after the use, and one without it does not.
    for (const bool waits : {true, false}) {
        CUdeviceptr at;
        value.write({0, 0});
        MUST(cuMemAllocAsync(&at, 256, a));
        MUST(try_launch("set_words", 1, 64, 0, a, reinterpret_cast<uint32_t*>(at), 1u));
        MUST(cuStreamWriteValue64_v2(a, address(value.device()), 1, 0));
        if (waits) MUST(cuStreamWaitValue64_v2(b, address(value.device()), 1, 0));
        MUST(cuMemFreeAsync(at, b));
        cuStreamSynchronize(b);
        cuStreamSynchronize(a);
        CHECK((take_findings().find("freed with work pending") == std::string::npos) == waits);
    }
    // A wait for an earlier value comes after no more than that one's writer did.
    simt_seed(3);
    value.write({0, 0});
    MUST(cuStreamWriteValue64_v2(a, address(value.device()), 1, 0));
    MUST(try_launch("set_words", 1, 64, 0, a, words.device(), 1u));
    MUST(cuStreamWriteValue64_v2(a, address(value.device()), 2, 0));
    while (cuStreamQuery(a) == CUDA_ERROR_NOT_READY) {}
    const CUstream c = new_stream();
    MUST(cuStreamWaitValue64_v2(c, address(value.device()), 1, 0));
    MUST(cuStreamSynchronize(c));
    CHECK(take_findings().empty());
    for (const CUstream stream : {a, b, c}) MUST(cuStreamDestroy_v2(stream));
}

void check_comparisons() {
    Buffer<uint32_t> word(2, 0);
    const CUstream a = new_stream(), b = new_stream();
    struct Case {
        unsigned flags;
        uint32_t before, wanted, after;
    } cases[] = {{0, 4, 5, 6}, {0, 0xfffffff0u, 2, 2}, {1, 6, 5, 5}, {2, 1, 6, 2},
                 {3, ~1u, 1, ~3u}};
    for (const Case& c : cases) {
        word.write({c.before, 0});
        MUST(cuStreamWaitValue32_v2(b, address(word.device()), c.wanted, c.flags));
        for (int i = 0; i < 5; ++i) CHECK(cuStreamQuery(b) == CUDA_ERROR_NOT_READY);
        MUST(cuStreamWriteValue32_v2(a, address(word.device()), c.after, 0));
        MUST(cuStreamSynchronize(b));
    }
    CHECK(cuStreamWaitValue64_v2(b, address(word.device()) + 4, 0, 0) == CUDA_ERROR_INVALID_VALUE);
    CHECK(cuStreamWaitValue64_v2(b, address(&word), 0, 0) == CUDA_ERROR_INVALID_VALUE);
    MUST(cuStreamDestroy_v2(a));
    MUST(cuStreamDestroy_v2(b));
}

// A wait ends no earlier than the write.
void check_time() {
    Buffer<uint32_t> words(1 << 20, 0);
    Buffer<uint64_t> value(1, 0);
    const CUstream a = new_stream(), b = new_stream();
    CUevent begin, end;
    MUST(cuEventCreate(&begin, 0));
    MUST(cuEventCreate(&end, 0));
    MUST(cuEventRecord(begin, b));
    MUST(cuStreamWaitValue64_v2(b, address(value.device()), 1, 0));
    MUST(cuEventRecord(end, b));
    MUST(cuMemsetD32Async(address(words.device()), 5, words.size(), a));
    MUST(cuStreamWriteValue64_v2(a, address(value.device()), 1, 0));
    MUST(cuEventSynchronize(end));
    float milliseconds = 0;
    MUST(cuEventElapsedTime(&milliseconds, begin, end));
    CHECK(milliseconds > 0.2f);
    MUST(cuEventDestroy_v2(begin));
    MUST(cuEventDestroy_v2(end));
    MUST(cuStreamDestroy_v2(a));
    MUST(cuStreamDestroy_v2(b));
}

// A thread that waits runs what another's stream has before the write, and sees what is enqueued
// only later.
void check_threads(CUcontext context) {
    for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
        simt_seed(seed);
        Buffer<uint64_t> value(1, 0);
        Buffer<uint32_t> words(64, 0);
        std::atomic<int> called{0};
        std::thread other([&] {
            MUST(cuCtxSetCurrent(context));
            const CUstream b = new_stream();
            MUST(cuStreamWaitValue64_v2(b, address(value.device()), 1, 0));
            MUST(try_launch("add_one", 1, 64, 0, b, words.device()));
            MUST(cuStreamSynchronize(b));
            CHECK(called == 1);
            MUST(cuStreamDestroy_v2(b));
        });
        if (seed % 2) sleep_ms(2);
        const CUstream a = new_stream();
        MUST(try_launch("set_words", 1, 64, 0, a, words.device(), 1u));
        MUST(cuLaunchHostFunc(a, [](void* at) { ++*static_cast<std::atomic<int>*>(at); }, &called));
        MUST(cuStreamWriteValue64_v2(a, address(value.device()), 1, 0));
        // Nothing here waits for this stream.
        other.join();
        CHECK(words.host() == std::vector<uint32_t>(64, 2));
        MUST(cuStreamDestroy_v2(a));
    }
}

// The host releases a stream in which another thread waits, as who gives up does.
void check_release(CUcontext context) {
    uint64_t* word;
    MUST(cuMemAllocHost_v2(reinterpret_cast<void**>(&word), 8));
    *word = 0;
    std::atomic<bool> over{false};
    std::thread other([&] {
        MUST(cuCtxSetCurrent(context));
        const CUstream stream = new_stream();
        MUST(cuStreamWaitValue64_v2(stream, address(word), 1, 0));
        MUST(cuStreamSynchronize(stream));
        over = true;
        MUST(cuStreamDestroy_v2(stream));
    });
    sleep_ms(10);
    CHECK(!over);
    __atomic_store_n(word, 1, __ATOMIC_RELEASE);
    other.join();
    MUST(cuMemFreeHost(word));
}

void check_registered() {
    const size_t size = 8192;
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    Buffer<uint32_t> words(64, 3);
    const CUstream a = new_stream();
    CHECK(cuMemHostUnregister(at) == CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    MUST(cuMemHostRegister_v2(at, size, CU_MEMHOSTREGISTER_PORTABLE));
    CHECK(cuMemHostRegister_v2(static_cast<char*>(at) + 4096, 4096, 0) ==
          CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    CHECK(cuMemFreeHost(at) == CUDA_ERROR_INVALID_VALUE);
    CUdeviceptr device = 0;
    MUST(cuMemHostGetDevicePointer_v2(&device, at, 0));
    CHECK(device == address(at));
    uint32_t* host = static_cast<uint32_t*>(at);
    MUST(cuMemcpyDtoHAsync_v2(host, address(words.device()), 256, a));
    CHECK(host[0] == 0);
    MUST(cuStreamSynchronize(a));
    CHECK(host[0] == 3);
    // What the device may still write must not be given back.
    MUST(cuMemcpyDtoHAsync_v2(host, address(words.device()), 256, a));
    MUST(cuMemHostUnregister(at));
    CHECK(take_findings().find("freed with work pending") != std::string::npos);
    munmap(at, size);
    MUST(cuStreamDestroy_v2(a));
}

struct Shared {
    uint64_t turn[2];
    uint32_t words[2][64];
};

// Two processes hand a buffer to each other, round by round. One of them, after it has enqueued
// all, does nothing of the driver's for a while: its work has to go on.
int run_process(int self, Shared* shared) {
    constexpr uint32_t kRounds = 20;
    module();
    MUST(cuMemHostRegister_v2(shared, sizeof(Shared), 0));
    simt_seed(uint64_t(self) + 5);
    {
        const CUstream stream = new_stream();
        Buffer<uint32_t> words(64, 0);
        for (uint32_t round = 1; round <= kRounds; ++round) {
            const CUdeviceptr mine = address(&shared->turn[self]);
            const CUdeviceptr theirs = address(&shared->turn[1 - self]);
            if (self == 0) {
                MUST(cuMemcpyDtoHAsync_v2(shared->words[0], address(words.device()), 256, stream));
                MUST(cuStreamWriteValue64_v2(stream, mine, round, 0));
                MUST(cuStreamWaitValue64_v2(stream, theirs, round, 0));
                MUST(cuMemcpyHtoDAsync_v2(address(words.device()), shared->words[1], 256, stream));
            } else {
                MUST(cuStreamWaitValue64_v2(stream, theirs, round, 0));
                MUST(cuMemcpyHtoDAsync_v2(address(words.device()), shared->words[0], 256, stream));
                MUST(try_launch("add_one", 1, 64, 0, stream, words.device()));
                MUST(cuMemcpyDtoHAsync_v2(shared->words[1], address(words.device()), 256, stream));
                MUST(cuStreamWriteValue64_v2(stream, mine, round, 0));
            }
        }
        if (self == 1)
            while (__atomic_load_n(&shared->turn[1], __ATOMIC_ACQUIRE) < kRounds) sleep_ms(1);
        else if (shared->words[0][0] % 2)
            while (cuStreamQuery(stream) == CUDA_ERROR_NOT_READY) sleep_ms(1);
        MUST(cuStreamSynchronize(stream));
        CHECK(words.host() == std::vector<uint32_t>(64, kRounds));
        MUST(cuMemHostUnregister(shared));
        MUST(cuStreamDestroy_v2(stream));
    }
    return finish();
}

void check_processes() {
    void* at = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                    0);
    pid_t children[2];
    for (int self = 0; self < 2; ++self) {
        children[self] = fork();
        if (children[self] == 0) exit(run_process(self, static_cast<Shared*>(at)));
    }
    for (const pid_t child : children) {
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
    munmap(at, sizeof(Shared));
}

}  // namespace

int main() {
    // Before anything of the driver's: a child has no thread but the one that forked.
    check_processes();
    module();
    simt_quiet(1);
    CUcontext context;
    MUST(cuCtxGetCurrent(&context));
    check_order();
    check_comparisons();
    check_time();
    check_threads(context);
    check_release(context);
    check_registered();
    return finish();
}
