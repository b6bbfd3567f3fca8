/* The program that the others of this folder repeat: two ranks, each a thread. */
#include <inttypes.h>
#include <partialfc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 2, BATCH = 16, DIM = 64, SIZE = BATCH * DIM }; /* BATCH: rows of a rank */

struct rank {
  pfc_comm *comm;
  pfc_head *head;
};

/* The text is that of this thread's last error: read it on the thread that made the call. */
static void check(pfc_status status) {
  if (status == PFC_OK) return;
  fprintf(stderr, "%s: %s\n", pfc_status_name(status), pfc_last_error());
  exit(1);
}

static void *train(void *argument) {
  struct rank *self = argument;
  const int tells = pfc_comm_rank(self->comm) == 0;
  float x[SIZE], e[SIZE], de[SIZE], v[DIM], dv[DIM], cosines[BATCH];
  int64_t labels[BATCH], nearest[BATCH];
  const pfc_matrix embeddings = {e, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix gradient = {de, PFC_F32, 0, BATCH, DIM, DIM};
  pfc_device *device;
  pfc_head_options options;
  pfc_metrics metrics;
  double loss;
  for (int i = 0; i < BATCH; i++) labels[i] = i % 8 * 100;
  for (int k = 0; k < SIZE; k++) x[k] = (float)(k / DIM % 8 * (k % DIM + 3) % 23) / 11 - 1;
  for (int k = 0; k < DIM; k++) v[k] = 1;

  check(pfc_device_cpu(1, &device));
  check(pfc_head_options_init(&options));
  if (tells) {
    printf("options: %zu bytes, ignore_label %" PRId64 "\n", sizeof options,
           options.ignore_label);
  }
  options.num_classes = 1000, options.embedding_dim = DIM, options.max_batch = BATCH;
  options.scale = 16, options.m2 = 0.3, options.init_std = 0.5;
  check(pfc_head_create(device, self->comm, &options, &self->head));
  pfc_device_free(device); /* The head keeps what it needs of it. */
  for (int step = 0; step < 20; step++) {
    for (int k = 0; k < SIZE; k++) e[k] = v[k % DIM] * x[k]; /* a backbone of one layer */
    check(pfc_head_step(self->head, &embeddings, labels, 0.1, &gradient, &loss));
    if (tells && step % 4 == 0) printf("step %d loss %.3f\n", step, loss);
    for (int k = 0; k < DIM; k++) dv[k] = 0;
    for (int k = 0; k < SIZE; k++) dv[k % DIM] += de[k] * x[k];
    check(pfc_comm_all_reduce(self->comm, dv, dv, DIM, PFC_F32, PFC_SUM));
    for (int k = 0; k < DIM; k++) v[k] -= 0.01f * dv[k];
  }
  check(pfc_metrics_init(&metrics));
  check(pfc_head_metrics(self->head, &metrics));
  check(pfc_head_top_k(self->head, &embeddings, 1, nearest, cosines));
  if (tells) {
    printf("updates %" PRIu64 ", target cosine %.3f\n", metrics.updates,
           metrics.mean_target_cosine);
    printf("row 9 is class %" PRId64 ", cosine %.3f\n", nearest[9], cosines[9]);
    labels[3] = -5; /* This rank's mistake reaches all ranks. */
  }
  const pfc_status status = pfc_head_step(self->head, &embeddings, labels, 0.1, &gradient, &loss);
  if (tells) printf("%s: %s\n", pfc_status_name(status), pfc_last_error());
  return NULL;
}

int main(void) {
  struct rank ranks[RANKS];
  pfc_comm *comms[RANKS];
  pthread_t threads[RANKS];
  char text[1024];
  check(pfc_comm_threads(RANKS, comms));
  for (int r = 0; r < RANKS; r++) {
    ranks[r].comm = comms[r];
    pthread_create(&threads[r], NULL, train, &ranks[r]);
  }
  for (int r = 0; r < RANKS; r++) pthread_join(threads[r], NULL);
  /* This thread had no error, so pfc_last_error is "" here: the head has its own text. */
  pfc_head_error(ranks[0].head, text, sizeof text);
  printf("the head's: %s\n", text);
  for (int r = 0; r < RANKS; r++) pfc_head_free(ranks[r].head), pfc_comm_free(ranks[r].comm);
}
