// One rank of an episode of heads: steps.c has its steps, heads.c all else.
#ifndef FUZZ_HEADS_H
#define FUZZ_HEADS_H

#include "fuzz.h"

enum { LOSSES = 64 };

// One rank of an episode.
struct rank {
  struct draws common, own;
  int index, ranks, mistakes, operations, free_comm_first;
  pfc_comm *comm;
  pfc_device *device;
  pfc_head *head;
  pfc_head_options options;
  pthread_t thread;
  // What must be equal on all ranks where there are no mistakes.
  double losses[LOSSES];
  int steps;
  uint64_t centers;
};

// Whether this call is to be a mistake; `part`: one in so many of those that may.
int mistake(struct rank *r, int part);

// Where nobody makes one, every call succeeds.
void must_succeed(const struct rank *r, const char *call, pfc_status status);
void must_fail(const char *call, pfc_status status);
void must_be_kept(const char *call, pfc_status status, const struct block *output);

// A learning rate that is a mistake, or 0.
double rate_of(struct rank *r);
// Forward, backward and update in one call.
void whole_step(struct rank *r, double rate);
// The same in several; `kept`: with an accumulation before the update.
void parts_of_a_step(struct rank *r, int prepare, double rate, double weight, int update,
                     double factor, int kept);

#endif
