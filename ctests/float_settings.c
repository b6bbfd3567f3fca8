/*
 * A caller that rounds otherwise, or flushes subnormals to zero, on its own thread: results have the same bits, with one thread and
 * with several, and its settings are as they were after each call.
 *
 *   cc -std=c99 float_settings.c -lpartialfc -lm -pthread && ./a.out
 */
#include <fenv.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "partialfc.h"

enum { CLASSES = 3000, DIM = 48, BATCH = 64, STEPS = 3, SETTINGS = 5 };

static int failures;

static void expect(int line, const char *text, int holds) {
  if (!holds) {
    fprintf(stderr, "float_settings.c:%d: %s; pfc_last_error: \"%s\"\n", line, text,
            pfc_last_error());
    failures++;
  }
}

#define EXPECT(condition) expect(__LINE__, #condition, (condition) != 0)

/* The call succeeds and leaves the caller's settings alone. */
#define WORKS(call)                        \
  do {                                     \
    const unsigned before = settings();    \
    EXPECT((call) == PFC_OK);              \
    EXPECT(settings() == before);          \
  } while (0)

static unsigned settings(void) {
#ifdef __SSE__
  /* The flags that an operation raises are none of them. */
  return (unsigned)fegetround() | (_mm_getcsr() & ~0x3fu);
#else
  return (unsigned)fegetround();
#endif
}

static int choose(int which) {
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_UPWARD, FE_DOWNWARD, FE_TONEAREST};
  EXPECT(fesetround(modes[which]) == 0);
  if (which < 4) return 1;
#ifdef __SSE__
  _mm_setcsr(_mm_getcsr() | 0x8040u); /* flush to zero, denormals are zeros */
  return 1;
#else
  return 0;
#endif
}

static void restore(void) {
  fesetround(FE_TONEAREST);
#ifdef __SSE__
  _mm_setcsr(_mm_getcsr() & ~0x8040u);
#endif
}

typedef struct {
  double losses[STEPS], norm;
  float gradients[STEPS][BATCH * DIM], centers[CLASSES * DIM], normalized[BATCH * DIM];
  float cosines[BATCH * BATCH], logits[BATCH];
} results;

static results expected, found;
static float embeddings[BATCH * DIM];
static int64_t labels[BATCH];
static void *workspace;

static pfc_matrix matrix(float *data, uint64_t rows, uint64_t cols) {
  pfc_matrix m;
  m.data = data;
  m.dtype = PFC_F32;
  m.reserved = 0;
  m.rows = rows;
  m.cols = cols;
  m.row_stride = cols;
  return m;
}

static void compute(pfc_device *device, pfc_comm *comm, int which, results *out) {
  const pfc_matrix e = matrix(embeddings, BATCH, DIM);
  const pfc_matrix normalized = matrix(out->normalized, BATCH, DIM);
  const pfc_matrix cosines = matrix(out->cosines, BATCH, BATCH);
  const pfc_matrix centers = matrix(out->centers, CLASSES, DIM);
  pfc_head *head = NULL;
  pfc_head_options options;
  pfc_margin margin;
  pfc_metrics metrics;
  uint64_t bytes = 0;
  int step;

  memset(out, 0, sizeof *out);
  WORKS(pfc_head_options_init(&options));
  WORKS(pfc_margin_init(&margin));
  WORKS(pfc_metrics_init(&metrics));
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 0.5;
  options.optimizer = PFC_OPTIMIZER_ADAMW;
  if (!choose(which)) return;
  WORKS(pfc_head_create(device, comm, &options, &head));
  for (step = 0; step < STEPS; step++) {
    const pfc_matrix g = matrix(out->gradients[step], BATCH, DIM);
    /* The device's threads start with the first step. */
    restore();
    if (step > 0) choose(which);
    WORKS(pfc_head_step(head, &e, labels, 0.1, &g, &out->losses[step]));
  }
  WORKS(pfc_head_metrics(head, &metrics));
  out->norm = metrics.grad_embeddings_norm;
  WORKS(pfc_head_read_centers(head, 0, CLASSES, &centers));
  WORKS(pfc_normalize_rows(device, &e, &normalized, NULL));
  WORKS(pfc_normalize_gemm_workspace(device, BATCH, DIM, BATCH, &bytes));
  workspace = malloc(bytes);
  WORKS(pfc_normalize_gemm(device, &e, &e, &cosines, workspace, bytes));
  free(workspace);
  WORKS(pfc_margin_forward(device, &margin, out->cosines, BATCH, out->logits));
  pfc_head_free(head);
  restore();
}

int main(void) {
  int which, threads, i;
  pfc_comm *comm = NULL;

  for (i = 0; i < BATCH * DIM; i++) {
    embeddings[i] = (float)((i * 37 + i / 11) % 101) / 7.0f - 6.3f;
    /* The squares of these rows are subnormal in float32, and some elements are. */
    if (i / DIM % 4 == 1) embeddings[i] *= 1e-38f;
  }
  for (i = 0; i < BATCH; i++) labels[i] = i * 41 % CLASSES;
  EXPECT(pfc_comm_self(&comm) == PFC_OK);
  for (threads = 1; threads <= 3; threads += 2) {
    for (which = 0; which < SETTINGS; which++) {
      pfc_device *device = NULL;
      const int first = threads == 1 && which == 0;
      EXPECT(pfc_device_cpu((uint32_t)threads, &device) == PFC_OK);
      if (!choose(which)) continue;
      restore();
      compute(device, comm, which, first ? &expected : &found);
      if (!first && memcmp(&expected, &found, sizeof found) != 0) {
        fprintf(stderr, "setting %d with %d threads: other bits\n", which, threads);
        failures++;
      }
      pfc_device_free(device);
    }
  }
  pfc_comm_free(comm);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
