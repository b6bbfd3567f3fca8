// What tests plan and what the stand-in found; standin.h has the functions that they call.
#pragma once

#include <stdint.h>

#include <string>

namespace standin {

struct Fault {
    int kind = 0;  // of standin.h's; 0: none
    int value = 0;
};

// The fault that is planned for a rank's operation, which is taken off the plan.
Fault take_fault(int rank, int operation);

int polls_in_progress();
bool tells();
uint64_t slot_bytes();
int version();

void finding(const std::string& text);
void note_operation(int rank);
void note_live(int change);

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace standin
