/*
 * A step made of the head's kernels, for programs that keep the class centers themselves; beside it
 * a head takes the same step, and both must agree.
 *
 *   cc -std=c99 kernels.c -lpartialfc -lm && ./a.out
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

enum { CLASSES = 300, DIM = 20, BATCH = 16, SAMPLE = 90, STEPS = 5 };

static void check(pfc_status status, const char *what) {
  if (status != PFC_OK) {
    fprintf(stderr, "%s: %s: %s\n", what, pfc_status_name(status), pfc_last_error());
    exit(1);
  }
}

#define CHECK(call) check(call, #call)

static pfc_matrix matrix(float *values, uint64_t rows) {
  pfc_matrix m = {values, PFC_F32, 0, rows, DIM, DIM};
  return m;
}

static float embeddings[BATCH * DIM], gradient[BATCH * DIM], weighted[BATCH * DIM];
static float centers[CLASSES * DIM], momentum[CLASSES * DIM];
static float rows[SAMPLE * DIM], row_gradients[SAMPLE * DIM];
static float row_sums[BATCH], target_logits[BATCH];
static int64_t labels[BATCH], positives[BATCH], ids[SAMPLE], targets[BATCH];

static int ascending(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* One step on centers and momentum; the gradient of the embeddings is left in gradient. */
static double step(const pfc_device *device, const pfc_margin *margin,
                   const pfc_optimizer *optimizer, uint64_t number) {
  const pfc_matrix e = matrix(embeddings, BATCH), g = matrix(gradient, BATCH);
  const pfc_matrix weights = matrix(weighted, BATCH);
  const pfc_matrix w = matrix(centers, CLASSES), m = matrix(momentum, CLASSES);
  const double offset = margin->scale > 64 ? margin->scale - 64 : 0;
  pfc_matrix sampled = matrix(rows, 0), sampled_gradients = matrix(row_gradients, 0);
  uint64_t count, distinct = 0, workspace_bytes, i, k;
  double loss = 0;
  void *workspace;

  /* The batch's own classes, and others until there are SAMPLE. */
  memcpy(positives, labels, sizeof labels);
  qsort(positives, BATCH, sizeof positives[0], ascending);
  for (i = 0; i < BATCH; i++) {
    if (i == 0 || positives[i] != positives[i - 1]) positives[distinct++] = positives[i];
  }
  CHECK(pfc_sample_classes(device, 1, number, 0, CLASSES, positives, distinct, SAMPLE, ids,
                           &count));

  /* Their rows, and for each of the batch's rows where among them its own class is. */
  for (k = 0; k < count; k++) memcpy(&rows[k * DIM], &centers[ids[k] * DIM], DIM * sizeof(float));
  for (i = 0; i < BATCH; i++) {
    const int64_t *at = bsearch(&labels[i], ids, count, sizeof ids[0], ascending);
    targets[i] = at - ids;
  }
  sampled.rows = sampled_gradients.rows = count;

  CHECK(pfc_fused_workspace(device, BATCH, DIM, count, &workspace_bytes));
  workspace = malloc(workspace_bytes + 1);
  CHECK(pfc_fused_forward(device, margin, &e, &sampled, targets, row_sums, target_logits, &weights,
                          workspace, workspace_bytes));
  /* With several ranks, row_sums and target_logits would be summed over them here. */
  for (i = 0; i < BATCH; i++) {
    const double x = log(row_sums[i]) + offset - target_logits[i];
    loss += (x > 0 ? x + log1p(exp(-x)) : log1p(exp(x))) / BATCH; /* softplus */
  }
  CHECK(pfc_fused_backward(device, margin, &e, &sampled, targets, row_sums, target_logits, &weights,
                           1.0 / BATCH, &g, &sampled_gradients, workspace, workspace_bytes));
  free(workspace);
  CHECK(pfc_update_rows(device, optimizer, &w, &m, NULL, ids, &sampled_gradients, 0.1, number + 1));
  return loss;
}

/* How far two arrays are apart, as a share of the second's norm. */
static double apart(const float *a, const float *b, int count) {
  double difference = 0, norm = 0;
  int i;
  for (i = 0; i < count; i++) {
    difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    norm += (double)b[i] * b[i];
  }
  return sqrt(difference / norm);
}

int main(void) {
  static float head_gradient[BATCH * DIM], head_centers[CLASSES * DIM];
  static int64_t head_ids[SAMPLE];
  const pfc_matrix e = matrix(embeddings, BATCH), g = matrix(head_gradient, BATCH);
  const pfc_matrix start = matrix(centers, CLASSES), end = matrix(head_centers, CLASSES);
  pfc_head_options options;
  pfc_margin margin;
  pfc_optimizer optimizer;
  pfc_device *device;
  pfc_comm *comm;
  pfc_head *head;
  uint64_t random = 5, count;
  double worst = 0;
  int number, i;

  CHECK(pfc_device_cpu(2, &device));
  CHECK(pfc_comm_self(&comm));
  CHECK(pfc_head_options_init(&options));
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = (double)SAMPLE / CLASSES;
  options.seed = 1;
  CHECK(pfc_head_create(device, comm, &options, &head));
  CHECK(pfc_head_read_centers(head, 0, CLASSES, &start));
  CHECK(pfc_margin_init(&margin)); /* the same defaults as the head's */
  CHECK(pfc_optimizer_init(&optimizer));

  for (number = 0; number < STEPS; number++) {
    double loss, head_loss, error;
    for (i = 0; i < BATCH * DIM; i++) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      embeddings[i] = (float)(random >> 40) / 8388608.0f - 1.0f;
      if (i % DIM == 0) labels[i / DIM] = (int64_t)((random >> 33) % CLASSES);
    }
    loss = step(device, &margin, &optimizer, (uint64_t)number);
    CHECK(pfc_head_step(head, &e, labels, 0.1, &g, &head_loss));
    CHECK(pfc_head_sample_ids(head, head_ids, SAMPLE, &count));
    if (count != SAMPLE || memcmp(ids, head_ids, sizeof ids) != 0) {
      printf("step %d: another sample than the head's\n", number);
      return 1;
    }
    error = fabs(loss - head_loss) / head_loss;
    if (error > worst) worst = error;
    error = apart(gradient, head_gradient, BATCH * DIM);
    if (error > worst) worst = error;
    printf("step %d: loss %.5f, the head's %.5f\n", number, loss, head_loss);
  }
  CHECK(pfc_head_read_centers(head, 0, CLASSES, &end));
  if (apart(centers, head_centers, CLASSES * DIM) > worst) {
    worst = apart(centers, head_centers, CLASSES * DIM);
  }
  printf("largest difference %.2g (relative)\n", worst);
  pfc_head_free(head);
  pfc_comm_free(comm);
  pfc_device_free(device);
  return worst < 1e-5 ? 0 : 1;
}
