/*
 * What share of a head's step over MPI is communication.
 *
 *   mpicc -O2 benches/mpi_step.c -lpartialfc && mpirun -n 2 ./a.out
 *   mpirun -n 2 ./a.out BATCH CLASSES RATE DIM STEPS
 *
 * BATCH is a rank's own. Timed are the functions of partialfc_mpi.h, from call to return. They wait
 * for ranks that are late: of each step the rank that spent least in them counts, and what the one
 * that spent most waited for its arithmetic is told apart. Printed are the medians over the steps,
 * the first few left out.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "partialfc_mpi.h"

static pfc_comm_ops inner;
static double communication;

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int32_t all_gather(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
  const double start = seconds();
  const int32_t code = inner.all_gather(ctx, send, recv, bytes, stream);
  communication += seconds() - start;
  return code;
}

static int32_t all_reduce(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                          int32_t op, void *stream) {
  const double start = seconds();
  const int32_t code = inner.all_reduce(ctx, send, recv, count, dtype, op, stream);
  communication += seconds() - start;
  return code;
}

static int32_t reduce_scatter(void *ctx, const void *send, void *recv, uint64_t count,
                              int32_t dtype, int32_t op, void *stream) {
  const double start = seconds();
  const int32_t code = inner.reduce_scatter(ctx, send, recv, count, dtype, op, stream);
  communication += seconds() - start;
  return code;
}

static void check(pfc_status status, const char *what) {
  if (status == PFC_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, pfc_status_name(status), pfc_mpi_last_error());
  MPI_Abort(MPI_COMM_WORLD, 1);
}

static int ascending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *values, long count) {
  qsort(values, (size_t)count, sizeof *values, ascending);
  return values[count / 2];
}

int main(int argc, char **argv) {
  enum { WARM_UP = 3 };
  long batch = 256, classes = 200000, dim = 512, steps = 40, i, step;
  double rate = 0.1, loss = 0;
  float *embeddings, *gradient;
  double *whole, *least, *most;
  int64_t *labels;
  pfc_matrix e = {NULL, PFC_F32, 0, 0, 0, 0}, g;
  pfc_comm_ops ops;
  pfc_comm *comm;
  pfc_device *device;
  pfc_head *head;
  pfc_head_options options;
  pfc_plan_report plan;
  uint64_t random = 1;
  int level, rank, size;

  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (argc > 1) batch = atol(argv[1]);
  if (argc > 2) classes = atol(argv[2]);
  if (argc > 3) rate = atof(argv[3]);
  if (argc > 4) dim = atol(argv[4]);
  if (argc > 5) steps = atol(argv[5]);
  if (batch < 1 || classes < 1 || dim < 1 || steps < 1 || argc > 6) {
    fprintf(stderr, "usage: %s [BATCH [CLASSES [RATE [DIM [STEPS]]]]]\n", argv[0]);
    MPI_Abort(MPI_COMM_WORLD, 2);
  }
  embeddings = malloc((size_t)(batch * dim) * sizeof *embeddings);
  gradient = malloc((size_t)(batch * dim) * sizeof *gradient);
  labels = malloc((size_t)batch * sizeof *labels);
  whole = malloc((size_t)steps * sizeof *whole);
  least = malloc((size_t)steps * sizeof *least);
  most = malloc((size_t)steps * sizeof *most);
  if (!embeddings || !gradient || !labels || !whole || !least || !most) {
    check(PFC_ERROR_OUT_OF_MEMORY, "malloc");
  }

  check(pfc_mpi_ops(MPI_COMM_WORLD, &ops), "pfc_mpi_ops");
  inner = ops;
  ops.all_gather = all_gather;
  ops.all_reduce = all_reduce;
  ops.reduce_scatter = reduce_scatter;
  check(pfc_comm_custom(&ops, &comm), "pfc_comm_custom");
  check(pfc_device_cpu(1, &device), "pfc_device_cpu");
  check(pfc_head_options_init(&options), "pfc_head_options_init");
  options.num_classes = (uint64_t)classes;
  options.embedding_dim = (uint32_t)dim;
  options.max_batch = (uint64_t)batch;
  options.sample_rate = rate;
  check(pfc_head_create(device, comm, &options, &head), "pfc_head_create");
  check(pfc_plan_report_init(&plan), "pfc_plan_report_init");
  check(pfc_plan(&options, (uint32_t)size, (uint64_t)batch, &plan), "pfc_plan");

  e.data = embeddings;
  e.rows = (uint64_t)batch;
  e.cols = e.row_stride = (uint64_t)dim;
  g = e;
  g.data = gradient;
  for (step = -WARM_UP; step < steps; step++) {
    double start, all, mine, lowest, highest;
    for (i = 0; i < batch * (dim + 1); i++) {
      random = random * 6364136223846793005u + 1442695040888963407u + (uint64_t)rank;
      if (i < batch) labels[i] = (int64_t)((random >> 33) % (uint64_t)classes);
      else embeddings[i - batch] = (float)(random >> 40) / 8388608.0f - 1.0f;
    }
    MPI_Barrier(MPI_COMM_WORLD);
    communication = 0;
    start = seconds();
    check(pfc_head_step(head, &e, labels, 0.1, &g, &loss), "pfc_head_step");
    all = seconds() - start;
    mine = communication;
    MPI_Allreduce(&mine, &lowest, 1, MPI_DOUBLE, MPI_MIN, MPI_COMM_WORLD);
    MPI_Allreduce(&mine, &highest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    if (step < 0) continue;
    whole[step] = all;
    least[step] = lowest;
    most[step] = highest;
  }
  if (rank == 0) {
    const double all = median(whole, steps), low = median(least, steps), high = median(most, steps);
    printf("%d ranks, batch %ld on each, C %ld, rate %g, d %ld, %.2f MB from each rank, %s\n", size,
           batch, classes, rate, dim, (double)plan.traffic_bytes / 1e6, pfc_device_info(device));
    printf("a step %.2f ms; communication %.2f ms, %.1f %%; with the wait for a late rank %.2f ms\n",
           1e3 * all, 1e3 * low, 100 * low / all, 1e3 * high);
  }
  pfc_head_free(head);
  pfc_comm_free(comm);
  pfc_device_free(device);
  free(embeddings);
  free(gradient);
  free(labels);
  free(whole);
  free(least);
  free(most);
  MPI_Finalize();
  return 0;
}
