// What the files of the fuzzer share; main.c says what it does.
#ifndef FUZZ_H
#define FUZZ_H

#define _GNU_SOURCE
#include <math.h>
#include <partialfc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_RANKS = 4 };

////////////////////////////////////////////////////////////////////////////////////////////////////
// Draws: all of an episode comes from its seed.

struct draws {
  uint64_t state;
};
uint64_t draw(struct draws *d);
uint64_t below(struct draws *d, uint64_t n);
int chance(struct draws *d, int permille);
double unit(struct draws *d);
#define ONE_OF(d, type, ...) \
  (((type[]){__VA_ARGS__})[below(d, sizeof((type[]){__VA_ARGS__}) / sizeof(type))])

////////////////////////////////////////////////////////////////////////////////////////////////////
// Findings. The last calls of a thread are told with what they led to.

enum mode { SINGLE, RANKS, CUSTOM, LIES, KERNELS, MODES };
extern const char *const mode_names[MODES];

// The episode that this thread is in.
struct episode {
  enum mode mode;
  uint64_t seed;
  // Permille of the calls that have a mistake on one rank; 0: every call must succeed.
  int mistakes;
  int rank;
};
extern __thread struct episode now;
// Memory without zones about it, for a sanitizer or valgrind to see the first byte too many.
extern int exact;
// What is called is printed.
extern int verbose;

void note(const char *format, ...);
void finding(const char *format, ...);
long findings(void);
// Counts a call and judges its status, which it returns.
pfc_status did(const char *call, pfc_status status);
// Counts a call that has no status.
void called(const char *call);
long calls(void);
void print_calls(void);
#define DO(function, ...) did(#function, function(__VA_ARGS__))
#define DO_OTHER(function, arguments) (called(#function), function arguments)

////////////////////////////////////////////////////////////////////////////////////////////////////
// Memory of exactly the bytes that a call may touch, and a copy of what it held.

struct block {
  unsigned char *data, *base, *copy;
  size_t bytes;
};
struct block block_of(size_t bytes, int fill);
void keep(struct block *b);
int is_kept(const struct block *b);
void drop(struct block *b);

// A matrix, whose rows may have gaps between them.
struct grid {
  pfc_matrix m;
  struct block memory;
  uint64_t rows, cols, stride;
  size_t size;
};
size_t size_of(int32_t dtype);
struct grid grid_of(struct draws *d, uint64_t rows, uint64_t cols, int only_f32, int wild);
int gaps_are_kept(const struct grid *g);
int is_finite(const struct grid *g);
void drop_grid(struct grid *g);
// Makes a mistake that is seen without touching the memory. `rows_count`: the rows are compared
// with another argument or a limit. Returns whether the call must fail.
int spoil(struct draws *d, struct grid *g, int rows_count);

////////////////////////////////////////////////////////////////////////////////////////////////////

// Communicators of the caller's functions, for n threads. `failing`, `lying`: permille of calls.
void custom_comms(struct draws *d, int n, int failing, int lying, pfc_comm **out);
void refused_comms(struct draws *d);

// Options of a head for n ranks that all of them accept.
pfc_head_options options_of(struct draws *d, int n);
// A folder of this process for the rows of heads that have them in files.
const char *folder_of_rows(void);
// Makes a mistake in them; whether pfc_head_create must fail.
int spoil_options(struct draws *d, pfc_head_options *o);

void episode_of_heads(enum mode mode, uint64_t seed);
void episode_of_kernels(uint64_t seed);

#endif
