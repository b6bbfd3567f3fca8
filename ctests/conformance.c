/*
 * Runs a conformance file (testing/vectors) through the C interface, a thread each rank, and holds
 * what the head computes against what the reference implementation computed.
 *
 *   cc -std=c99 conformance.c -lpartialfc -lm -pthread && ./a.out testing/vectors/NAME.safetensors
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

#define TOLERANCE 1e-4 /* relative L2 */

/* ---- The file: 8 bytes of length, a JSON header of that length, then the tensors' bytes. ---- */

static char *header;
static unsigned char *data;

static void die(const char *what, const char *name) {
  fprintf(stderr, "%s%s\n", what, name);
  exit(1);
}

static void *allocate(uint64_t bytes) {
  void *memory = calloc(1, bytes + 1);
  if (memory == NULL) die("out of memory", "");
  return memory;
}

static void read_file(const char *path) {
  FILE *file = fopen(path, "rb");
  unsigned char prefix[8];
  uint64_t length = 0;
  long end;
  int i;
  if (file == NULL || fread(prefix, 1, 8, file) != 8) die("cannot read ", path);
  for (i = 7; i >= 0; i--) length = length << 8 | prefix[i];
  fseek(file, 0, SEEK_END);
  end = ftell(file);
  if (length > (uint64_t)end - 8) die("no safetensors file: ", path);
  fseek(file, 8, SEEK_SET);
  header = allocate(length);
  data = allocate((uint64_t)end - 8 - length);
  if (fread(header, 1, length, file) != length) die("cannot read ", path);
  if (fread(data, 1, (uint64_t)end - 8 - length, file) != (uint64_t)end - 8 - length) {
    die("cannot read ", path);
  }
  fclose(file);
}

/* What stands behind "key": in an object, which ends at its first }; NULL: no such key. */
static const char *member(const char *object, const char *key) {
  char quoted[128];
  const char *at, *end = strchr(object, '}');
  snprintf(quoted, sizeof quoted, "\"%s\":", key);
  at = strstr(object, quoted);
  return at == NULL || at > end ? NULL : at + strlen(quoted);
}

/* A setting: the metadata's values are strings. */
static const char *setting(const char *key) {
  const char *value = strstr(header, "\"__metadata__\":");
  value = value == NULL ? NULL : member(value, key);
  if (value == NULL || *value != '"') die("the file has no setting ", key);
  return value + 1;
}

static double number(const char *key) { return strtod(setting(key), NULL); }

static int is(const char *key, const char *value) {
  const size_t length = strlen(value);
  return strncmp(setting(key), value, length) == 0 && setting(key)[length] == '"';
}

struct tensor {
  void *values; /* a copy, so that it is aligned */
  uint64_t count;
};

/* A tensor of one rank, at one step if step >= 0; values is NULL where the file has none. */
static struct tensor find(uint32_t rank, int step, const char *name, const char *dtype) {
  struct tensor tensor = {NULL, 0};
  char full[96];
  const char *object, *field;
  uint64_t begin, size;
  char *next;
  if (step < 0) snprintf(full, sizeof full, "\"rank%u.%s\":", rank, name);
  else snprintf(full, sizeof full, "\"rank%u.step%d.%s\":", rank, step, name);
  object = strstr(header, full);
  if (object == NULL) return tensor;
  field = member(object, "dtype");
  if (field == NULL || strncmp(field + 1, dtype, 3) != 0) die("unexpected type of ", full);
  field = member(object, "data_offsets");
  if (field == NULL) die("no data_offsets in ", full);
  begin = strtoull(field + 1, &next, 10);
  size = strtoull(next + 1, NULL, 10) - begin;
  tensor.values = allocate(size);
  memcpy(tensor.values, data + begin, size);
  tensor.count = size / (dtype[1] == '3' ? 4 : 8);
  return tensor;
}

static struct tensor need(uint32_t rank, int step, const char *name, const char *dtype) {
  struct tensor tensor = find(rank, step, name, dtype);
  if (tensor.values == NULL) die("the file has no tensor ", name);
  return tensor;
}

/* ---- One rank. ---- */

struct rank {
  pfc_comm *comm;
  int failed;
  double worst;
};

#define CHECK(call)                                                                        \
  do {                                                                                     \
    pfc_status status = (call);                                                            \
    if (status != PFC_OK) {                                                                \
      fprintf(stderr, "%s: %s: %s\n", #call, pfc_status_name(status), pfc_last_error());   \
      self->failed = 1;                                                                    \
      pfc_comm_abort(self->comm);                                                          \
      return;                                                                              \
    }                                                                                      \
  } while (0)

static void compare(struct rank *self, const char *what, int step, const float *got,
                    struct tensor expected) {
  const float *want = expected.values;
  double difference = 0, norm = 0, error;
  uint64_t i;
  for (i = 0; i < expected.count; i++) {
    difference += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
    norm += (double)want[i] * want[i];
  }
  error = norm > 0 ? sqrt(difference / norm) : sqrt(difference);
  if (error > self->worst) self->worst = error;
  if (!(error <= TOLERANCE)) {
    fprintf(stderr, "rank %u: %s", pfc_comm_rank(self->comm), what);
    if (step >= 0) fprintf(stderr, " of step %d", step);
    fprintf(stderr, " differs by %.3g (relative L2)\n", error);
    self->failed = 1;
  }
}

static pfc_matrix matrix(float *values, uint64_t rows, uint64_t cols) {
  pfc_matrix m;
  m.data = values;
  m.dtype = PFC_F32;
  m.reserved = 0;
  m.rows = rows;
  m.cols = cols;
  m.row_stride = cols;
  return m;
}

static void run_head(struct rank *self, pfc_head *head) {
  const uint32_t rank = pfc_comm_rank(self->comm);
  const uint64_t batch = (uint64_t)number("batch"), dim = (uint64_t)number("dim");
  struct tensor start = need(rank, -1, "weight_initial", "F32");
  struct tensor second = find(rank, -1, "second_moment_final", "F32");
  float *gradient = allocate(batch * dim * 4), *rows;
  pfc_matrix grad = matrix(gradient, batch, dim), shard;
  uint64_t first, count;
  int step;

  CHECK(pfc_head_shard(head, &first, &count));
  if (count * dim != start.count) die("another shard than the file's", "");
  shard = matrix(start.values, count, dim);
  CHECK(pfc_head_write_centers(head, first, count, &shard));

  for (step = 0; step < (int)number("steps"); step++) {
    struct tensor embeddings = need(rank, step, "embeddings", "F32");
    struct tensor labels = need(rank, step, "labels", "I64");
    struct tensor sample = need(rank, step, "sample", "I64");
    struct tensor want = need(rank, step, "loss", "F64");
    pfc_matrix e = matrix(embeddings.values, batch, dim);
    const double expected = *(double *)want.values;
    double loss = NAN;
    CHECK(pfc_head_set_sample(head, sample.values, sample.count));
    CHECK(pfc_head_forward(head, &e, labels.values, &loss));
    if (!(fabs(loss - expected) <= TOLERANCE * fabs(expected))) {
      fprintf(stderr, "rank %u: loss of step %d is %.9g, not %.9g\n", rank, step, loss, expected);
      self->failed = 1;
    }
    CHECK(pfc_head_backward(head, 1.0, 1.0, &grad));
    compare(self, "embedding_grad", step, gradient, need(rank, step, "embedding_grad", "F32"));
    CHECK(pfc_head_update(head, number("lr")));
  }

  rows = allocate(count * dim * 4);
  shard = matrix(rows, count, dim);
  CHECK(pfc_head_read_centers(head, first, count, &shard));
  compare(self, "weight_final", -1, rows, need(rank, -1, "weight_final", "F32"));
  CHECK(pfc_head_read_state(head, PFC_STATE_MOMENTUM, first, count, &shard));
  compare(self, "momentum_final", -1, rows, need(rank, -1, "momentum_final", "F32"));
  if (second.values != NULL) {
    CHECK(pfc_head_read_state(head, PFC_STATE_SECOND_MOMENT, first, count, &shard));
    compare(self, "second_moment_final", -1, rows, second);
  }
}

static void create_and_run(struct rank *self) {
  pfc_device *device = NULL;
  pfc_head *head = NULL;
  pfc_head_options options;
  CHECK(pfc_head_options_init(&options));
  options.num_classes = (uint64_t)number("classes");
  options.embedding_dim = (uint32_t)number("dim");
  options.max_batch = (uint64_t)number("batch");
  options.sample_rate = number("rate");
  options.scale = number("scale");
  options.m1 = number("m1");
  options.m2 = number("m2");
  options.m3 = number("m3");
  options.interclass_filter = number("filt");
  options.margin_gradient = is("gradient", "exact") ? PFC_MARGIN_GRADIENT_EXACT
                                                    : PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH;
  options.row_update = is("rows", "lazy") ? PFC_ROW_UPDATE_LAZY : PFC_ROW_UPDATE_DENSE;
  options.optimizer = is("opt", "sgd") ? PFC_OPTIMIZER_SGD : PFC_OPTIMIZER_ADAMW;
  options.momentum = number("momentum");
  options.weight_decay = number("wd");
  options.beta1 = number("beta1");
  options.beta2 = number("beta2");
  options.epsilon = number("eps");
  CHECK(pfc_device_cpu(1, &device));
  CHECK(pfc_head_create(device, self->comm, &options, &head));
  run_head(self, head);
  pfc_head_free(head);
  pfc_device_free(device);
}

static void *run_rank(void *argument) {
  create_and_run(argument);
  return NULL;
}

enum { MOST_RANKS = 16 };

int main(int argc, char **argv) {
  struct rank ranks[MOST_RANKS];
  pfc_comm *comms[MOST_RANKS];
  pthread_t threads[MOST_RANKS];
  double worst = 0;
  int size, r, failed = 0;
  if (argc != 2) die("usage: conformance FILE.safetensors", "");
  read_file(argv[1]);
  size = (int)number("ranks");
  if (size < 1 || size > MOST_RANKS) die("too many ranks in ", argv[1]);
  if (pfc_comm_threads((uint32_t)size, comms) != PFC_OK) die("", pfc_last_error());
  for (r = 0; r < size; r++) {
    ranks[r].comm = comms[r];
    ranks[r].failed = 0;
    ranks[r].worst = 0;
    pthread_create(&threads[r], NULL, run_rank, &ranks[r]);
  }
  for (r = 0; r < size; r++) {
    pthread_join(threads[r], NULL);
    pfc_comm_free(comms[r]);
    failed |= ranks[r].failed;
    if (ranks[r].worst > worst) worst = ranks[r].worst;
  }
  printf("%s: %d ranks, largest relative L2 %.2g: %s\n", argv[1], size, worst,
         failed ? "FAILED" : "ok");
  return failed;
}
