/*
 * What two ranks see when one of them is wrong: an error on both, never a wait without end.
 *
 *   cc -std=c99 errors_ranks.c -lpartialfc -lm -pthread && ./a.out
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "partialfc.h"

enum { RANKS = 2, CLASSES = 50, DIM = 8, BATCH = 4 };

/* One rank's thread: what to do, and what came of it. */
struct rank {
  void (*scene)(struct rank *self);
  pfc_comm *comm;
  uint32_t number;
  pfc_head *head;
  pfc_status status;
  char message[512];
};

static int failures;

static void *play(void *argument) {
  struct rank *self = argument;
  self->scene(self);
  pfc_last_error_copy(self->message, sizeof self->message); /* it is this thread's */
  pfc_head_free(self->head);
  return NULL;
}

/* Plays a scene on all ranks; the statuses and messages are left in ranks. */
static void act(void (*scene)(struct rank *), struct rank ranks[RANKS]) {
  pfc_comm *comms[RANKS];
  pthread_t threads[RANKS];
  uint32_t r;
  if (pfc_comm_threads(RANKS, comms) != PFC_OK) {
    failures++;
    return;
  }
  memset(ranks, 0, RANKS * sizeof ranks[0]);
  for (r = 0; r < RANKS; r++) {
    ranks[r].scene = scene;
    ranks[r].comm = comms[r];
    ranks[r].number = r;
    pthread_create(&threads[r], NULL, play, &ranks[r]);
  }
  for (r = 0; r < RANKS; r++) pthread_join(threads[r], NULL);
  for (r = 0; r < RANKS; r++) pfc_comm_free(comms[r]);
}

static void expect(const char *scene, const struct rank *rank, pfc_status status,
                   const char *message) {
  if (rank->status != status || strstr(rank->message, message) == NULL) {
    fprintf(stderr, "%s, rank %u: %s, \"%s\"; expected %s and \"%s\" in the message\n", scene,
            rank->number, pfc_status_name(rank->status), rank->message, pfc_status_name(status),
            message);
    failures++;
  }
}

static pfc_status create(struct rank *self, double scale) {
  pfc_device *device = NULL;
  pfc_head_options options;
  pfc_status status;
  if (pfc_head_options_init(&options) != PFC_OK || pfc_device_cpu(1, &device) != PFC_OK) return -1;
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.scale = scale;
  status = pfc_head_create(device, self->comm, &options, &self->head);
  pfc_device_free(device); /* the head keeps a reference */
  return status;
}

/* A step whose batch has the given label in row 0 and the given value in row 1. */
static pfc_status step(struct rank *self, int64_t label, float value, uint64_t rows) {
  float values[BATCH + 1][DIM], gradient[BATCH + 1][DIM];
  int64_t labels[BATCH + 1] = {0, 1, 2, 3, 4};
  pfc_matrix e = {NULL, PFC_F32, 0, 0, DIM, DIM}, g = e;
  double loss;
  int i, j;
  for (i = 0; i <= BATCH; i++) {
    for (j = 0; j < DIM; j++) values[i][j] = (float)((i * 5 + j * 3) % 7) - 2.5f;
  }
  labels[0] = label;
  values[1][0] = value;
  e.data = values;
  g.data = gradient;
  e.rows = g.rows = rows;
  return pfc_head_step(self->head, &e, labels, 0.1, &g, &loss);
}

static void different_options(struct rank *self) {
  self->status = create(self, self->number == 0 ? 64 : 32);
}

static void bad_label(struct rank *self) {
  if ((self->status = create(self, 64)) != PFC_OK) return;
  self->status = step(self, self->number == 1 ? CLASSES : 0, 1, BATCH);
}

static void not_finite(struct rank *self) {
  if ((self->status = create(self, 64)) != PFC_OK) return;
  self->status = step(self, 0, self->number == 1 ? NAN : 1, BATCH);
}

static void batch_too_large(struct rank *self) {
  if ((self->status = create(self, 64)) != PFC_OK) return;
  self->status = step(self, 0, 1, self->number == 1 ? BATCH + 1 : BATCH);
}

/* After an error in the data both heads go on, in step with one another. */
static void usable_afterwards(struct rank *self) {
  if ((self->status = create(self, 64)) != PFC_OK) return;
  if (step(self, self->number == 1 ? -5 : 0, 1, BATCH) != PFC_ERROR_LABEL) self->status = -1;
  else if (step(self, 0, self->number == 0 ? NAN : 1, BATCH) != PFC_ERROR_NOT_FINITE) {
    self->status = -1;
  } else self->status = step(self, 0, 1, BATCH);
}

/* Rank 1 does not come. */
static void missing_rank(struct rank *self) {
  if (self->number == 1) return;
  self->status = pfc_comm_set_timeout(self->comm, 100);
  if (self->status == PFC_OK) self->status = pfc_comm_barrier(self->comm);
}

static void different_operations(struct rank *self) {
  int32_t one = 1, sum = 0, both[RANKS];
  if (self->number == 0) {
    self->status = pfc_comm_all_reduce(self->comm, &one, &sum, 1, PFC_I32, PFC_SUM);
  } else {
    self->status = pfc_comm_all_gather(self->comm, &one, both, sizeof one);
  }
}

static void aborted(struct rank *self) {
  if (self->number == 0) self->status = pfc_comm_barrier(self->comm); /* waits for rank 1 */
  else self->status = pfc_comm_abort(self->comm);
}

/* A head whose communicator is gone is poisoned, and says so each time. */
static void poisoned(struct rank *self) {
  if ((self->status = create(self, 64)) != PFC_OK) return;
  if (self->number == 1) {
    pfc_comm_abort(self->comm);
    return;
  }
  if (step(self, 0, 1, BATCH) == PFC_OK) self->status = -1;
  else self->status = step(self, 0, 1, BATCH);
}

int main(void) {
  struct rank ranks[RANKS];

  act(different_options, ranks);
  expect("different options", &ranks[0], PFC_ERROR_MISMATCH, "scale");
  expect("different options", &ranks[1], PFC_ERROR_MISMATCH, "32");

  act(bad_label, ranks);
  expect("bad label", &ranks[0], PFC_ERROR_LABEL, "rank 1");
  expect("bad label", &ranks[1], PFC_ERROR_LABEL, "labels[0]");

  act(not_finite, ranks);
  expect("not finite", &ranks[0], PFC_ERROR_NOT_FINITE, "rank 1");
  expect("not finite", &ranks[1], PFC_ERROR_NOT_FINITE, "row 1");

  act(batch_too_large, ranks);
  expect("batch too large", &ranks[0], PFC_ERROR_REMOTE, "rank 1");
  expect("batch too large", &ranks[1], PFC_ERROR_INVALID_ARGUMENT, "max_batch");

  act(usable_afterwards, ranks);
  expect("usable afterwards", &ranks[0], PFC_OK, "");
  expect("usable afterwards", &ranks[1], PFC_OK, "");

  act(missing_rank, ranks);
  expect("missing rank", &ranks[0], PFC_ERROR_TIMEOUT, "rank 1");

  act(different_operations, ranks);
  expect("different operations", &ranks[0], PFC_ERROR_MISMATCH, "all_reduce");
  expect("different operations", &ranks[1], PFC_ERROR_MISMATCH, "all_gather");

  act(aborted, ranks);
  expect("aborted", &ranks[0], PFC_ERROR_ABORTED, "rank 1");
  expect("aborted", &ranks[1], PFC_OK, "");

  act(poisoned, ranks);
  expect("poisoned", &ranks[0], PFC_ERROR_POISONED, "");

  printf("%d failures\n", failures);
  return failures > 0;
}
