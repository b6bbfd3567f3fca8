/*
 * Calls on a thread that is ending: from the destructor of a pthread key, as a language's runtime has them. What the library keeps
 * for a thread is gone by then.
 *
 *   cc -std=c99 ending_thread.c -lpartialfc -lm -pthread && ./a.out
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

static int failures;

static void expect(int line, const char *text, int holds) {
  if (!holds) {
    fprintf(stderr, "ending_thread.c:%d: %s; pfc_last_error: \"%s\"\n", line, text,
            pfc_last_error());
    failures++;
  }
}

#define EXPECT(condition) expect(__LINE__, #condition, (condition) != 0)
#define WORKS(call) EXPECT((call) == PFC_OK)

enum { CLASSES = 600, DIM = 64, BATCH = 128 };

static pthread_key_t key;
static pfc_device *device;
static pfc_comm *comm;
static pfc_head *head;
static float embeddings[BATCH * DIM], gradient[BATCH * DIM];
static int64_t labels[BATCH];
static double losses[2];
static int destroyed;

static pfc_matrix matrix(float *data) {
  pfc_matrix m;
  m.data = data;
  m.dtype = PFC_F32;
  m.reserved = 0;
  m.rows = BATCH;
  m.cols = DIM;
  m.row_stride = DIM;
  return m;
}

static pfc_status step(double *loss) {
  const pfc_matrix e = matrix(embeddings), g = matrix(gradient);
  return pfc_head_step(head, &e, labels, 0.0, &g, loss);
}

static void destroy(void *value) {
  const char text[] = "comm must not be NULL";
  char copy[128], small[6];
  int64_t number = 1;

  (void)value;
  destroyed++;
  EXPECT(pfc_comm_barrier(NULL) == PFC_ERROR_INVALID_ARGUMENT);
  EXPECT(strcmp(pfc_last_error(), text) == 0);
  EXPECT(pfc_last_error_copy(NULL, 0) == sizeof text);
  EXPECT(pfc_last_error_copy(copy, sizeof copy) == sizeof text && strcmp(copy, text) == 0);
  EXPECT(pfc_last_error_copy(small, sizeof small) == sizeof text && strcmp(small, "comm ") == 0);
  /* What works on other threads works here, and an error is a status. */
  WORKS(step(&losses[1]));
  WORKS(pfc_comm_all_reduce(comm, &number, &number, 1, PFC_I64, PFC_SUM));
  EXPECT(pfc_head_step(head, NULL, NULL, 0.0, NULL, NULL) == PFC_ERROR_INVALID_ARGUMENT);
  EXPECT(pfc_head_wait(head) == PFC_OK);
}

static void *thread(void *fails_before) {
  pthread_setspecific(key, fails_before);
  if (strcmp(fails_before, "fails") == 0) {
    EXPECT(pfc_comm_barrier(NULL) == PFC_ERROR_INVALID_ARGUMENT);
    WORKS(step(&losses[0]));
  }
  return NULL;
}

int main(void) {
  char before[2][8] = {"fails", "is new"};
  pfc_head_options options;
  int i;

  for (i = 0; i < BATCH * DIM; i++) embeddings[i] = (float)(i * 7 % 11) - 4.5f;
  for (i = 0; i < BATCH; i++) labels[i] = i;
  WORKS(pfc_device_cpu(1, &device));
  WORKS(pfc_comm_self(&comm));
  WORKS(pfc_head_options_init(&options));
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 1.0;
  WORKS(pfc_head_create(device, comm, &options, &head));
  EXPECT(pthread_key_create(&key, destroy) == 0);
  for (i = 0; i < 2; i++) {
    pthread_t other;
    EXPECT(pthread_create(&other, NULL, thread, before[i]) == 0);
    EXPECT(pthread_join(other, NULL) == 0);
    EXPECT(destroyed == i + 1 && losses[0] == losses[1]);
  }
  pfc_head_free(head);
  pfc_comm_free(comm);
  pfc_device_free(device);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
