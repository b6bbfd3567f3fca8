/*
 * What a caller's functions may rely on: no thread is cancelled in them, and none is called for nothing.
 *
 *   cc -std=c99 callers_functions.c -lpartialfc -lm -pthread && ./a.out
 */
#define _POSIX_C_SOURCE 200809L
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

enum { CLASSES = 20, DIM = 4 };

static int failures;

static void expect(int line, const char *text, int holds) {
  if (!holds) {
    fprintf(stderr, "callers_functions.c:%d: %s; pfc_last_error: \"%s\"\n", line, text,
            pfc_last_error());
    failures++;
  }
}

#define EXPECT(condition) expect(__LINE__, #condition, (condition) != 0)
#define WORKS(call) EXPECT((call) == PFC_OK)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int inside, released, calls;

static void set(int *flag) {
  pthread_mutex_lock(&lock);
  *flag = 1;
  pthread_mutex_unlock(&lock);
}

static int is(const int *flag) {
  int value;
  pthread_mutex_lock(&lock);
  value = *flag;
  pthread_mutex_unlock(&lock);
  return value;
}

/* poll() is a point of cancellation. */
static void wait_for(const int *flag) {
  while (!is(flag)) poll(NULL, 0, 1);
}

static void called(const void *send, const void *recv, uint64_t count) {
  calls++;
  EXPECT(send != NULL && recv != NULL && count > 0);
  set(&inside);
  wait_for(&released);
}

static int32_t gather(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
  (void)ctx;
  (void)stream;
  called(send, recv, bytes);
  memmove(recv, send, bytes);
  return 0;
}

static int32_t reduce(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                      int32_t op, void *stream) {
  (void)ctx;
  (void)op;
  (void)stream;
  called(send, recv, count);
  memmove(recv, send, count * (dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4));
  return 0;
}

static int32_t cast(void *ctx, void *buffer, uint64_t bytes, uint32_t root, void *stream) {
  (void)ctx;
  (void)root;
  (void)stream;
  called(buffer, buffer, bytes);
  return 0;
}

static void log_line(void *user, int32_t level, const char *message) {
  (void)user;
  (void)level;
  (void)message;
  poll(NULL, 0, 1);
}

static pfc_comm *comm;
static pfc_status status = -1;

static void *run(void *argument) {
  status = pfc_comm_barrier(comm);
  (void)argument;
  pthread_testcancel();
  EXPECT(!"the thread is cancelled once it is out of the library");
  return NULL;
}

static void *log_cancelled(void *argument) {
  pfc_device *device = NULL;
  (void)argument;
  pthread_cancel(pthread_self());
  /* It aborts the communicator, which is a line of the log. */
  status = pfc_comm_abort(comm);
  (void)pfc_device_cpu(1, &device);
  pfc_device_free(device);
  pthread_testcancel();
  return NULL;
}

static void nothing(void) {
  const pfc_matrix none = {NULL, PFC_F32, 0, 0, DIM, DIM};
  pfc_device *device = NULL;
  pfc_head *head = NULL;
  pfc_head_options options;
  pfc_traffic before, after;
  double loss = -1;
  int so_far;

  set(&released);
  so_far = calls;
  WORKS(pfc_comm_traffic(comm, &before));
  WORKS(pfc_comm_all_gather(comm, NULL, NULL, 0));
  WORKS(pfc_comm_all_reduce(comm, NULL, NULL, 0, PFC_F32, PFC_SUM));
  WORKS(pfc_comm_reduce_scatter(comm, NULL, NULL, 0, PFC_F32, PFC_SUM));
  WORKS(pfc_comm_broadcast(comm, NULL, 0, 0));
  WORKS(pfc_comm_traffic(comm, &after));
  EXPECT(calls == so_far);
  EXPECT(after.all_gather_calls == before.all_gather_calls + 1);

  WORKS(pfc_head_options_init(&options));
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = 2;
  WORKS(pfc_device_cpu(1, &device));
  WORKS(pfc_head_create(device, comm, &options, &head));
  WORKS(pfc_head_step(head, &none, NULL, 0.1, &none, &loss));
  EXPECT(loss == 0 && calls > so_far);
  pfc_head_free(head);
  pfc_device_free(device);
}

int main(void) {
  pfc_comm_ops ops;
  pthread_t thread;
  void *end = NULL;

  WORKS(pfc_comm_ops_init(&ops));
  ops.size = 1;
  ops.all_gather = gather;
  ops.all_reduce = reduce;
  ops.reduce_scatter = reduce;
  ops.broadcast = cast;
  WORKS(pfc_comm_custom(&ops, &comm));

  EXPECT(pthread_create(&thread, NULL, run, NULL) == 0);
  wait_for(&inside);
  EXPECT(pthread_cancel(thread) == 0);
  set(&released);
  EXPECT(pthread_join(thread, &end) == 0);
  EXPECT(end == PTHREAD_CANCELED && status == PFC_OK);
  WORKS(pfc_comm_barrier(comm));

  nothing();

  WORKS(pfc_set_log(log_line, NULL, PFC_LOG_DEBUG));
  EXPECT(pthread_create(&thread, NULL, log_cancelled, NULL) == 0);
  EXPECT(pthread_join(thread, &end) == 0);
  EXPECT(end == PTHREAD_CANCELED && status == PFC_OK);
  WORKS(pfc_set_log(NULL, NULL, PFC_LOG_OFF));
  pfc_comm_free(comm);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
