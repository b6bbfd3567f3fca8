// The scheduler: which thread goes on when one has to wait, and what a block's threads wait for.
//
// A warp runs until all its threads wait, now and then another is taken before; both by the seed.
#include "block.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>

#include "fiber.h"
#include "findings.h"

simt::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

SharedMemory shared_memory;

namespace {

constexpr unsigned kWarps = 32, kThreads = 1024, kBarriers = 16;
constexpr size_t kShared = 256 << 10;

struct Warp {
    uint32_t ready;        // threads that can go on, as bits
    uint32_t rotation;     // which of them comes first
    bool down;             // and in which direction
    unsigned arrived;      // at the collective below
    const char* name;
    Model model;
    void* brought[32];
};

struct Barrier {
    unsigned arrived, needed;
    uint32_t warps;        // that came, as bits
    uint32_t waiting[kWarps];
};

const Launch* launch;
Thread threads[kThreads];
Warp warps[kWarps];
Barrier barriers[kBarriers];
uint32_t clocks[kWarps][kWarps];  // [w][v]: the latest clock of warp v that w has seen
uint32_t ready_warps;
unsigned warp_count, current, exited;
bool running, given_up;
void* host_stack;

void set_stamp() {
    const unsigned w = current / 32;
    accessor.stamp = make_stamp(launch->operation, blockIdx.x, current, clocks[w][w]);
    accessor.clocks = clocks[w];
}

// The thread that goes on, or kThreads where all wait.
unsigned next_thread() {
    unsigned w = current / 32;
    if (warps[w].ready == 0 || choose(32) == 0) {
        if (ready_warps == 0) return kThreads;
        uint32_t left = ready_warps;
        for (uint32_t skip = choose(uint32_t(__builtin_popcount(left))); skip > 0; --skip)
            left &= left - 1;
        w = unsigned(__builtin_ctz(left));
    }
    const Warp& warp = warps[w];
    const unsigned r = warp.rotation;
    const uint32_t turned = r ? warp.ready >> r | warp.ready << (32 - r) : warp.ready;
    const unsigned first = warp.down ? 31u - unsigned(__builtin_clz(turned))
        : unsigned(__builtin_ctz(turned));
    return w * 32 + (first + r) % 32;
}

void set_ready(unsigned w, uint32_t lanes) {
    Warp& warp = warps[w];
    warp.ready |= lanes;
    const uint32_t order = choose(64);
    warp.rotation = order % 32;
    warp.down = order / 32;
    ready_warps |= 1u << w;
    for (; lanes; lanes &= lanes - 1)
        threads[w * 32 + unsigned(__builtin_ctz(lanes))].waits_for = nullptr;
}

// Leaves the current thread, which is not ready, for another.
void leave() {
    Warp& warp = warps[current / 32];
    warp.ready &= ~(1u << current % 32);
    if (warp.ready == 0) ready_warps &= ~(1u << current / 32);
    void** from = &threads[current].stack;
    const unsigned next = next_thread();
    if (next == kThreads) {
        simt_switch(from, host_stack);
        return;
    }
    current = next;
    threadIdx.x = next;
    set_stamp();
    simt_switch(from, threads[next].stack);
}

void wait(const char* what, int barrier = -1) {
    threads[current].waits_for = what;
    threads[current].barrier = barrier;
    leave();
}

void enter() {
    launch->kernel->call(launch->kernel->function, launch->parameters.data());
    threads[current].exited = true;
    ++exited;
    leave();
    abort();
}

void join_warps(uint32_t met) {
    uint32_t joined[kWarps] = {};
    for (uint32_t left = met; left; left &= left - 1) {
        const unsigned w = unsigned(__builtin_ctz(left));
        for (unsigned v = 0; v < warp_count; ++v) joined[v] = std::max(joined[v], clocks[w][v]);
    }
    for (uint32_t left = met; left; left &= left - 1) ++joined[__builtin_ctz(left)];
    for (uint32_t left = met; left; left &= left - 1)
        memcpy(clocks[__builtin_ctz(left)], joined, sizeof joined);
}

void meet_barrier(const char* name, int id, unsigned needed) {
    Barrier& barrier = barriers[id];
    if (barrier.arrived > 0 && barrier.needed != needed)
        fault(format("barrier %d is met by %u threads here and by %u elsewhere", id, needed,
                     barrier.needed));
    const unsigned w = current / 32;
    barrier.needed = needed;
    barrier.warps |= 1u << w;
    barrier.waiting[w] |= 1u << current % 32;
    if (++barrier.arrived < needed) return wait(name, id);
    // Whole warps arrive: the instruction counts 32 threads for each that comes.
    for (uint32_t left = barrier.warps; left; left &= left - 1)
        if (barrier.waiting[__builtin_ctz(left)] != 0xffffffffu)
            fault(format("divergence: barrier %d of %u threads is met by a part of warp %d", id,
                         needed, __builtin_ctz(left)));
    const Barrier met = barrier;
    barrier = Barrier{};
    join_warps(met.warps);
    for (uint32_t left = met.warps; left; left &= left - 1) {
        const unsigned v = unsigned(__builtin_ctz(left));
        set_ready(v, v == w ? met.waiting[v] & ~(1u << current % 32) : met.waiting[v]);
    }
    warps[w].ready |= 1u << current % 32;
    set_stamp();
}

std::string where() {
    return format("kernel %s, block %u of %u", launch->kernel->name, blockIdx.x, launch->grid);
}

// "0-30, 32"
std::string list(const std::vector<unsigned>& numbers) {
    std::string text;
    for (size_t i = 0, j; i < numbers.size(); i = j) {
        for (j = i + 1; j < numbers.size() && numbers[j] == numbers[j - 1] + 1; ++j) {}
        if (!text.empty()) text += ", ";
        text += std::to_string(numbers[i]);
        if (j > i + 1) text += "-" + std::to_string(numbers[j - 1]);
    }
    return text;
}

void report_deadlock() {
    std::string text = "deadlock in " + where() + ":";
    std::vector<unsigned> gone;
    std::vector<std::pair<std::string, std::vector<unsigned>>> waits;
    for (unsigned t = 0; t < launch->block; ++t) {
        if (threads[t].exited) {
            gone.push_back(t);
            continue;
        }
        std::string what = threads[t].waits_for;
        if (threads[t].barrier >= 0) {
            const Barrier& barrier = barriers[threads[t].barrier];
            what += format(" (%u of %u came)", barrier.arrived, barrier.needed);
        } else {
            what += format(" (%u of the 32 of warp %u came)", warps[t / 32].arrived, t / 32);
        }
        if (waits.empty() || waits.back().first != what) waits.push_back({what, {}});
        waits.back().second.push_back(t);
    }
    for (auto& w : waits) text += " threads " + list(w.second) + " wait at " + w.first + ";";
    if (!gone.empty()) text += " threads " + list(gone) + " have exited;";
    text.back() = '.';
    finding(text);
}

void prepare_shared(size_t size) {
    SharedMemory& s = shared_memory;
    if (s.range_begin == 0) {
        s.range_span = kShared;
        void* at = mmap(nullptr, kShared, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
            0);
        void* cells = mmap(nullptr, kShared / 4 * sizeof(Cell), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || cells == MAP_FAILED) abort();
        s.range_begin = reinterpret_cast<uintptr_t>(at);
        s.cells = static_cast<Cell*>(cells);
    }
    // Not at the range's begin, so that an access before the window is seen as one to shared
    // memory.
    s.begin = s.range_begin + 1024 + (current_seed() % 2 ? 16 : 0);
    s.size = size;
    memset(reinterpret_cast<void*>(s.begin), 0xff, size);
    memset(s.cells + (s.begin - s.range_begin) / 4, 0, (size + 3) / 4 * sizeof(Cell));
}

void run_block(unsigned index) {
    blockIdx = {index, 0, 0};
    blockDim = {launch->block, 1, 1};
    gridDim = {launch->grid, 1, 1};
    threadIdx = {0, 0, 0};
    warp_count = launch->block / 32;
    memset(warps, 0, sizeof warps);
    memset(barriers, 0, sizeof barriers);
    memset(clocks, 0, sizeof clocks);
    ready_warps = 0;
    exited = 0;
    given_up = false;
    prepare_shared(launch->shared);
    for (unsigned t = 0; t < launch->block; ++t) {
        Thread& thread = threads[t];
        thread.stack = new_fiber(t, &enter);
        thread.waits_for = nullptr;
        thread.exited = false;
        thread.groups = 0;
        thread.copies.clear();
    }
    for (unsigned w = 0; w < warp_count; ++w) {
        clocks[w][w] = 1;
        set_ready(w, 0xffffffffu);
    }
    current = choose(warp_count) * 32;
    current = next_thread();
    threadIdx.x = current;
    set_stamp();
    running = true;
    simt_switch(&host_stack, threads[current].stack);
    running = false;
    if (!given_up && exited < launch->block) report_deadlock();
}

}  // namespace

void run_launch(const Launch& l) {
    launch = &l;
    std::vector<unsigned> order(l.grid);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[choose(uint32_t(i))]);
    for (unsigned index : order) {
        run_block(index);
        if (broken()) return;
    }
}

Thread* current_thread() { return running ? &threads[current] : nullptr; }

void fault(const std::string& text) {
    finding(text + format("; thread %u of ", current) + where());
    given_up = true;
    simt_switch(&threads[current].stack, host_stack);
    abort();
}

void meet_warp(const char* name, Model model, void* mine) {
    Warp& warp = warps[current / 32];
    const unsigned lane = current % 32;
    if (warp.arrived > 0 && warp.model != model)
        fault(format("divergence: a warp's threads meet at %s and at %s", warp.name, name));
    warp.name = name;
    warp.model = model;
    warp.brought[lane] = mine;
    if (++warp.arrived < 32) return wait(name);
    warp.arrived = 0;
    model(warp.brought);
    const unsigned w = current / 32;
    set_ready(w, ~(1u << lane));
    warp.ready |= 1u << lane;
    set_stamp();
}

void join_warp() { ++clocks[current / 32][current / 32]; }

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(shared_memory.begin); }

void named_barrier(int id, int count) {
    if (id < 1 || id >= int(kBarriers))
        fault(format("barrier %d: a named barrier's id is 1 to 15", id));
    if (count < 32 || count % 32 != 0 || count > int(launch->block))
        fault(format("barrier %d of %d threads: a multiple of 32 up to the block's %u", id, count,
                     launch->block));
    meet_barrier("named_barrier", id, unsigned(count));
}

}  // namespace simt

void __syncthreads() { simt::meet_barrier("__syncthreads", 0, simt::launch->block); }
