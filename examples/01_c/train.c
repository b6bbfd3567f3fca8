/*
 * Trains a small recognizer on one rank: a linear backbone, E = X @ V, under a PartialFC head.
 *
 *   cc -std=c99 train.c -lpartialfc -lm && ./a.out
 *
 * The data are made up but honest: each of 200 people is a point in 32 dimensions, a photo is that
 * point plus noise, and what is reported at the end is measured on photos that were not trained on.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "partialfc.h"

enum { PEOPLE = 200, INPUT = 32, DIM = 24, BATCH = 64, STEPS = 400, PROBES = 500 };

/* Every call gives a status; this is how a program that cannot go on without it looks at it. */
static void check(pfc_status status, const char *what) {
  if (status != PFC_OK) {
    fprintf(stderr, "%s: %s: %s\n", what, pfc_status_name(status), pfc_last_error());
    exit(1);
  }
}

static uint64_t seed = 1;

static double uniform(void) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return ((double)(seed >> 11) + 0.5) / 9007199254740992.0;
}

static float normal(void) {
  return (float)(sqrt(-2.0 * log(uniform())) * cos(6.283185307179586 * uniform()));
}

static float people[PEOPLE][INPUT];

/* A batch of photos of people drawn at random. */
static void photograph(float photos[][INPUT], int64_t *labels, int count) {
  int i, k;
  for (i = 0; i < count; i++) {
    labels[i] = (int64_t)(uniform() * PEOPLE);
    for (k = 0; k < INPUT; k++) photos[i][k] = people[labels[i]][k] + 0.5f * normal();
  }
}

static float backbone[INPUT][DIM];

static void embed(float photos[][INPUT], float embeddings[][DIM], int count) {
  int i, j, k;
  for (i = 0; i < count; i++) {
    for (j = 0; j < DIM; j++) {
      embeddings[i][j] = 0;
      for (k = 0; k < INPUT; k++) embeddings[i][j] += photos[i][k] * backbone[k][j];
    }
  }
}

static float photos[PROBES][INPUT], embeddings[PROBES][DIM], gradient[BATCH][DIM], cosines[PROBES];
static int64_t labels[PROBES], nearest[PROBES];

int main(void) {
  pfc_device *device = NULL;
  pfc_comm *comm = NULL;
  pfc_head *head = NULL;
  pfc_head_options options;
  pfc_metrics metrics;
  /* A matrix says where rows are and what they hold; row_stride counts elements, not bytes. */
  const pfc_matrix batch = {embeddings, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix grad = {gradient, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix probes = {embeddings, PFC_F32, 0, PROBES, DIM, DIM};
  double first = 0, last = 0, loss = 0;
  int step, i, j, k, right = 0;

  for (i = 0; i < PEOPLE; i++) {
    for (k = 0; k < INPUT; k++) people[i][k] = normal();
  }
  for (k = 0; k < INPUT; k++) {
    for (j = 0; j < DIM; j++) backbone[k][j] = normal() / sqrtf(INPUT);
  }

  check(pfc_device_cpu(0, &device), "pfc_device_cpu"); /* 0: a thread for each core */
  check(pfc_comm_self(&comm), "pfc_comm_self");
  check(pfc_head_options_init(&options), "pfc_head_options_init");
  options.num_classes = PEOPLE;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 0.5; /* each step: the batch's own people and others, half of all */
  options.scale = 24;        /* 64 for millions of classes */
  options.m2 = 0.3;          /* ArcFace's margin, in radians */
  check(pfc_head_create(device, comm, &options, &head), "pfc_head_create");
  printf("%s\n%s\n", pfc_build_info(), pfc_device_info(device));

  for (step = 0; step < STEPS; step++) {
    photograph(photos, labels, BATCH);
    embed(photos, embeddings, BATCH);
    /* Loss, the gradient of the embeddings, and the update of the class centers, in one call. */
    check(pfc_head_step(head, &batch, labels, 0.5, &grad, &loss), "pfc_head_step");
    /* The backbone is the program's own: dV = X^T @ dE. */
    for (k = 0; k < INPUT; k++) {
      for (j = 0; j < DIM; j++) {
        float sum = 0;
        for (i = 0; i < BATCH; i++) sum += photos[i][k] * gradient[i][j];
        backbone[k][j] -= 0.1f * sum;
      }
    }
    if (step < 20) first += loss / 20;
    if (step >= STEPS - 20) last += loss / 20;
    if (step % 50 == 0) printf("step %3d  loss %.3f\n", step, loss);
  }

  check(pfc_metrics_init(&metrics), "pfc_metrics_init");
  check(pfc_head_metrics(head, &metrics), "pfc_head_metrics");
  photograph(photos, labels, PROBES);
  embed(photos, embeddings, PROBES);
  check(pfc_head_top_k(head, &probes, 1, nearest, cosines), "pfc_head_top_k");
  for (i = 0; i < PROBES; i++) right += nearest[i] == labels[i];
  printf("loss %.3f at first, %.3f at last; target cosine %.2f; %d of %d new photos recognized\n",
         first, last, metrics.mean_target_cosine, right, PROBES);

  pfc_head_free(head); /* in any order */
  pfc_comm_free(comm);
  pfc_device_free(device);
  return last < 0.5 * first && right > PROBES * 8 / 10 ? 0 : 1;
}
