// Switching between the stacks of a block's threads.
//
// A switch saves what a C call must preserve and no more: about 2 ns, where ucontext makes a system
// call.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

// Where a thread's stack is. The stacks lie side by side, a guard page below each.
struct Stacks {
    uintptr_t begin = 0;
    size_t span = 0;
};
extern Stacks stacks;

// Makes a stack for thread `number` that enters `entry`, which must not return; its stack pointer.
void* new_fiber(unsigned number, void (*entry)());

// Saves the caller's stack pointer and goes on where `to` was saved.
extern "C" void simt_switch(void** from, void* to);

}  // namespace simt
