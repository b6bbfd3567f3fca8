/*
 * A rank that dies, stops, gives up or loses its place while others train with it over MPI.
 *
 *   mpicc -std=c99 faults.c -lpartialfc && mpirun -n 3 ./a.out FAULT OPERATION TIMEOUT_MS FOLDER
 *
 * Rank 1 trains until its OPERATION-th collective (1: a step's labels, 2: its embeddings, 3: its
 * sums, 4: its gradient, 5: the next step's labels), and there
 *
 *   kill   is killed (SIGKILL)
 *   stop   is stopped (SIGSTOP)
 *   abort  calls pfc_comm_abort before the step of that operation
 *   part   is in a barrier where the others are in the step of that operation
 *   length gathers another number of bytes than the others
 *
 * Each rank writes its process id to FOLDER/<rank>.pid and, unless it is gone, what became of its
 * training to FOLDER/<rank>.end. The launcher must not end the others when one dies: Open MPI's
 * with --mca orte_enable_recovery 1, MPICH's with -disable-auto-cleanup and setsid --wait before
 * the program, since it still kills its ranks' process groups when one of them hangs up.
 */
#define _POSIX_C_SOURCE 200809L
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "partialfc_mpi.h"

enum { CLASSES = 300, DIM = 24, BATCH = 16, STEPS = 100, LONGEST_MS = 120000 };

static int rank, size;
static const char *folder;

static void note(const char *kind, const char *text) {
  char path[4096], part[4096];
  FILE *file;
  snprintf(path, sizeof path, "%.3900s/%d.%s", folder, rank, kind);
  snprintf(part, sizeof part, "%.3900s/%d.part", folder, rank);
  file = fopen(part, "w");
  if (file == NULL || fputs(text, file) < 0 || fclose(file) != 0 || rename(part, path) != 0) {
    perror(path);
    _exit(2);
  }
}

static void sleep_ms(int ms) {
  struct timespec pause;
  pause.tv_sec = ms / 1000;
  pause.tv_nsec = ms % 1000 * 1000000L;
  nanosleep(&pause, NULL);
}

/* Whether all ranks but those gone have written their end. */
static int all_ended(int gone) {
  char path[4096];
  int r;
  for (r = 0; r < size; r++) {
    snprintf(path, sizeof path, "%.3900s/%d.end", folder, r);
    if (r != gone && access(path, R_OK) != 0) return 0;
  }
  return 1;
}

/* The table of partialfc_mpi.h, with a signal at one of its operations. */
static pfc_comm_ops inner;
static int operations, fatal_operation, fatal_signal, wrong_length;

static int counted(void) {
  if (++operations != fatal_operation) return 0;
  if (fatal_signal != 0) raise(fatal_signal);
  return wrong_length;
}

static int32_t all_gather(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
  if (counted()) bytes /= 2;
  return inner.all_gather(ctx, send, recv, bytes, stream);
}

static int32_t all_reduce(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                          int32_t op, void *stream) {
  counted();
  return inner.all_reduce(ctx, send, recv, count, dtype, op, stream);
}

static int32_t reduce_scatter(void *ctx, const void *send, void *recv, uint64_t count,
                              int32_t dtype, int32_t op, void *stream) {
  counted();
  return inner.reduce_scatter(ctx, send, recv, count, dtype, op, stream);
}

static void check(pfc_status status, const char *what) {
  if (status == PFC_OK) return;
  fprintf(stderr, "rank %d: %s: %s\n", rank, what, pfc_mpi_last_error());
  MPI_Abort(MPI_COMM_WORLD, 1);
}

int main(int argc, char **argv) {
  static float embeddings[BATCH * DIM], gradient[BATCH * DIM];
  static int64_t labels[BATCH];
  const pfc_matrix e = {embeddings, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix g = {gradient, PFC_F32, 0, BATCH, DIM, DIM};
  const char *fault;
  char text[1024], id[32];
  pfc_device *device;
  pfc_comm *comm;
  pfc_head *head;
  pfc_head_options options;
  pfc_comm_ops ops;
  pfc_status status = PFC_OK;
  double loss;
  int level, operation, gone, step, i, waited;

  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (argc != 5 || size < 2) {
    fprintf(stderr, "usage: mpirun -n 3 %s FAULT OPERATION TIMEOUT_MS FOLDER\n", argv[0]);
    return 2;
  }
  fault = argv[1];
  operation = atoi(argv[2]);
  folder = argv[4];
  gone = strcmp(fault, "kill") == 0 || strcmp(fault, "stop") == 0 ? 1 : -1;
  snprintf(id, sizeof id, "%ld\n", (long)getpid());
  note("pid", id);

  check(pfc_mpi_ops(MPI_COMM_WORLD, &ops), "pfc_mpi_ops");
  inner = ops;
  ops.all_gather = all_gather;
  ops.all_reduce = all_reduce;
  ops.reduce_scatter = reduce_scatter;
  check(pfc_comm_custom(&ops, &comm), "pfc_comm_custom");
  check(pfc_device_cpu(1, &device), "pfc_device_cpu");
  check(pfc_head_options_init(&options), "pfc_head_options_init");
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 0.3;
  check(pfc_head_create(device, comm, &options, &head), "pfc_head_create");
  /* All are here: from now on a late rank is a lost one. */
  MPI_Barrier(MPI_COMM_WORLD);
  check(pfc_comm_set_timeout(comm, (uint64_t)atoll(argv[3])), "pfc_comm_set_timeout");

  operations = 0;
  if (rank == 1) {
    fatal_operation = operation;
    if (strcmp(fault, "kill") == 0) fatal_signal = SIGKILL;
    if (strcmp(fault, "stop") == 0) fatal_signal = SIGSTOP;
    wrong_length = strcmp(fault, "length") == 0;
  }
  for (step = 0; status == PFC_OK && step < STEPS; step++) {
    for (i = 0; i < BATCH; i++) labels[i] = (step * 37 + rank * 11 + i * 5) % CLASSES;
    for (i = 0; i < BATCH * DIM; i++) embeddings[i] = (float)((i * 31 + step * 7) % 23) - 11;
    if (rank == 1 && operations + 4 >= operation) {
      if (strcmp(fault, "abort") == 0) check(pfc_comm_abort(comm), "pfc_comm_abort");
      if (strcmp(fault, "part") == 0) status = pfc_comm_barrier(comm);
    }
    if (status == PFC_OK) status = pfc_head_step(head, &e, labels, 0.1, &g, &loss);
  }
  snprintf(text, sizeof text, "%s: %.900s\n", pfc_status_name(status),
           status == PFC_OK ? "" : pfc_last_error());
  pfc_head_free(head);
  pfc_comm_free(comm);
  pfc_device_free(device);
  note("end", text);
  if (gone < 0) {
    MPI_Finalize(); /* nobody is lost */
    return 0;
  }
  /* MPI cannot be finalized without the lost rank; and nobody goes before all have told. */
  for (waited = 0; !all_ended(gone) && waited < LONGEST_MS; waited += 20) sleep_ms(20);
  _exit(0);
}
