// Words in memory that streams write and wait for.
#pragma once

#include "stream.h"

namespace simt {

// A word's value as an operation wrote it, and what that operation came after.
struct Written {
    uint64_t value;
    std::vector<uint32_t> clock;
    uint64_t end;
};

// Whether the word has what a wait waits for.
bool is_satisfied(const Operation& wait);
// The write by a stream of this process that satisfied it first, or null.
const Written* written_for(const Operation& wait);
// Adds the enqueued writes that would satisfy a wait.
void add_writers(const Operation& wait, std::vector<const Operation*>& to);
// A write has run.
void note_written(const OperationPointer& write);
// Memory is freed: what was written there says nothing of what will be.
void forget_words(uintptr_t begin, uintptr_t end);

}  // namespace simt
