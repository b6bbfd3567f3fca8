// Calls all functions of the library at random, rightly and wrongly, and judges each call: its
// status is a known one and not PANIC, a failure has a text and leaves the outputs as they were,
// nothing is written beside an output, what is wrong is refused, and where nobody makes a mistake
// every call succeeds, with numbers that are finite and equal on all ranks. An episode is its mode
// and its seed.
//
//   fuzz MODE [--seed S] [--episodes N] [--seconds T] [--exact] [--verbose] [--calls]
//
// MODE: single (one rank), ranks (2 to 4 threads), custom (the same over functions of the caller,
// which may fail), lies (over functions that bring back other bytes than were sent), kernels
// (without a head, and the plan), or soak: heads of all kinds for T seconds, with memory that may
// not grow.
//
// --exact leaves out the zones about buffers, for a sanitizer or valgrind to see the first byte too
// many. --calls prints how often each function was called. An episode that takes minutes ends the
// program: it hangs.
#include "fuzz.h"

#include <time.h>
#include <unistd.h>

// Longer than any episode takes on a machine that is busy.
enum { HANG_SECONDS = 240 };

static volatile long begun;
static volatile uint64_t current;
static enum mode mode;

static long seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (long)t.tv_sec;
}

static void *watch(void *nothing) {
  for (;;) {
    sleep(1);
    if (seconds() - begun > HANG_SECONDS) {
      fprintf(stderr, "HANG %s %llu\n", mode_names[mode], (unsigned long long)current);
      abort();
    }
  }
  return nothing;
}

static long resident_kb(void) {
  long pages = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (file == NULL || fscanf(file, "%*s %ld", &pages) != 1) pages = 0;
  if (file != NULL) fclose(file);
  return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void episode(uint64_t seed) {
  begun = seconds();
  current = seed;
  if (mode == KERNELS) {
    episode_of_kernels(seed);
  } else {
    episode_of_heads(mode, seed);
  }
}

int main(int argc, char **argv) {
  uint64_t seed = 1;
  long episodes = 1000000000, longest = 1000000000, done = 0, early = 0;
  int soak = argc > 1 && strcmp(argv[1], "soak") == 0, table = 0;
  mode = soak ? SINGLE : MODES;
  for (int i = 0; i < MODES && argc > 1; i++)
    if (strcmp(argv[1], mode_names[i]) == 0) mode = (enum mode)i;
  for (int i = 2; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (strcmp(argv[i], "--exact") == 0) {
      exact = 1;
    } else if (strcmp(argv[i], "--verbose") == 0) {
      verbose = 1;
    } else if (strcmp(argv[i], "--calls") == 0) {
      table = 1;
    } else if (strcmp(argv[i], "--seed") == 0) {
      seed = strtoull(value, NULL, 10), i++;
    } else if (strcmp(argv[i], "--episodes") == 0) {
      episodes = atol(value), i++;
    } else if (strcmp(argv[i], "--seconds") == 0) {
      longest = atol(value), i++;
    } else {
      mode = MODES;
    }
  }
  if (mode == MODES) {
    fprintf(stderr, "fuzz single|ranks|custom|lies|kernels|soak [--seed S] [--episodes N]"
                    " [--seconds T] [--exact] [--verbose] [--calls]\n");
    return 2;
  }
  pthread_t watcher;
  begun = seconds();
  if (pthread_create(&watcher, NULL, watch, NULL) != 0) return 2;
  struct draws turn = {seed};
  long start = seconds();
  for (; done < episodes && seconds() - start < longest; done++) {
    // A soak is episodes of all kinds in turn, of those that tell no lies.
    if (soak) mode = ONE_OF(&turn, enum mode, SINGLE, RANKS, CUSTOM);
    episode(seed + (uint64_t)done);
    if (seconds() - start <= longest / 5 || done < episodes / 5) early = resident_kb();
  }
  begun = seconds() + 1000000;
  long resident = resident_kb();
  // What the C library keeps of freed memory grows a little at first.
  if (soak && resident > early + early / 4 + 4096) {
    printf("memory grew from %ld kB to %ld kB\n", early, resident);
    return 1;
  }
  if (table) print_calls();
  unsigned long long last = (unsigned long long)(seed + (uint64_t)done - 1);
  printf("%s: seeds %llu to %llu, %ld calls, %ld findings, %ld kB, %ld kB after a fifth, %ld s\n",
         argv[1], (unsigned long long)seed, last, calls(), findings(), resident, early,
         seconds() - start);
  return findings() > 0;
}
