// One lock for all of it. It is never taken down: threads of the stand-in may outlive main.
#include "plan.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "standin.h"

namespace standin {
namespace {

struct Planned {
    int rank, operation;
    Fault fault;
};

struct Knobs {
    int version = 23203, polls = 0;
    bool tell = false;
    uint64_t slot = 4 << 20;
};

struct All {
    std::mutex mutex;
    Knobs knobs;
    std::vector<Planned> plan;
    std::map<int, uint64_t> operations;
    std::string report;
    bool quiet = false;
    int live = 0;
};

const char* const kFaults[] = {"", "enqueue", "async", "hang", "delay", "wrong", "short"};

[[noreturn]] void refuse(const char* name, const char* text) {
    fprintf(stderr, "standin: %s is \"%s\"; see testing/nccl-standin/standin.h\n", name, text);
    abort();
}

int fault_named(const std::string& name) {
    for (int kind = STANDIN_ENQUEUE; kind <= STANDIN_SHORT; ++kind)
        if (name == kFaults[kind]) return kind;
    return 0;
}

// As standin.h has them, separated by commas. What cannot be read ends the program: a test would
// believe that its fault was harmless.
void read_plan(const char* text, std::vector<Planned>& plan) {
    const std::string all = text;
    for (size_t begin = 0; begin < all.size();) {
        const size_t end = std::min(all.find(',', begin), all.size());
        const std::string one = all.substr(begin, end - begin);
        Planned planned{};
        char name[16];
        int length = 0;
        if (sscanf(one.c_str(), "%d:%d:%15[a-z]:%d%n", &planned.rank, &planned.operation, name,
                   &planned.fault.value, &length) != 4 || size_t(length) != one.size())
            refuse("PFC_STANDIN_PLAN", text);
        planned.fault.kind = fault_named(name);
        if (planned.fault.kind == 0) refuse("PFC_STANDIN_PLAN", text);
        plan.push_back(planned);
        begin = end + 1;
    }
}

All& all() {
    static All* const made = [] {
        All* fresh = new All;
        auto number = [](const char* name, uint64_t unless) {
            const char* text = getenv(name);
            if (!text || !*text) return unless;
            char* end;
            const uint64_t read = strtoull(text, &end, 10);
            if (*end) refuse(name, text);
            return read;
        };
        Knobs& knobs = fresh->knobs;
        knobs.version = int(number("PFC_STANDIN_VERSION", uint64_t(knobs.version)));
        knobs.polls = int(number("PFC_STANDIN_PROGRESS", 0));
        knobs.tell = number("PFC_STANDIN_TELL", 0) != 0;
        knobs.slot = number("PFC_STANDIN_SLOT", knobs.slot);
        if (const char* text = getenv("PFC_STANDIN_PLAN")) read_plan(text, fresh->plan);
        return fresh;
    }();
    return *made;
}

// The lock, and what it guards.
class Locked {
public:
    All* operator->() { return &all_; }

private:
    All& all_ = all();
    std::lock_guard<std::mutex> guard_{all_.mutex};
};

}  // namespace

Fault take_fault(int rank, int operation) {
    Locked a;
    for (auto i = a->plan.begin(); i != a->plan.end(); ++i) {
        if ((i->rank >= 0 && i->rank != rank) || i->operation != operation) continue;
        const Fault fault = i->fault;
        a->plan.erase(i);
        return fault;
    }
    return {};
}

int polls_in_progress() { return Locked()->knobs.polls; }
bool tells() { return Locked()->knobs.tell; }
uint64_t slot_bytes() { return Locked()->knobs.slot; }
int version() { return Locked()->knobs.version; }

void finding(const std::string& text) {
    Locked a;
    if (!a->quiet) fprintf(stderr, "standin: %s\n", text.c_str());
    a->report += text + '\n';
}

void note_operation(int rank) { ++Locked()->operations[rank]; }
void note_live(int change) { Locked()->live += change; }

std::string format(const char* pattern, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(text, sizeof text, pattern, arguments);
    va_end(arguments);
    return text;
}

}  // namespace standin

using namespace standin;

extern "C" {

void standin_version(int version) { Locked()->knobs.version = version; }

void standin_reset(void) {
    Locked a;
    a->knobs = Knobs();
    a->plan.clear();
    a->operations.clear();
    a->report.clear();
    a->quiet = false;
}

void standin_plan(int rank, int operation, int fault, int value) {
    Locked()->plan.push_back({rank, operation, {fault, value}});
}

void standin_in_progress(int polls) { Locked()->knobs.polls = polls; }
void standin_tell(int tell) { Locked()->knobs.tell = tell != 0; }
void standin_slot(uint64_t bytes) { Locked()->knobs.slot = bytes; }
void standin_quiet(int quiet) { Locked()->quiet = quiet != 0; }
int standin_live(void) { return Locked()->live; }
uint64_t standin_operations(int rank) { return Locked()->operations[rank]; }

size_t standin_findings(char* buffer, size_t size) {
    Locked a;
    if (buffer && size > 0) snprintf(buffer, size, "%s", a->report.c_str());
    return a->report.size();
}

}  // extern "C"
