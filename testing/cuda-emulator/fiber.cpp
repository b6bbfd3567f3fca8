// The assembly of the switch, and the pool of stacks: as many as a block can have threads, mapped
// once.
#include "fiber.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__x86_64__)

asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");

#elif defined(__aarch64__)

asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, %function
simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size simt_switch, .-simt_switch
)");

#else
#error "the switch of fibers is written for x86-64 and aarch64"
#endif

namespace simt {

Stacks stacks;

namespace {

constexpr size_t kStack = 128 << 10, kGuard = 64 << 10, kThreads = 1024;

void map_stacks() {
    stacks.span = (kStack + kGuard) * kThreads;
    void* at = mmap(nullptr, stacks.span, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        perror("simt: stacks");
        abort();
    }
    stacks.begin = reinterpret_cast<uintptr_t>(at);
    for (size_t i = 0; i < kThreads; ++i)
        mprotect(static_cast<char*>(at) + i * (kStack + kGuard), kGuard, PROT_NONE);
}

}  // namespace

void* new_fiber(unsigned number, void (*entry)()) {
    if (stacks.begin == 0) map_stacks();
    uintptr_t* top =
        reinterpret_cast<uintptr_t*>(stacks.begin + (kStack + kGuard) * (number + size_t(1)));
#if defined(__x86_64__)
    // Stacks of several threads at the same offset would meet in one cache set: spread them.
    top -= number % 16 * 16;
    // A function is entered with the return address 8 below a multiple of 16.
    *--top = 0;
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
#else
    top -= 20;
    for (int i = 0; i < 20; ++i) top[i] = 0;
    top[11] = reinterpret_cast<uintptr_t>(entry);
#endif
    return top;
}

}  // namespace simt
