// What is known about each word of device and shared memory: which bytes were written, by whom
// last, and who has read since.
//
// An access is named by a stamp: the operation on a stream that it belongs to, the block, the
// thread, and that thread's warp's clock. A clock advances when the warp meets others at a barrier
// (or itself at sync_warp), where the clocks that the warps have seen of each other are joined. One
// access comes before another when the later thread has seen a later clock; two that touch a byte,
// one of them writing, neither before the other, are a race, in whatever order they happened to
// run.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

using Stamp = uint64_t;  // operation 22 bits, block 14, thread 10, clock 18; 0: nobody

struct Cell {
    Stamp write;
    Stamp read[2];         // two readers since the write, of different warps where there are
    uint8_t written;       // bytes, as bits, that have a value
    uint8_t write_bytes;   // bytes of `write`
    uint8_t read_bytes[2];
    // Bit 0: `write` is atomic; bits 1 and 2: read[0] and read[1] are no reads but atomic writes,
    // or writes of other bytes than `write`.
    uint8_t atomic;
    uint8_t reserved;
    uint16_t pending;      // 1 + the thread whose copy_async_16 is under way here
};
static_assert(sizeof(Cell) == 32, "device memory's shadow is 8 times its size");

enum class Access { kRead, kWrite, kAtomic };

// Who accesses memory now.
struct Accessor {
    Stamp stamp;
    const uint32_t* clocks;         // what this thread's warp has seen of each warp of its block
    const uint32_t* operations;     // what this operation comes after: a count for each stream
    size_t streams;
};
extern Accessor accessor;

Stamp make_stamp(uint32_t operation, uint32_t block, uint32_t thread, uint32_t clock);
// Operation `id` (its low 22 bits in stamps) is number `count` of the stream at `slot`.
void name_operation(uint32_t id, uint32_t slot, uint32_t count);

// Whether cells are right: a kernel without hooks leaves no notes in them.
extern bool cells_checked;

// What is wrong with an access, or null. The cell takes note of it.
const char* touch(Cell& cell, uint8_t bytes, Access access);
// What a conflict was with, for the text of a finding.
struct Conflict {
    Stamp other;
    bool other_writes;
};
extern Conflict conflict;

inline uint32_t stamp_thread(Stamp s) { return s >> 18 & 1023; }
inline uint32_t stamp_block(Stamp s) { return s >> 28 & 16383; }
inline uint32_t stamp_operation(Stamp s) { return uint32_t(s >> 42); }
inline uint32_t stamp_clock(Stamp s) { return s & 0x3ffff; }

}  // namespace simt
