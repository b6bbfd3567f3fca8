// One block of a launch: its threads as fibers, its barriers, its shared memory.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "pfc_host_device.h"
#include "shadow.h"

namespace simt {

struct Launch {
    const Kernel* kernel;
    std::vector<unsigned char> parameters;
    unsigned grid, block;
    size_t shared;
    uint32_t operation;
};

// Runs all blocks, in a seeded order, up to the first finding.
void run_launch(const Launch& launch);

// For what a thread does (hooks.cpp, models.cpp).
struct SharedMemory {
    uintptr_t range_begin = 0;  // reserved for shared memory, in a block's window or not
    size_t range_span = 0;
    uintptr_t begin = 0;        // the window of this block
    size_t size = 0;
    Cell* cells = nullptr;
};
extern SharedMemory shared_memory;

struct Copy {
    void* to;
    const void* from;  // null: zeros
    bool landed;       // its bytes were taken at issue
    unsigned char bytes[16];
    uint32_t group;
};

struct Thread {
    void* stack;
    const char* waits_for;  // null: it runs, or has exited
    int barrier;
    bool exited;
    uint32_t groups;        // of asynchronous copies, committed
    std::vector<Copy> copies;
};

// The thread that runs, or null outside of kernels.
Thread* current_thread();

// A finding at the current thread; gives the block up and does not return.
[[noreturn]] void fault(const std::string& text);

// All 32 threads of the warp come with the same `model`; the last calls it with what each brought.
using Model = void (*)(void* const* lanes);
void meet_warp(const char* name, Model model, void* mine);
// The warp's clock moves: what its threads did before comes before what they do after.
void join_warp();

}  // namespace simt
