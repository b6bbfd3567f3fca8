// Several host threads, as the ranks of one process: each with its own streams, meeting in host
// functions and by events.
#include "harness.h"

#include <atomic>
#include <thread>

namespace {

constexpr int kRanks = 4;

// A host function that returns when all ranks' have come: the emulator must not hold its lock.
struct Meeting {
    std::atomic<int> arrived{0};
};

void meet(void* data) {
    Meeting& meeting = *static_cast<Meeting*>(data);
    ++meeting.arrived;
    while (meeting.arrived < kRanks) std::this_thread::yield();
}

void run_rank(int rank, CUcontext context, Meeting* meetings, int rounds) {
    MUST(cuCtxSetCurrent(context));
    CUstream main, side;
    CUevent event;
    MUST(cuStreamCreate(&main, CU_STREAM_NON_BLOCKING));
    MUST(cuStreamCreateWithPriority(&side, CU_STREAM_NON_BLOCKING, -1));
    MUST(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    {
        Buffer<uint32_t> words(64, 0);
        for (int round = 0; round < rounds; ++round) {
            MUST(try_launch("set_words", 1, 64, 0, main, words.device(), uint32_t(rank + round)));
            MUST(cuLaunchHostFunc(main, &meet, &meetings[round]));
            MUST(cuEventRecord(event, main));
            MUST(cuStreamWaitEvent(side, event, 0));
            MUST(try_launch("add_one", 1, 64, 0, side, words.device()));
            MUST(cuEventRecord(event, side));
            MUST(cuEventSynchronize(event));
            std::vector<uint32_t> host(64);
            MUST(cuMemcpyDtoHAsync_v2(host.data(), CUdeviceptr(words.device()), 256, main));
            CHECK(host == std::vector<uint32_t>(64, uint32_t(rank + round + 1)));
        }
    }
    MUST(cuEventDestroy_v2(event));
    MUST(cuStreamDestroy_v2(main));
    MUST(cuStreamDestroy_v2(side));
}

}  // namespace

int main() {
    constexpr int kRounds = 20;
    module();
    CUcontext context;
    MUST(cuCtxGetCurrent(&context));
    for (uint64_t seed = 1; seed <= 20; ++seed) {
        simt_seed(seed);
        std::vector<Meeting> meetings(kRounds);
        std::vector<std::thread> ranks;
        for (int rank = 0; rank < kRanks; ++rank)
            ranks.emplace_back(run_rank, rank, context, meetings.data(), kRounds);
        for (auto& rank : ranks) rank.join();
    }
    return finish();
}
