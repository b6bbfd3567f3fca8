/*
 * A thread_local object of a C++ program whose destructor calls the library, and one that is destroyed after what the library keeps
 * for the thread.
 *
 *   c++ -std=c++17 ending_thread.cpp -lpartialfc -lm -pthread && ./a.out
 */
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "partialfc.h"

namespace {

std::atomic<int> failures{0}, destroyed{0};

void expect(int line, const char *text, bool holds) {
  if (!holds) {
    std::fprintf(stderr, "ending_thread.cpp:%d: %s; \"%s\"\n", line, text, pfc_last_error());
    failures++;
  }
}

#define EXPECT(condition) expect(__LINE__, #condition, condition)

struct Trainer {
  pfc_comm *comm = nullptr;

  Trainer() { EXPECT(pfc_comm_self(&comm) == PFC_OK); }
  ~Trainer() {
    std::int64_t number = 1;
    const int no_type = 99;
    EXPECT(pfc_comm_all_reduce(comm, &number, &number, 1, no_type, PFC_SUM) ==
           PFC_ERROR_INVALID_ARGUMENT);
    EXPECT(std::strstr(pfc_last_error(), "dtype must be") != nullptr);
    char copy[256];
    EXPECT(pfc_last_error_copy(copy, sizeof copy) == std::strlen(copy) + 1);
    EXPECT(std::strcmp(copy, pfc_last_error()) == 0);
    pfc_comm_free(comm);
    destroyed++;
  }
};

/* Objects are destroyed in the reverse order of their making: before and after whatever the library makes for its first error. */
void before_the_first_error() {
  thread_local Trainer trainer;
  EXPECT(pfc_comm_barrier(nullptr) == PFC_ERROR_INVALID_ARGUMENT);
}

void after_the_first_error() {
  EXPECT(pfc_comm_barrier(nullptr) == PFC_ERROR_INVALID_ARGUMENT);
  thread_local Trainer trainer;
}

}  // namespace

int main() {
  std::thread(before_the_first_error).join();
  std::thread(after_the_first_error).join();
  EXPECT(destroyed == 2);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
