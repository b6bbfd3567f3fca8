/*
 * What a C program sees when something is wrong: statuses, messages, and that nothing else changes.
 *
 *   cc -std=c99 errors.c -lpartialfc -lm -pthread && ./a.out
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "partialfc.h"

static int failures;

static void expect(int line, const char *text, int holds) {
  if (!holds) {
    fprintf(stderr, "errors.c:%d: %s; pfc_last_error: \"%s\"\n", line, text, pfc_last_error());
    failures++;
  }
}

#define EXPECT(condition) expect(__LINE__, #condition, (condition) != 0)

/* The call fails with that status, and the message contains the text. */
#define FAILS(call, status, message)                         \
  do {                                                       \
    EXPECT((call) == (status));                              \
    expect(__LINE__, #call " should say \"" message "\"",    \
           strstr(pfc_last_error(), message) != NULL);       \
  } while (0)

#define WORKS(call) EXPECT((call) == PFC_OK)

enum { CLASSES = 50, DIM = 8, BATCH = 4 };

static float values[BATCH][DIM], gradient[BATCH][DIM];
static int64_t labels[BATCH] = {0, 7, 7, 49};

static pfc_matrix matrix(float (*rows)[DIM], uint64_t count) {
  pfc_matrix m;
  m.data = rows;
  m.dtype = PFC_F32;
  m.reserved = 0;
  m.rows = count;
  m.cols = DIM;
  m.row_stride = DIM;
  return m;
}

static void fill(void) {
  int i, j;
  for (i = 0; i < BATCH; i++) {
    for (j = 0; j < DIM; j++) values[i][j] = (float)((i * 5 + j * 3) % 7) - 2.5f;
  }
}

static pfc_head_options usual(void) {
  pfc_head_options options;
  WORKS(pfc_head_options_init(&options));
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  return options;
}

static void names_and_versions(void) {
  static const char *const names[] = {
      "PFC_OK", "PFC_ERROR_INVALID_ARGUMENT", "PFC_ERROR_UNSUPPORTED", "PFC_ERROR_OUT_OF_MEMORY",
      "PFC_ERROR_DEVICE", "PFC_ERROR_COMM", "PFC_ERROR_REMOTE", "PFC_ERROR_TIMEOUT",
      "PFC_ERROR_ABORTED", "PFC_ERROR_IO", "PFC_ERROR_CORRUPT", "PFC_ERROR_MISMATCH",
      "PFC_ERROR_LABEL", "PFC_ERROR_NOT_FINITE", "PFC_ERROR_POISONED", "PFC_ERROR_FORKED",
      "PFC_ERROR_PANIC"};
  pfc_status status;
  for (status = PFC_OK; status <= PFC_ERROR_PANIC; status++) {
    EXPECT(strcmp(pfc_status_name(status), names[status]) == 0);
  }
  EXPECT(strcmp(pfc_status_name(-1), "PFC_ERROR_UNKNOWN") == 0);
  EXPECT(strcmp(pfc_status_name(PFC_ERROR_PANIC + 1), "PFC_ERROR_UNKNOWN") == 0);
  EXPECT(pfc_version() == PFC_VERSION);
  EXPECT(strstr(pfc_build_info(), "partialfc") != NULL);
}

static void *last_error_of_a_new_thread(void *text) {
  strcpy(text, pfc_last_error());
  return NULL;
}

static void last_error(void) {
  char small[8], large[256], other[256] = "untouched";
  uint64_t size;
  pthread_t thread;
  FAILS(pfc_device_cpu(1, NULL), PFC_ERROR_INVALID_ARGUMENT, "out must not be NULL");
  size = pfc_last_error_copy(NULL, 0);
  EXPECT(size == strlen("out must not be NULL") + 1);
  memset(small, '#', sizeof small);
  EXPECT(pfc_last_error_copy(small, 5) == size);
  EXPECT(strcmp(small, "out ") == 0 && small[5] == '#');
  EXPECT(pfc_last_error_copy(small, 0) == size && small[5] == '#');
  EXPECT(pfc_last_error_copy(large, sizeof large) == size &&
         strcmp(large, "out must not be NULL") == 0);
  pthread_create(&thread, NULL, last_error_of_a_new_thread, other);
  pthread_join(thread, NULL);
  EXPECT(strcmp(other, "") == 0); /* each thread has its own */
}

static void nulls(pfc_device *device, pfc_comm *comm, pfc_head *head) {
  const pfc_head_options options = usual();
  const pfc_matrix e = matrix(values, BATCH), g = matrix(gradient, BATCH);
  pfc_matrix without_data = e;
  pfc_head *other = NULL;
  pfc_comm *own = NULL;
  pfc_traffic traffic;
  double loss = -1;
  uint64_t count = 0;

  FAILS(pfc_head_options_init(NULL), PFC_ERROR_INVALID_ARGUMENT,
        "pfc_head_options must not be NULL");
  FAILS(pfc_comm_self(NULL), PFC_ERROR_INVALID_ARGUMENT, "out must not be NULL");
  FAILS(pfc_comm_threads(2, NULL), PFC_ERROR_INVALID_ARGUMENT, "comms must not be NULL");
  FAILS(pfc_comm_custom(NULL, &comm), PFC_ERROR_INVALID_ARGUMENT, "pfc_comm_ops must not be NULL");
  FAILS(pfc_comm_barrier(NULL), PFC_ERROR_INVALID_ARGUMENT, "comm must not be NULL");
  /* A wrong argument of a collective ends the communicator: the other ranks may be waiting. */
  WORKS(pfc_comm_self(&own));
  FAILS(pfc_comm_all_gather(own, NULL, values, 8), PFC_ERROR_INVALID_ARGUMENT,
        "send must not be NULL");
  FAILS(pfc_comm_barrier(own), PFC_ERROR_ABORTED, "send must not be NULL");
  pfc_comm_free(own);
  FAILS(pfc_comm_traffic(comm, NULL), PFC_ERROR_INVALID_ARGUMENT, "out must not be NULL");
  FAILS(pfc_comm_traffic(NULL, &traffic), PFC_ERROR_INVALID_ARGUMENT, "comm must not be NULL");
  EXPECT(pfc_comm_rank(NULL) == UINT32_MAX && pfc_comm_size(NULL) == 0);
  EXPECT(pfc_device_info(NULL) == NULL);
  FAILS(pfc_head_create(NULL, comm, &options, &other), PFC_ERROR_INVALID_ARGUMENT, "device");
  FAILS(pfc_head_create(device, NULL, &options, &other), PFC_ERROR_INVALID_ARGUMENT, "comm");
  FAILS(pfc_head_create(device, comm, NULL, &other), PFC_ERROR_INVALID_ARGUMENT, "options");
  FAILS(pfc_head_create(device, comm, &options, NULL), PFC_ERROR_INVALID_ARGUMENT, "out");
  EXPECT(other == NULL);

  FAILS(pfc_head_forward(NULL, &e, labels, &loss), PFC_ERROR_INVALID_ARGUMENT,
        "head must not be NULL");
  FAILS(pfc_head_forward(head, NULL, labels, &loss), PFC_ERROR_INVALID_ARGUMENT, "embeddings");
  FAILS(pfc_head_forward(head, &e, NULL, &loss), PFC_ERROR_INVALID_ARGUMENT, "labels");
  FAILS(pfc_head_forward(head, &e, labels, NULL), PFC_ERROR_INVALID_ARGUMENT, "loss");
  without_data.data = NULL;
  FAILS(pfc_head_forward(head, &without_data, labels, &loss), PFC_ERROR_INVALID_ARGUMENT,
        "embeddings.data must not be NULL");
  FAILS(pfc_head_step(head, &e, labels, 0.1, NULL, &loss), PFC_ERROR_INVALID_ARGUMENT,
        "grad_embeddings");
  FAILS(pfc_head_prepare(head, NULL, BATCH), PFC_ERROR_INVALID_ARGUMENT, "labels");
  FAILS(pfc_head_set_sample(head, NULL, 3), PFC_ERROR_INVALID_ARGUMENT, "ids must not be NULL");
  FAILS(pfc_head_metrics(head, NULL), PFC_ERROR_INVALID_ARGUMENT, "metrics");
  FAILS(pfc_head_shard(head, NULL, &count), PFC_ERROR_INVALID_ARGUMENT, "first must not be NULL");
  FAILS(pfc_head_read_centers(head, 0, 1, NULL), PFC_ERROR_INVALID_ARGUMENT,
        "centers must not be NULL");
  FAILS(pfc_head_top_k(head, &e, 1, NULL, NULL), PFC_ERROR_INVALID_ARGUMENT,
        "ids must not be NULL");
  FAILS(pfc_plan(&options, 1, BATCH, NULL), PFC_ERROR_INVALID_ARGUMENT,
        "pfc_plan_report must not be NULL");
  EXPECT(loss == -1 && count == 0); /* outputs are written on success only */

  /* After all that the head still works. */
  WORKS(pfc_head_step(head, &e, labels, 0.1, &g, &loss));
  EXPECT(isfinite(loss) && loss > 0);
  pfc_head_free(NULL);
  pfc_comm_free(NULL);
  pfc_device_free(NULL);
}

/* Programs older and newer than the library. */
static void sizes(pfc_device *device, pfc_comm *comm) {
  struct newer {
    pfc_head_options known;
    uint64_t future;
  } newer;
  const uint64_t older = offsetof(pfc_head_options, precision);
  pfc_head_options options, reference = usual();
  unsigned char *bytes = (unsigned char *)&options;
  pfc_metrics metrics;
  pfc_head *head = NULL;
  size_t i;

  options = usual();
  options.struct_size = 0;
  FAILS(pfc_head_create(device, comm, &options, &head), PFC_ERROR_INVALID_ARGUMENT,
        "pfc_head_options.struct_size must be 8 to 65536, got 0: fill the struct with "
        "pfc_head_options_init first");
  options.struct_size = (uint64_t)1 << 40;
  FAILS(pfc_head_create(device, comm, &options, &head), PFC_ERROR_INVALID_ARGUMENT, "struct_size");
  memset(&metrics, 0, sizeof metrics);
  FAILS(pfc_plan(&reference, 1, BATCH, (pfc_plan_report *)(void *)&metrics),
        PFC_ERROR_INVALID_ARGUMENT, "struct_size must be 8 to 65536, got 0");

  /* An older program's struct ends earlier: nothing behind it is written, or read. */
  memset(&options, 0xEE, sizeof options);
  WORKS(pfc_head_options_init_sized(&options, older));
  EXPECT(options.struct_size == older && options.scale == 64.0);
  for (i = older; i < sizeof options; i++) EXPECT(bytes[i] == 0xEE);
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  WORKS(pfc_head_create(device, comm, &options, &head));
  pfc_head_free(head);
  head = NULL;

  /* A newer program's fields are fine as long as it leaves them zero. */
  memset(&newer, 0xEE, sizeof newer);
  WORKS(pfc_head_options_init_sized(&newer.known, sizeof newer));
  EXPECT(newer.known.struct_size == sizeof newer && newer.future == 0);
  newer.known.num_classes = CLASSES;
  newer.known.embedding_dim = DIM;
  newer.known.max_batch = BATCH;
  WORKS(pfc_head_create(device, comm, &newer.known, &head));
  pfc_head_free(head);
  head = NULL;
  newer.future = 1;
  FAILS(pfc_head_create(device, comm, &newer.known, &head), PFC_ERROR_UNSUPPORTED,
        "that this library");
  EXPECT(head == NULL);
}

static void options_out_of_range(pfc_device *device, pfc_comm *comm) {
  pfc_head *head = NULL;
  pfc_head_options options;
#define REFUSED(field, value, status, message)                            \
  options = usual();                                                      \
  options.field = value;                                                  \
  FAILS(pfc_head_create(device, comm, &options, &head), status, message)
  REFUSED(num_classes, 0, PFC_ERROR_INVALID_ARGUMENT, "num_classes");
  REFUSED(embedding_dim, 0, PFC_ERROR_INVALID_ARGUMENT, "embedding_dim");
  REFUSED(max_batch, (1u << 24) + 1, PFC_ERROR_INVALID_ARGUMENT, "max_batch");
  REFUSED(placement, 7, PFC_ERROR_INVALID_ARGUMENT, "placement must be one of 1, 2, got 7");
  REFUSED(sample_rate, 1.5, PFC_ERROR_INVALID_ARGUMENT, "sample_rate");
  REFUSED(sample_rate, NAN, PFC_ERROR_INVALID_ARGUMENT, "sample_rate");
  REFUSED(scale, 0, PFC_ERROR_INVALID_ARGUMENT, "scale");
  REFUSED(scale, 129, PFC_ERROR_INVALID_ARGUMENT, "scale");
  REFUSED(m2, 4, PFC_ERROR_INVALID_ARGUMENT, "m2");
  REFUSED(m3, -1, PFC_ERROR_INVALID_ARGUMENT, "m3");
  REFUSED(margin_gradient, 0, PFC_ERROR_INVALID_ARGUMENT, "margin_gradient");
  REFUSED(optimizer, 3, PFC_ERROR_INVALID_ARGUMENT, "optimizer");
  REFUSED(row_update, 0, PFC_ERROR_INVALID_ARGUMENT, "row_update");
  REFUSED(momentum, 1, PFC_ERROR_INVALID_ARGUMENT, "momentum");
  REFUSED(reserved, 1, PFC_ERROR_INVALID_ARGUMENT, "reserved must be 0, got 1");
  REFUSED(precision, 2 * PFC_PRECISION_HALF, PFC_ERROR_INVALID_ARGUMENT, "precision");
  REFUSED(weight_dtype, PFC_F16, PFC_ERROR_UNSUPPORTED, "weight_dtype must be f32 or bf16 in this version, got f16");
  REFUSED(state_dtype, PFC_F64, PFC_ERROR_INVALID_ARGUMENT, "state_dtype");
  REFUSED(residency, 4, PFC_ERROR_INVALID_ARGUMENT, "residency");
  REFUSED(residency, PFC_RESIDENCY_FILE, PFC_ERROR_INVALID_ARGUMENT, "storage_path must not be NULL");
  REFUSED(storage_path, "rows", PFC_ERROR_INVALID_ARGUMENT,
          "storage_path must be NULL unless residency is PFC_RESIDENCY_FILE (3)");
  REFUSED(storage_cache, 4096, PFC_ERROR_INVALID_ARGUMENT,
          "storage_cache must be 0 unless residency is PFC_RESIDENCY_FILE (3), got 4096");
#undef REFUSED
  EXPECT(head == NULL);
}

static void without_nccl(const pfc_device *device) {
  pfc_comm *comm = NULL;
  uint8_t id[128] = {0};
  /* Whatever NCCL the machine has. */
  setenv("PFC_NCCL_LIB", "/nowhere/libnccl.so.2", 1);
  FAILS(pfc_nccl_unique_id(id), PFC_ERROR_UNSUPPORTED, "/nowhere/libnccl.so.2");
  FAILS(pfc_nccl_unique_id(NULL), PFC_ERROR_INVALID_ARGUMENT, "id must not be NULL");
  FAILS(pfc_comm_nccl(NULL, 0, 1, device, &comm), PFC_ERROR_INVALID_ARGUMENT,
        "id must not be NULL");
  FAILS(pfc_comm_nccl(id, 0, 1, NULL, &comm), PFC_ERROR_INVALID_ARGUMENT,
        "device must not be NULL");
  FAILS(pfc_comm_nccl(id, 0, 1, device, NULL), PFC_ERROR_INVALID_ARGUMENT, "out must not be NULL");
  FAILS(pfc_comm_nccl(id, 0, 1, device, &comm), PFC_ERROR_INVALID_ARGUMENT,
        "must be a CUDA device");
  EXPECT(comm == NULL);
}

static void not_in_this_build(void) {
  pfc_device *cuda = NULL;
  FAILS(pfc_device_cuda(0, NULL, &cuda), PFC_ERROR_UNSUPPORTED, "CUDA");
  EXPECT(cuda == NULL);
}

static void checkpoints(pfc_head *head) {
  pfc_save_options save;
  pfc_load_options load;
  FAILS(pfc_save_options_init(NULL), PFC_ERROR_INVALID_ARGUMENT, "options must not be NULL");
  EXPECT(pfc_save_options_init(&save) == PFC_OK && pfc_load_options_init(&load) == PFC_OK);
  FAILS(pfc_head_save(NULL, "directory", &save), PFC_ERROR_INVALID_ARGUMENT, "head must not be");
  FAILS(pfc_head_save(head, NULL, &save), PFC_ERROR_INVALID_ARGUMENT, "directory must not be NULL");
  FAILS(pfc_head_save(head, "", &save), PFC_ERROR_INVALID_ARGUMENT, "directory must not be empty");
  FAILS(pfc_head_load(head, "/dev/null", &load), PFC_ERROR_IO, "/dev/null/manifest.json");
  FAILS(pfc_head_save(head, "/dev/null", NULL), PFC_ERROR_IO, "/dev/null");
  int32_t done = -7;
  FAILS(pfc_head_save_start(head, "", &save), PFC_ERROR_INVALID_ARGUMENT, "directory must not be empty");
  FAILS(pfc_head_save_start(head, "/dev/null", NULL), PFC_ERROR_IO, "/dev/null");
  FAILS(pfc_head_save_poll(head, NULL, &save), PFC_ERROR_INVALID_ARGUMENT, "done must not be NULL");
  FAILS(pfc_head_save_poll(head, &done, NULL), PFC_ERROR_INVALID_ARGUMENT,
        "no save is under way: pfc_head_save_start begins one");
  save.struct_size = 4;
  FAILS(pfc_head_save_poll(head, &done, &save), PFC_ERROR_INVALID_ARGUMENT, "struct_size");
  EXPECT(done == -7);
  FAILS(pfc_head_save(head, "/dev/null", &save), PFC_ERROR_INVALID_ARGUMENT, "struct_size");
  load.struct_size = 0;
  FAILS(pfc_head_load(head, "/dev/null", &load), PFC_ERROR_INVALID_ARGUMENT, "struct_size");
}

static void other_classes(pfc_head *head) {
  const int64_t map[1] = {0}, twice[2] = {1, 1}, into[2] = {0, 0};
  int64_t moved[1] = {-7};
  pfc_remap_options options;
  FAILS(pfc_remap_options_init(NULL), PFC_ERROR_INVALID_ARGUMENT, "options must not be NULL");
  EXPECT(pfc_remap_options_init(&options) == PFC_OK);
  FAILS(pfc_head_resize(NULL, 1, &options), PFC_ERROR_INVALID_ARGUMENT, "head must not be NULL");
  FAILS(pfc_head_resize(head, 0, &options), PFC_ERROR_INVALID_ARGUMENT, "num_classes must be at");
  FAILS(pfc_head_remap(head, 5, NULL, 0, NULL), PFC_ERROR_INVALID_ARGUMENT, "class_map must not be");
  FAILS(pfc_head_remap(head, 5, NULL, 1, NULL), PFC_ERROR_INVALID_ARGUMENT, "class_map must not be");
  FAILS(pfc_head_remap(head, 5, map, 1, NULL), PFC_ERROR_MISMATCH, "class_map has 1 entries");
  FAILS(pfc_head_merge(head, twice, into, 2, NULL, 0, NULL), PFC_ERROR_INVALID_ARGUMENT,
        "from[1] is class 1, which is in from already");
  FAILS(pfc_head_merge(head, NULL, into, 2, NULL, 0, NULL), PFC_ERROR_INVALID_ARGUMENT,
        "from must not be NULL");
  FAILS(pfc_head_merge(head, twice, into, 1, moved, 1, NULL), PFC_ERROR_INVALID_ARGUMENT,
        "class_map_capacity must be at least");
  EXPECT(moved[0] == -7);
  options.class_weights_count = 3;
  FAILS(pfc_head_merge(head, twice, into, 1, NULL, 0, &options), PFC_ERROR_INVALID_ARGUMENT,
        "class_weights must not be NULL");
  options.struct_size = 3;
  FAILS(pfc_head_resize(head, 5, &options), PFC_ERROR_INVALID_ARGUMENT, "struct_size");
}

static void steps(pfc_head *head) {
  pfc_matrix e = matrix(values, BATCH), g = matrix(gradient, BATCH), wrong = e;
  float before[BATCH][DIM], after[BATCH][DIM], more[BATCH + 1][DIM] = {{0}};
  const pfc_matrix b = matrix(before, BATCH), a = matrix(after, BATCH);
  const pfc_matrix too_many = matrix(more, BATCH + 1);
  const int64_t five[BATCH + 1] = {0};
  int64_t bad[BATCH];
  double loss = -1;

  WORKS(pfc_head_read_centers(head, 0, BATCH, &b));

  /* In the wrong order. */
  FAILS(pfc_head_backward(head, 1, 1, &g), PFC_ERROR_INVALID_ARGUMENT, "forward");
  FAILS(pfc_head_update(head, 0.1), PFC_ERROR_INVALID_ARGUMENT, "backward");

  /* Matrices that are not what they should be. */
  wrong.cols = DIM - 1;
  FAILS(pfc_head_forward(head, &wrong, labels, &loss), PFC_ERROR_INVALID_ARGUMENT,
        "embeddings.cols must be 8, got 7");
  wrong = e;
  wrong.row_stride = DIM - 1;
  FAILS(pfc_head_forward(head, &wrong, labels, &loss), PFC_ERROR_INVALID_ARGUMENT, "row_stride");
  wrong = e;
  wrong.dtype = 9;
  FAILS(pfc_head_forward(head, &wrong, labels, &loss), PFC_ERROR_INVALID_ARGUMENT,
        "(3), got 9");
  wrong.dtype = PFC_F64;
  FAILS(pfc_head_forward(head, &wrong, labels, &loss), PFC_ERROR_INVALID_ARGUMENT,
        "embeddings.dtype must be f32, f16 or bf16, got f64");
  FAILS(pfc_head_forward(head, &too_many, five, &loss), PFC_ERROR_INVALID_ARGUMENT, "max_batch");

  /* Data that are not what they should be: the message names the row. */
  memcpy(bad, labels, sizeof bad);
  bad[2] = CLASSES;
  FAILS(pfc_head_forward(head, &e, bad, &loss), PFC_ERROR_LABEL, "50");
  EXPECT(strstr(pfc_last_error(), "labels[2]") != NULL);
  bad[2] = -1;
  FAILS(pfc_head_forward(head, &e, bad, &loss), PFC_ERROR_LABEL, "-1");
  values[1][3] = NAN;
  FAILS(pfc_head_forward(head, &e, labels, &loss), PFC_ERROR_NOT_FINITE, "row 1");
  values[1][3] = INFINITY;
  FAILS(pfc_head_step(head, &e, labels, 0.1, &g, &loss), PFC_ERROR_NOT_FINITE, "row 1");
  fill();

  /* Learning rates, and reads beyond the shard. */
  WORKS(pfc_head_forward(head, &e, labels, &loss));
  WORKS(pfc_head_backward(head, 1, 1, &g));
  FAILS(pfc_head_update(head, -0.1), PFC_ERROR_INVALID_ARGUMENT, "learning_rate");
  FAILS(pfc_head_update(head, NAN), PFC_ERROR_INVALID_ARGUMENT, "learning_rate");
  FAILS(pfc_head_read_centers(head, CLASSES - 1, BATCH, &a), PFC_ERROR_INVALID_ARGUMENT,
        "got 49 to 52");
  FAILS(pfc_head_read_centers(head, 0, 2, &a), PFC_ERROR_INVALID_ARGUMENT,
        "centers.rows must be 2, the count from class 0, got 4");
  FAILS(pfc_head_read_state(head, 9, 0, BATCH, &a), PFC_ERROR_INVALID_ARGUMENT, "(2), got 9");

  /* Nothing of all this has changed a class center, and the head still works. */
  WORKS(pfc_head_read_centers(head, 0, BATCH, &a));
  EXPECT(memcmp(before, after, sizeof before) == 0);
  WORKS(pfc_head_step(head, &e, labels, 0.1, &g, &loss));
  WORKS(pfc_head_wait(head));
  WORKS(pfc_head_read_centers(head, 0, BATCH, &a));
  EXPECT(memcmp(before, after, sizeof before) != 0);
}

/* A child of fork() is told so, and the parent does not notice. */
static void forked(pfc_head *head) {
  const pfc_matrix e = matrix(values, BATCH), g = matrix(gradient, BATCH);
  double loss;
  int code = -1;
  const pid_t child = fork();
  if (child == 0) {
    const pfc_status status = pfc_head_step(head, &e, labels, 0.1, &g, &loss);
    _exit(status == PFC_ERROR_FORKED ? 0 : 1);
  }
  waitpid(child, &code, 0);
  EXPECT(WIFEXITED(code) && WEXITSTATUS(code) == 0);
  WORKS(pfc_head_step(head, &e, labels, 0.1, &g, &loss));
}

/* A child that frees the head leaves the parent's save alone. */
static void forked_while_saving(pfc_head *head) {
  const struct timespec pause = {0, 1000000};
  char folder[] = "/tmp/partialfc-errors-XXXXXX", file[64];
  int32_t done = 0;
  int code = -1;
  pid_t child;
  EXPECT(mkdtemp(folder) != NULL);
  WORKS(pfc_head_save_start(head, folder, NULL));
  child = fork();
  if (child == 0) {
    pfc_head_free(head);
    _exit(0);
  }
  waitpid(child, &code, 0);
  EXPECT(WIFEXITED(code) && WEXITSTATUS(code) == 0);
  for (; !done && failures == 0; nanosleep(&pause, NULL)) WORKS(pfc_head_save_poll(head, &done, NULL));
  WORKS(pfc_head_load(head, folder, NULL));
  snprintf(file, sizeof file, "%s/manifest.json", folder);
  EXPECT(unlink(file) == 0);
  snprintf(file, sizeof file, "%s/rows-1-0-of-1.safetensors", folder);
  EXPECT(unlink(file) == 0 && rmdir(folder) == 0);
}

static int lines;

static void count_line(void *user, int32_t level, const char *message) {
  if (user == &lines && level >= PFC_LOG_ERROR && level <= PFC_LOG_INFO && *message != 0) lines++;
}

static int dropped = 0;

static void count_dropped(void *user, int32_t level, const char *message) {
  (void)user;
  if (level == PFC_LOG_WARN && strstr(message, "is dropped") != NULL) dropped++;
}

/* A gradient of the class centers that nobody used is told of once. */
static void dropped_gradients(pfc_device *device, pfc_comm *comm) {
  const pfc_head_options options = usual();
  const pfc_matrix e = matrix(values, BATCH), g = matrix(gradient, BATCH);
  pfc_head *head = NULL;
  double loss = -1;
  int i;
  WORKS(pfc_set_log(count_dropped, NULL, PFC_LOG_WARN));
  WORKS(pfc_head_create(device, comm, &options, &head));
  for (i = 0; i < 6; i++) {
    WORKS(pfc_head_forward(head, &e, labels, &loss));
    if (i != 3) WORKS(pfc_head_backward(head, 1, 1, &g));
    if (i == 0) WORKS(pfc_head_update(head, 0.1));
    if (i == 1) WORKS(pfc_head_accumulate(head));
    /* A forward after steps 0 and 1 drops nothing, one after 2 and 4 does. */
    EXPECT(dropped == (i > 2));
  }
  pfc_head_free(head);
  WORKS(pfc_set_log(NULL, NULL, PFC_LOG_OFF));
}

static void logging(pfc_device *device, pfc_comm *comm) {
  const pfc_head_options options = usual();
  pfc_head *head = NULL;
  FAILS(pfc_set_log(count_line, &lines, 99), PFC_ERROR_INVALID_ARGUMENT, "(4), got 99");
  WORKS(pfc_set_log(count_line, &lines, PFC_LOG_INFO));
  WORKS(pfc_head_create(device, comm, &options, &head));
  pfc_head_free(head);
  EXPECT(lines > 0);
  WORKS(pfc_set_log(NULL, NULL, PFC_LOG_OFF));
  lines = 0;
  WORKS(pfc_head_create(device, comm, &options, &head));
  pfc_head_free(head);
  EXPECT(lines == 0);
}

int main(void) {
  const pfc_head_options options = usual();
  pfc_device *device = NULL;
  pfc_comm *comm = NULL;
  pfc_head *head = NULL;
  fill();
  names_and_versions();
  last_error();
  WORKS(pfc_device_cpu(2, &device));
  WORKS(pfc_comm_self(&comm));
  WORKS(pfc_head_create(device, comm, &options, &head));
  if (failures > 0) return 1;
  nulls(device, comm, head);
  sizes(device, comm);
  options_out_of_range(device, comm);
  without_nccl(device);
  not_in_this_build();
  checkpoints(head);
  other_classes(head);
  steps(head);
  forked(head);
  forked_while_saving(head);
  logging(device, comm);
  dropped_gradients(device, comm);
  pfc_device_free(device); /* the head holds what it needs */
  pfc_comm_free(comm);
  steps(head);
  pfc_head_free(head);
  printf("%d failures\n", failures);
  return failures > 0;
}
