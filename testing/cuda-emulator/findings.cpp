// Findings are kept as lines of text until a test forgives them; choices come from a xorshift
// generator.
#include "findings.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "driver.h"
#include "simt.h"
#include "stream.h"

namespace simt {
namespace {

std::string report;
bool quiet;
uint64_t seed = 1;
uint64_t state = 0x9e3779b97f4a7c15u;

}  // namespace

void finding(const std::string& text) {
    if (!quiet) fprintf(stderr, "simt: %s\n", text.c_str());
    report += text;
    report += '\n';
}

bool is_quiet() { return quiet; }

bool broken() { return !report.empty(); }

uint32_t choose(uint32_t limit) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t((state >> 32) * limit >> 32);
}

uint64_t current_seed() { return seed; }

std::string format(const char* pattern, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(text, sizeof text, pattern, arguments);
    va_end(arguments);
    return text;
}

}  // namespace simt

extern "C" {

void simt_seed(uint64_t seed) {
    simt::Lock lock;
    simt::seed = seed;
    simt::state = (seed + 1) * 0x9e3779b97f4a7c15u;
    if (simt::state == 0) simt::state = 1;
    for (int i = 0; i < 8; ++i) simt::choose(2);
}

size_t simt_report(char* buffer, size_t size) {
    simt::Lock lock;
    if (buffer && size > 0) snprintf(buffer, size, "%s", simt::report.c_str());
    return simt::report.size();
}

void simt_quiet(int quiet) {
    simt::Lock lock;
    simt::quiet = quiet != 0;
}

void simt_forgive(void) {
    simt::Lock lock;
    // What is in the queues was enqueued in a broken context: it must not run in a sound one.
    if (simt::broken()) simt::complete_all();
    simt::report.clear();
}

}  // extern "C"
