/*
 * A program of another version than the library that it runs with. It is compiled with an earlier
 * header, whose structs are shorter than the library's; and with LATER and today's header, in which
 * the tests have given every struct that may grow one field more, named later.
 *
 *   program VERSION FOLDER    the header's PFC_VERSION; where to make a folder for a checkpoint
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

enum { CLASSES = 100, DIM = 8, BATCH = 10, STEPS = 30 };

static void check(pfc_status status, const char *what) {
  if (status != PFC_OK) {
    printf("%s: %s: %s\n", what, pfc_status_name(status), pfc_last_error());
    exit(1);
  }
}

/* The call must fail, with this status and with this name in its text. */
static void refused(pfc_status status, pfc_status expected, const char *name) {
  if (status != expected || strstr(pfc_last_error(), name) == NULL) {
    printf("%s: %s instead of %s: %s\n", name, pfc_status_name(status), pfc_status_name(expected),
           pfc_last_error());
    exit(1);
  }
}

static void must(int holds, const char *what) {
  if (!holds) {
    printf("not so: %s\n", what);
    exit(1);
  }
}

/* A call with a struct whose later field is 0 works. If it is set, the library does not know it. */
#ifdef LATER
#define CALL(struct_of, type, call)             \
  do {                                          \
    (struct_of)->later = 1;                     \
    refused(call, PFC_ERROR_UNSUPPORTED, type); \
    (struct_of)->later = 0;                     \
    check(call, #call);                         \
  } while (0)
/* What the library fills in it leaves as it is. */
#define UNTOUCHED(struct_of) must((struct_of)->later == 0, #struct_of)
#else
#define CALL(struct_of, type, call) check(call, #call)
#define UNTOUCHED(struct_of) (void)(struct_of)
#endif

/* A communicator of one rank. */
static int32_t gather(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
  (void)ctx, (void)stream;
  memmove(recv, send, bytes);
  return 0;
}

static int32_t reduce(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                      int32_t op, void *stream) {
  const uint64_t size = dtype == PFC_F32 || dtype == PFC_I32 ? 4 : 8;
  (void)op;
  return gather(ctx, send, recv, count * size, stream);
}

static int32_t broadcast(void *ctx, void *buffer, uint64_t bytes, uint32_t root, void *stream) {
  (void)ctx, (void)buffer, (void)bytes, (void)root, (void)stream;
  return 0;
}

static int32_t barrier(void *ctx) {
  (void)ctx;
  return 0;
}

static void end(void *ctx) { (void)ctx; }

static float values[BATCH * DIM], gradient[BATCH * DIM];
static float centers[CLASSES * DIM], again[CLASSES * DIM];
static int64_t labels[BATCH];

int main(int count, char **arguments) {
  const pfc_matrix embeddings = {values, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix grad = {gradient, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix rows = {centers, PFC_F32, 0, CLASSES, DIM, DIM};
  const pfc_matrix rows_again = {again, PFC_F32, 0, CLASSES, DIM, DIM};
  const pfc_matrix one = {centers, PFC_F32, 0, 1, DIM, DIM};
  const pfc_matrix moment = {again, PFC_F32, 0, 1, DIM, DIM};
  const pfc_matrix one_gradient = {gradient, PFC_F32, 0, 1, DIM, DIM};
  pfc_device *device = NULL;
  pfc_comm *comm = NULL;
  pfc_head *head = NULL;
  pfc_comm_ops ops;
  pfc_head_options options;
  pfc_metrics metrics;
  pfc_plan_report report;
  pfc_margin margin;
  pfc_optimizer optimizer;
  pfc_save_options save;
  pfc_load_options load;
  const int64_t first_row = 0;
  float cosine = 0.5f, logit = 0;
  double first = 0, loss = 0;
  uint64_t k;
  int step;

  must(count == 3, "two arguments");
  must(PFC_VERSION == strtol(arguments[1], NULL, 10), "this is the header that was meant");
  must(pfc_version() >= PFC_VERSION, "the library is of this version or a later one");

  check(pfc_comm_ops_init(&ops), "pfc_comm_ops_init");
  ops.size = 1;
  ops.flags = PFC_COMM_HOST_MEMORY;
  ops.all_gather = gather;
  ops.all_reduce = reduce;
  ops.reduce_scatter = reduce;
  ops.broadcast = broadcast;
  ops.barrier = barrier;
  ops.abort = end;
  ops.free = end;
  CALL(&ops, "pfc_comm_ops", pfc_comm_custom(&ops, &comm));

  check(pfc_device_cpu(1, &device), "pfc_device_cpu");
  check(pfc_head_options_init(&options), "pfc_head_options_init");
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 0.5;
  options.scale = 16;
  options.m2 = 0.1;
  CALL(&options, "pfc_head_options", pfc_head_create(device, comm, &options, &head));
  check(pfc_plan_report_init(&report), "pfc_plan_report_init");
  CALL(&options, "pfc_head_options", pfc_plan(&options, 1, BATCH, &report));
  must(report.shard_rows == CLASSES && report.traffic_bytes > 0, "a report");
  UNTOUCHED(&report);

  for (k = 0; k < BATCH; k++) labels[k] = (int64_t)(k * 7);
  for (k = 0; k < BATCH * DIM; k++) values[k] = (float)((k * 37 + k / DIM * 11) % 19) / 9 - 1;
  for (step = 0; step < STEPS; step++) {
    check(pfc_head_step(head, &embeddings, labels, 0.1, &grad, &loss), "pfc_head_step");
    if (step == 0) first = loss;
  }
  must(loss < first, "the loss falls");
  check(pfc_metrics_init(&metrics), "pfc_metrics_init");
  check(pfc_head_metrics(head, &metrics), "pfc_head_metrics");
  must(metrics.updates == STEPS && metrics.rows == BATCH, "the figures of the last step");
  must(fabs(metrics.loss - loss) < 1e-6 && metrics.seconds_update >= 0, "its loss");
  UNTOUCHED(&metrics);

  labels[3] = CLASSES;
  refused(pfc_head_step(head, &embeddings, labels, 0.1, &grad, &loss), PFC_ERROR_LABEL,
          "labels[3]");
  labels[3] = 21;
  options.struct_size = 3;
  refused(pfc_plan(&options, 1, BATCH, &report), PFC_ERROR_INVALID_ARGUMENT, "struct_size");
  refused(pfc_head_update(NULL, 0.1), PFC_ERROR_INVALID_ARGUMENT, "head");

#ifdef LATER
  {
    pfc_forward_options forward;
    pfc_backward_options backward;
    pfc_update_options update;
    pfc_remap_options remap;
    int64_t map[CLASSES];
    for (k = 0; k < CLASSES; k++) map[k] = (int64_t)k;
    check(pfc_forward_options_init(&forward), "pfc_forward_options_init");
    check(pfc_backward_options_init(&backward), "pfc_backward_options_init");
    check(pfc_update_options_init(&update), "pfc_update_options_init");
    check(pfc_remap_options_init(&remap), "pfc_remap_options_init");
    update.learning_rate = 0.1;
    CALL(&forward, "pfc_forward_options",
         pfc_head_forward_with(head, &embeddings, labels, &forward, &loss));
    /* A step that is refused begins anew. */
    backward.later = 1;
    refused(pfc_head_backward_with(head, &backward, &grad), PFC_ERROR_UNSUPPORTED,
            "pfc_backward_options");
    backward.later = 0;
    check(pfc_head_forward_with(head, &embeddings, labels, &forward, &loss),
          "pfc_head_forward_with");
    check(pfc_head_backward_with(head, &backward, &grad), "pfc_head_backward_with");
    CALL(&update, "pfc_update_options", pfc_head_update_with(head, &update));
    CALL(&remap, "pfc_remap_options", pfc_head_remap(head, CLASSES, map, CLASSES, &remap));
  }
#endif

  /* Structs that had their size and nothing else when the first programs were compiled. */
  memset(&save, 0, sizeof save);
  memset(&load, 0, sizeof load);
  save.struct_size = sizeof save;
  load.struct_size = sizeof load;
  CALL(&save, "pfc_save_options", pfc_head_save(head, arguments[2], &save));
  check(pfc_head_read_centers(head, 0, CLASSES, &rows), "pfc_head_read_centers");
  check(pfc_head_step(head, &embeddings, labels, 0.1, &grad, &loss), "pfc_head_step");
  CALL(&load, "pfc_load_options", pfc_head_load(head, arguments[2], &load));
  check(pfc_head_read_centers(head, 0, CLASSES, &rows_again), "pfc_head_read_centers");
  must(memcmp(centers, again, sizeof centers) == 0, "a load brings back what was saved");

  check(pfc_margin_init(&margin), "pfc_margin_init");
  margin.m2 = 0;
  CALL(&margin, "pfc_margin", pfc_margin_forward(device, &margin, &cosine, 1, &logit));
  must(fabs(logit - margin.scale * cosine) < 1e-3, "a logit without a margin");
  check(pfc_optimizer_init(&optimizer), "pfc_optimizer_init");
  CALL(&optimizer, "pfc_optimizer",
       pfc_update_rows(device, &optimizer, &one, &moment, NULL, &first_row, &one_gradient, 0.1, 1));

  pfc_head_free(head);
  pfc_comm_free(comm);
  pfc_device_free(device);
  printf("version %d.%d, loss %.3f to %.3f\n", PFC_VERSION_MAJOR, PFC_VERSION_MINOR, first, loss);
  return 0;
}
