/*
 * Ranks that talk through functions of the program's own, for a transport that the library does not
 * have. Here: threads and shared memory, the least that works. Trains with them and with the
 * library's own thread communicator; both must end with the same class centers, bit for bit.
 *
 *   cc -std=c99 custom_comm.c -lpartialfc -lm -pthread && ./a.out
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

enum { RANKS = 2, CLASSES = 101, DIM = 16, BATCH = 24, STEPS = 30 };

/* ---- The transport: slots that all ranks see, and a barrier that can be aborted. ---- */

enum { GROUP_ABORTED = 7 }; /* a code of our own; the library hands it on in its message */

struct group {
  pthread_mutex_t mutex;
  pthread_cond_t turn;
  int waiting, aborted;
  unsigned generation;
  const void *slots[RANKS];
  int frees;
};

struct member {
  struct group *group;
  int rank;
};

static int32_t meet(struct group *group) {
  int aborted;
  pthread_mutex_lock(&group->mutex);
  if (!group->aborted) {
    unsigned generation = group->generation;
    if (++group->waiting == RANKS) {
      group->waiting = 0;
      group->generation++;
      pthread_cond_broadcast(&group->turn);
    }
    while (generation == group->generation && !group->aborted) {
      pthread_cond_wait(&group->turn, &group->mutex);
    }
  }
  aborted = group->aborted;
  pthread_mutex_unlock(&group->mutex);
  return aborted ? GROUP_ABORTED : 0;
}

static int32_t all_gather(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
  struct member *self = ctx;
  struct group *group = self->group;
  int32_t code;
  int r;
  (void)stream; /* for device memory only */
  group->slots[self->rank] = send;
  if ((code = meet(group)) != 0) return code;
  for (r = 0; r < RANKS; r++) {
    char *to = (char *)recv + (uint64_t)r * bytes;
    if (bytes > 0 && to != group->slots[r]) memcpy(to, group->slots[r], bytes);
  }
  return meet(group); /* nobody's buffer changes while another reads it */
}

/* The ranks are combined in their order on every rank, so that all get the same bits. */
#define COMBINE(type)                                                  \
  do {                                                                 \
    type *to = (type *)sum;                                            \
    for (r = 0; r < RANKS; r++) {                                      \
      const type *from = (const type *)group->slots[r];                \
      for (i = 0; i < count; i++) {                                    \
        if (r == 0) to[i] = from[i];                                   \
        else if (op == PFC_SUM) to[i] += from[i];                      \
        else if (from[i] > to[i]) to[i] = from[i];                     \
      }                                                                \
    }                                                                  \
  } while (0)

static int32_t all_reduce(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                          int32_t op, void *stream) {
  struct member *self = ctx;
  struct group *group = self->group;
  const uint64_t size = dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4;
  void *sum = malloc(count * size + 1);
  uint64_t i;
  int32_t code;
  int r;
  (void)stream;
  group->slots[self->rank] = send;
  if ((code = meet(group)) == 0) {
    switch (dtype) {
      case PFC_F32: COMBINE(float); break;
      case PFC_F64: COMBINE(double); break;
      case PFC_I32: COMBINE(int32_t); break;
      default: COMBINE(int64_t); break;
    }
    /* recv may be send, which the others may still be reading. */
    if ((code = meet(group)) == 0 && count > 0) memcpy(recv, sum, count * size);
  }
  free(sum);
  return code;
}

static void group_abort(void *ctx) {
  struct group *group = ((struct member *)ctx)->group;
  pthread_mutex_lock(&group->mutex);
  group->aborted = 1;
  pthread_cond_broadcast(&group->turn);
  pthread_mutex_unlock(&group->mutex);
}

static void group_error_string(void *ctx, int32_t code, char *buffer, uint64_t size) {
  (void)ctx;
  snprintf(buffer, size, code == GROUP_ABORTED ? "the group was aborted" : "code %d", (int)code);
}

static void group_free(void *ctx) {
  struct group *group = ((struct member *)ctx)->group;
  pthread_mutex_lock(&group->mutex);
  group->frees++;
  pthread_mutex_unlock(&group->mutex);
}

/* ---- Training, the same whatever carries the ranks. ---- */

struct job {
  pfc_comm *comm;
  int failed;
  double loss;
  uint64_t first, count;
  float centers[CLASSES][DIM];
};

#define CHECK(call)                                                                            \
  do {                                                                                         \
    pfc_status status = (call);                                                                \
    if (status != PFC_OK) {                                                                    \
      fprintf(stderr, "%s: %s: %s\n", #call, pfc_status_name(status), pfc_last_error());       \
      pfc_comm_abort(job->comm); /* so that the other ranks do not wait for this one */        \
      job->failed = 1;                                                                         \
      goto end;                                                                                \
    }                                                                                          \
  } while (0)

static void *train(void *argument) {
  struct job *job = argument;
  pfc_device *device = NULL;
  pfc_head *head = NULL;
  pfc_head_options options;
  float embeddings[BATCH][DIM], gradient[BATCH][DIM];
  int64_t labels[BATCH];
  pfc_matrix e = {NULL, PFC_F32, 0, BATCH, DIM, DIM}, g = e, w = e;
  uint64_t random = 99 + pfc_comm_rank(job->comm);
  int step, i, j;

  CHECK(pfc_device_cpu(1, &device));
  CHECK(pfc_head_options_init(&options));
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 0.3;
  CHECK(pfc_head_create(device, job->comm, &options, &head));
  e.data = embeddings;
  g.data = gradient;
  for (step = 0; step < STEPS; step++) {
    for (i = 0; i < BATCH; i++) {
      for (j = -1; j < DIM; j++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        if (j < 0) labels[i] = (int64_t)((random >> 33) % CLASSES);
        else embeddings[i][j] = (float)(random >> 40) / 8388608.0f - 1.0f;
      }
    }
    CHECK(pfc_head_step(head, &e, labels, 0.1, &g, &job->loss));
  }
  CHECK(pfc_head_shard(head, &job->first, &job->count));
  w.data = job->centers;
  w.rows = job->count;
  CHECK(pfc_head_read_centers(head, job->first, job->count, &w));
end:
  pfc_head_free(head);
  pfc_device_free(device);
  pfc_comm_free(job->comm);
  return NULL;
}

static int run(pfc_comm *comms[RANKS], struct job jobs[RANKS]) {
  pthread_t threads[RANKS];
  int r, failed = 0;
  for (r = 0; r < RANKS; r++) {
    jobs[r].comm = comms[r];
    pthread_create(&threads[r], NULL, train, &jobs[r]);
  }
  for (r = 0; r < RANKS; r++) {
    pthread_join(threads[r], NULL);
    failed |= jobs[r].failed;
  }
  return failed;
}

static struct job built_in[RANKS], custom[RANKS];

int main(void) {
  struct group group = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, {NULL}, 0};
  struct member members[RANKS];
  pfc_comm *comms[RANKS];
  int r, same = 1;

  if (pfc_comm_threads(RANKS, comms) != PFC_OK || run(comms, built_in) != 0) return 1;

  for (r = 0; r < RANKS; r++) {
    pfc_comm_ops ops;
    members[r].group = &group;
    members[r].rank = r;
    if (pfc_comm_ops_init(&ops) != PFC_OK) return 1;
    ops.ctx = &members[r];
    ops.rank = (uint32_t)r;
    ops.size = RANKS;
    ops.all_gather = all_gather; /* these two are enough; the library builds the others */
    ops.all_reduce = all_reduce;
    ops.abort = group_abort; /* without it a rank that waits cannot be woken */
    ops.error_string = group_error_string;
    ops.free = group_free;
    if (pfc_comm_custom(&ops, &comms[r]) != PFC_OK) {
      fprintf(stderr, "pfc_comm_custom: %s\n", pfc_last_error());
      return 1;
    }
  }
  if (run(comms, custom) != 0) return 1;

  for (r = 0; r < RANKS; r++) {
    same &= built_in[r].loss == custom[r].loss;
    same &= memcmp(built_in[r].centers, custom[r].centers, sizeof custom[r].centers) == 0;
    printf("rank %d: classes %d to %d, loss %.6f with pfc_comm_threads, %.6f with ours\n", r,
           (int)custom[r].first, (int)(custom[r].first + custom[r].count - 1), built_in[r].loss,
           custom[r].loss);
  }
  printf("%s; free was called %d times\n", same ? "the same bits" : "DIFFERENT", group.frees);
  return same && isfinite(custom[0].loss) && group.frees == RANKS ? 0 : 1;
}
