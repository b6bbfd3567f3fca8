// What the emulator found wrong, and the seeded choices that it makes.
//
// Everything in here and in the other files of the emulator runs under one lock (driver.h), so that
// nothing is atomic.
#pragma once

#include <stdint.h>

#include <string>

namespace simt {

// Notes a finding: to stderr, to the report, and as the context's error from now on.
void finding(const std::string& text);
// Whether findings are kept from stderr.
bool is_quiet();
// Whether a finding has broken the context.
bool broken();

// A number below `limit` (at least 1).
uint32_t choose(uint32_t limit);
uint64_t current_seed();

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
