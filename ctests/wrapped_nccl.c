/*
 * A trainer's own NCCL communicators under heads: two ranks on threads train on one emulated GPU,
 * with the losses that pfc_comm_threads gives, to the last bit; every collective on host memory;
 * what partialfc_nccl.h refuses; and what hangs, which ends in time.
 *
 *   cc -std=c99 wrapped_nccl.c -lpartialfc -l:libnccl.so.2 -l:libcuda.so -ldl -lpthread && ./a.out
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc_nccl.h"
#include "simt.h"
#include "standin.h"

enum { RANKS = 2, CLASSES = 101, DIM = 16, BATCH = 8, STEPS = 6 };
/* How long ranks wait for what hangs, and for what does not. */
enum { SHORT_MS = 300, LONG_MS = 120000 };

/* ---- What a rank has. ---- */

struct rank {
  int rank;
  ncclUniqueId id;
  ncclComm_t nccl; /* the trainer's own */
  pfc_comm *comm;
  int hang; /* which operation of a step never completes; -1: one on host memory */
  double losses[STEPS];
};

static pthread_barrier_t together;

static void fail(const struct rank *self, const char *what, const char *detail) {
  fprintf(stderr, "rank %d: %s: %s\n", self->rank, what, detail);
  exit(1);
}

static void check(const struct rank *self, pfc_status status, const char *what) {
  if (status == PFC_OK) return;
  fprintf(stderr, "%s ", pfc_status_name(status));
  fail(self, what, pfc_nccl_last_error());
}

static void must(const struct rank *self, int result, const char *what) {
  if (result != 0) fail(self, what, ncclGetLastError(NULL));
}

static void expect(const struct rank *self, pfc_status status, pfc_status expected,
                   const char *words) {
  const char *text = pfc_nccl_last_error();
  if (status != expected) fail(self, pfc_status_name(expected), pfc_status_name(status));
  if (strstr(text, words) == NULL) fail(self, words, text);
}

static void begin(struct rank *self) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclResult_t state;
  must(self, cudaSetDevice(0), "cudaSetDevice");
  config.blocking = 0;
  state = ncclCommInitRankConfig(&self->nccl, RANKS, self->id, self->rank, &config);
  while (state == ncclInProgress) {
    poll(NULL, 0, 1);
    must(self, ncclCommGetAsyncError(self->nccl, &state), "ncclCommGetAsyncError");
  }
  must(self, state, "ncclCommInitRankConfig");
  check(self, pfc_comm_from_nccl(&self->nccl, &self->comm), "pfc_comm_from_nccl");
  check(self, pfc_comm_set_timeout(self->comm, LONG_MS), "pfc_comm_set_timeout");
}

/* The communicator is the trainer's: it outlives the pfc_comm, unless it had to be aborted. */
static void end(struct rank *self, int aborted) {
  pfc_comm_free(self->comm);
  if ((self->nccl == NULL) != aborted) fail(self, "the ncclComm_t", "aborted, or not");
  if (self->nccl != NULL) must(self, ncclCommDestroy(self->nccl), "ncclCommDestroy");
}

/* Runs a function as each of the ranks. */
static void run(struct rank ranks[RANKS], void *(*body)(void *)) {
  pthread_t threads[RANKS];
  int r;
  for (r = 0; r < RANKS; r++) {
    ranks[r].rank = r;
    pthread_create(&threads[r], NULL, body, &ranks[r]);
  }
  for (r = 0; r < RANKS; r++) pthread_join(threads[r], NULL);
}

static void run_over_nccl(struct rank ranks[RANKS], void *(*body)(void *)) {
  int r;
  if (ncclGetUniqueId(&ranks[0].id) != ncclSuccess) exit(1);
  for (r = 1; r < RANKS; r++) ranks[r].id = ranks[0].id;
  run(ranks, body);
}

/* ---- Training, the same whatever carries the ranks. ---- */

struct trainer {
  cudaStream_t stream;
  pfc_device *device;
  pfc_head *head;
  uint64_t random;
};

static void make_trainer(const struct rank *self, struct trainer *trainer) {
  pfc_head_options options;
  must(self, cudaSetDevice(0), "cudaSetDevice");
  must(self, cudaStreamCreateWithFlags(&trainer->stream, cudaStreamNonBlocking), "a stream");
  check(self, pfc_device_cuda(0, trainer->stream, &trainer->device), "pfc_device_cuda");
  check(self, pfc_head_options_init(&options), "pfc_head_options_init");
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 0.3;
  check(self, pfc_head_create(trainer->device, self->comm, &options, &trainer->head),
        "pfc_head_create");
  trainer->random = 99 + (uint64_t)self->rank;
}

static pfc_status step(struct trainer *trainer, double *loss) {
  float embeddings[BATCH][DIM], gradient[BATCH][DIM];
  int64_t labels[BATCH];
  pfc_matrix e = {NULL, PFC_F32, 0, BATCH, DIM, DIM}, g = e;
  int i, j;
  for (i = 0; i < BATCH; i++) {
    for (j = -1; j < DIM; j++) {
      trainer->random = trainer->random * 6364136223846793005u + 1442695040888963407u;
      if (j < 0) labels[i] = (int64_t)((trainer->random >> 33) % CLASSES);
      else embeddings[i][j] = (float)(trainer->random >> 40) / 8388608.0f - 1.0f;
    }
  }
  e.data = embeddings;
  g.data = gradient;
  return pfc_head_step(trainer->head, &e, labels, 0.1, &g, loss);
}

static void free_trainer(const struct rank *self, struct trainer *trainer) {
  pfc_head_free(trainer->head);
  pfc_device_free(trainer->device);
  must(self, cudaStreamSynchronize(trainer->stream), "the stream goes on");
  must(self, cudaStreamDestroy(trainer->stream), "cudaStreamDestroy");
}

static void train(struct rank *self) {
  struct trainer trainer;
  int i;
  make_trainer(self, &trainer);
  for (i = 0; i < STEPS; i++) check(self, step(&trainer, &self->losses[i]), "pfc_head_step");
  free_trainer(self, &trainer);
}

static void *train_on_threads(void *argument) {
  struct rank *self = (struct rank *)argument;
  train(self);
  pfc_comm_free(self->comm);
  return NULL;
}

static void *train_over_nccl(void *argument) {
  struct rank *self = (struct rank *)argument;
  begin(self);
  train(self);
  end(self, 0);
  return NULL;
}

/* ---- Every collective on host memory, against what is computed here. ---- */

/* Element i of rank r: numbers whose sums are rounded, NaN among them. */
static double number(int r, uint64_t i, int32_t dtype) {
  const int32_t x = (int32_t)((i * 2654435761u + (uint64_t)r * 40503u) % 200003u) - 100000;
  if (dtype == PFC_I32 || dtype == PFC_I64) return x;
  return (i + (uint64_t)r) % 13 == 5 ? (double)NAN : x / 7.0;
}

static void set(void *buffer, uint64_t at, int32_t dtype, double value) {
  switch (dtype) {
    case PFC_F32: ((float *)buffer)[at] = (float)value; break;
    case PFC_F64: ((double *)buffer)[at] = value; break;
    case PFC_I32: ((int32_t *)buffer)[at] = (int32_t)value; break;
    default: ((int64_t *)buffer)[at] = (int64_t)value; break;
  }
}

/* Whether an element is the two ranks' sum or largest, of which a NaN is. */
static int is_right(const void *buffer, uint64_t at, uint64_t i, int32_t dtype, int32_t op) {
  const double a = number(0, i, dtype), b = number(1, i, dtype);
  const int none = isnan(a) || isnan(b);
  const double both = op == PFC_SUM ? a + b : a > b ? a : b;
  switch (dtype) {
    case PFC_F32: {
      const float sum = (float)a + (float)b, value = ((const float *)buffer)[at];
      return none ? isnan(value) : value == (op == PFC_SUM ? sum : (float)both);
    }
    case PFC_F64: {
      const double value = ((const double *)buffer)[at];
      return none ? isnan(value) : value == both;
    }
    case PFC_I32: return ((const int32_t *)buffer)[at] == (int32_t)both;
    default: return ((const int64_t *)buffer)[at] == (int64_t)both;
  }
}

static void reductions(const struct rank *self, int32_t dtype, int32_t op, uint64_t count,
                       int in_place) {
  const uint64_t element = dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4, whole = RANKS * count;
  const uint64_t first = (uint64_t)self->rank * count;
  char *send = (char *)calloc(whole + 1, element), *recv = (char *)calloc(whole + 1, element);
  char *to = in_place ? send : recv;
  uint64_t i;
  if (send == NULL || recv == NULL) fail(self, "malloc", "no memory");
  for (i = 0; i < whole; i++) set(send, i, dtype, number(self->rank, i, dtype));
  check(self, pfc_comm_all_reduce(self->comm, send, to, whole, dtype, op), "all_reduce");
  for (i = 0; i < whole; i++) {
    if (!is_right(to, i, i, dtype, op)) fail(self, "all_reduce", "wrong result");
  }
  for (i = 0; i < whole; i++) set(send, i, dtype, number(self->rank, i, dtype));
  to = in_place ? send + first * element : recv;
  check(self, pfc_comm_reduce_scatter(self->comm, send, to, count, dtype, op), "reduce_scatter");
  for (i = 0; i < count; i++) {
    if (!is_right(to, i, first + i, dtype, op)) fail(self, "reduce_scatter", "wrong result");
  }
  free(send);
  free(recv);
}

static char byte(int r, uint64_t i) { return (char)(i * 31 + (uint64_t)r * 7 + i / 256); }

static void copies(const struct rank *self, uint64_t bytes, int in_place) {
  char *all = (char *)calloc(RANKS * bytes + 1, 1), *one = (char *)malloc(bytes + 1);
  char *mine = all + (uint64_t)self->rank * bytes;
  uint64_t i;
  int r;
  if (all == NULL || one == NULL) fail(self, "malloc", "no memory");
  for (i = 0; i < bytes; i++) one[i] = byte(self->rank, i);
  if (in_place) memcpy(mine, one, bytes);
  check(self, pfc_comm_all_gather(self->comm, in_place ? mine : one, all, bytes), "all_gather");
  for (r = 0; r < RANKS; r++) {
    for (i = 0; i < bytes; i++) {
      if (all[(uint64_t)r * bytes + i] != byte(r, i)) fail(self, "all_gather", "wrong result");
    }
  }
  for (r = 0; r < RANKS; r++) {
    for (i = 0; i < bytes; i++) one[i] = byte(self->rank, i);
    check(self, pfc_comm_broadcast(self->comm, one, bytes, (uint32_t)r), "broadcast");
    for (i = 0; i < bytes; i++) {
      if (one[i] != byte(r, i)) fail(self, "broadcast", "wrong result");
    }
  }
  free(all);
  free(one);
}

static void *collectives(void *argument) {
  struct rank *self = (struct rank *)argument;
  static const int32_t dtypes[] = {PFC_F32, PFC_F64, PFC_I32, PFC_I64};
  /* The last goes in pieces where values are gathered, and needs a larger buffer on the GPU. */
  static const uint64_t counts[] = {0, 1, 37, 2049, 300001};
  size_t c, d;
  int in_place;
  begin(self);
  if (pfc_comm_rank(self->comm) != (uint32_t)self->rank || pfc_comm_size(self->comm) != RANKS) {
    fail(self, "pfc_comm_rank", "not NCCL's");
  }
  for (c = 0; c < sizeof counts / sizeof *counts; c++) {
    for (in_place = 0; in_place < 2; in_place++) {
      for (d = 0; d < 4; d++) {
        reductions(self, dtypes[d], PFC_SUM, counts[c], in_place);
        reductions(self, dtypes[d], PFC_MAX, counts[c], in_place);
      }
      copies(self, 3 * counts[c], in_place);
    }
    check(self, pfc_comm_barrier(self->comm), "barrier");
  }
  end(self, 0);
  return NULL;
}

/* ---- What is refused, and what fails. ---- */

static void *refusals(void *argument) {
  struct rank *self = (struct rank *)argument;
  ncclComm_t none = NULL, early = NULL;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclResult_t state = ncclInProgress;
  pfc_comm *comm = NULL;
  pfc_comm_ops ops;
  void *at = NULL;
  char text[256];
  int32_t code;
  must(self, cudaSetDevice(0), "cudaSetDevice");
  expect(self, pfc_comm_from_nccl(NULL, &comm), PFC_ERROR_INVALID_ARGUMENT,
         "comm must not be NULL");
  expect(self, pfc_comm_from_nccl(&none, &comm), PFC_ERROR_INVALID_ARGUMENT,
         "*comm must not be NULL");
  /* One that is not there yet: the other rank has not come. */
  config.blocking = 0;
  if (self->rank == 0) {
    (void)ncclCommInitRankConfig(&early, RANKS, self->id, 0, &config);
    expect(self, pfc_comm_from_nccl(&early, &comm), PFC_ERROR_INVALID_ARGUMENT, "still being made");
  }
  pthread_barrier_wait(&together);
  if (self->rank == 1) (void)ncclCommInitRankConfig(&early, RANKS, self->id, 1, &config);
  while (state == ncclInProgress) {
    poll(NULL, 0, 1);
    must(self, ncclCommGetAsyncError(early, &state), "ncclCommGetAsyncError");
  }
  must(self, state, "ncclCommInitRankConfig");
  expect(self, pfc_nccl_ops(&early, NULL), PFC_ERROR_INVALID_ARGUMENT, "ops must not be NULL");
  /* What the library itself refuses, with the library's text. */
  expect(self, pfc_comm_from_nccl(&early, NULL), PFC_ERROR_INVALID_ARGUMENT, "out");
  /* The maximum of floats on the device, which NCCL would take without NaN. */
  check(self, pfc_nccl_ops(&early, &ops), "pfc_nccl_ops");
  must(self, cudaMalloc(&at, 64), "cudaMalloc");
  code = ops.all_reduce(ops.ctx, at, at, 4, PFC_F32, PFC_MAX, NULL);
  ops.error_string(ops.ctx, code, text, sizeof text);
  if (code >= 0 || strstr(text, "unsupported") == NULL) fail(self, "the largest of floats", text);
  must(self, cudaFree(at), "cudaFree");
  must(self, ops.async_error(ops.ctx), "async_error");
  /* NCCL fails in an operation of rank 0's: its text comes through, and a failed communicator makes
     no other pfc_comm. */
  if (self->rank == 0) {
    standin_plan(0, 0, STANDIN_ENQUEUE, ncclSystemError);
    code = ops.barrier(ops.ctx);
    ops.error_string(ops.ctx, code, text, sizeof text);
    if (code != ncclSystemError || strstr(text, "system error") == NULL) {
      fail(self, "a failure of NCCL's", text);
    }
    if (ops.async_error(ops.ctx) != ncclSystemError) fail(self, "async_error", "nothing");
    expect(self, pfc_comm_from_nccl(&early, &comm), PFC_ERROR_COMM, "the communicator has failed");
  }
  pthread_barrier_wait(&together);
  ops.abort(ops.ctx);
  ops.abort(ops.ctx);
  if (early != NULL) fail(self, "abort", "the variable is not NULL");
  code = ops.barrier(ops.ctx);
  ops.error_string(ops.ctx, code, text, sizeof text);
  if (code >= 0 || strstr(text, "aborted") == NULL) fail(self, "after an abort", text);
  ops.free(ops.ctx);
  return NULL;
}

/* ---- What hangs. ---- */

/* Rank 0's part in an operation on host memory never ends; rank 1 waits for it in the next one. */
static void *hang_on_the_host(void *argument) {
  struct rank *self = (struct rank *)argument;
  int64_t value = 1;
  int i;
  pfc_status status = PFC_OK;
  begin(self);
  check(self, pfc_comm_set_timeout(self->comm, SHORT_MS), "pfc_comm_set_timeout");
  for (i = 0; i < 2 && status == PFC_OK; i++) {
    status = pfc_comm_all_reduce(self->comm, &value, &value, 1, PFC_I64, PFC_SUM);
  }
  expect(self, status, PFC_ERROR_TIMEOUT, "all_reduce #");
  status = pfc_comm_barrier(self->comm);
  if (status != PFC_ERROR_ABORTED) fail(self, "after a timeout", pfc_status_name(status));
  end(self, 1);
  return NULL;
}

/* The same on the stream of a head, in each of the operations of a step. */
static void *hang_on_a_stream(void *argument) {
  struct rank *self = (struct rank *)argument;
  struct trainer trainer;
  pfc_traffic t;
  double loss;
  int i;
  pfc_status status;
  begin(self);
  make_trainer(self, &trainer);
  check(self, step(&trainer, &loss), "pfc_head_step");
  check(self, pfc_comm_traffic(self->comm, &t), "pfc_comm_traffic");
  pthread_barrier_wait(&together);
  if (self->rank == 0) {
    const uint64_t before = t.all_gather_calls + t.all_reduce_calls + t.reduce_scatter_calls +
                            t.broadcast_calls + t.barrier_calls;
    standin_plan(0, (int)before + self->hang, STANDIN_HANG, 0);
  }
  pthread_barrier_wait(&together);
  check(self, pfc_comm_set_timeout(self->comm, SHORT_MS), "pfc_comm_set_timeout");
  for (i = 0, status = PFC_OK; i < 3 && status == PFC_OK; i++) status = step(&trainer, &loss);
  expect(self, status, PFC_ERROR_TIMEOUT, "did not finish");
  free_trainer(self, &trainer);
  end(self, 1);
  return NULL;
}

int main(void) {
  static struct rank threads[RANKS], nccl[RANKS];
  pfc_comm *comms[RANKS];
  char text[1024];
  int r, i, polls;

  pthread_barrier_init(&together, NULL, RANKS);
  if (pfc_comm_threads(RANKS, comms) != PFC_OK) return 1;
  for (r = 0; r < RANKS; r++) threads[r].comm = comms[r];
  run(threads, train_on_threads);
  /* NCCL takes operations at once, or is asked for a while first. */
  for (polls = 0; polls < 4; polls += 3) {
    standin_in_progress(polls);
    run_over_nccl(nccl, train_over_nccl);
    if (standin_operations(0) == 0) return 1;
    for (r = 0; r < RANKS; r++) {
      for (i = 0; i < STEPS; i++) {
        if (nccl[r].losses[i] == threads[r].losses[i] && isfinite(nccl[r].losses[i])) continue;
        fprintf(stderr, "rank %d, step %d: loss %.17g over NCCL, %.17g on threads\n", r, i,
                nccl[r].losses[i], threads[r].losses[i]);
        return 1;
      }
    }
    run_over_nccl(nccl, collectives);
  }
  standin_in_progress(0);
  run_over_nccl(nccl, refusals);
  standin_plan(0, 0, STANDIN_HANG, 0);
  run_over_nccl(nccl, hang_on_the_host);
  for (i = 0; i < 5; i++) {
    for (r = 0; r < RANKS; r++) nccl[r].hang = i;
    run_over_nccl(nccl, hang_on_a_stream);
  }

  if (standin_findings(text, sizeof text) > 0 || simt_report(text, sizeof text) > 0) {
    fprintf(stderr, "found:\n%s", text);
    return 1;
  }
  if (standin_live() != 0) {
    fprintf(stderr, "%d communicators are left\n", standin_live());
    return 1;
  }
  printf("the losses of pfc_comm_threads, all collectives, every hang ended\n");
  return 0;
}
