/*
 * A rank that dies or stops while others train with it over NCCL; MPI starts them and carries the
 * id.
 *
 *   mpicc -std=c99 nccl_faults.c -lpartialfc -lpthread
 *   mpirun -n 3 ./a.out FAULT MOMENT TIMEOUT_MS FOLDER
 *
 * In its third step rank 1 is killed (FAULT kill: SIGKILL) or stopped (stop: SIGSTOP), when, with
 * TIMEOUT_MS from there on,
 *
 *   before   it has called nothing of the step: the others wait for its labels
 *   between  its forward pass is over: the others wait for its share of the gradient
 *   amid     another thread of it finds some milliseconds passed: anywhere
 *
 * Each rank writes its process id to FOLDER/<rank>.pid and, unless it is gone, what became of its
 * training to FOLDER/<rank>.end. The launcher must not end the others when one dies; faults.c says
 * how it is told.
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "partialfc_mpi.h"

enum { CLASSES = 40, DIM = 8, BATCH = 5, STEPS = 100000, LONGEST_MS = 120000 };

static int rank, size, fault;
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

/* Whether the ranks that live have written their end. */
static int all_ended(void) {
  char path[4096];
  int r;
  for (r = 0; r < size; r++) {
    snprintf(path, sizeof path, "%.3900s/%d.end", folder, r);
    if (r != 1 && access(path, R_OK) != 0) return 0;
  }
  return 1;
}

static void check(pfc_status status, const char *what) {
  if (status == PFC_OK) return;
  fprintf(stderr, "rank %d: %s: %s\n", rank, what, pfc_mpi_last_error());
  MPI_Abort(MPI_COMM_WORLD, 1);
}

static void limit_waits(pfc_comm *comm, const char *ms) {
  check(pfc_comm_set_timeout(comm, (uint64_t)atoll(ms)), "pfc_comm_set_timeout");
}

/* Ends or stops the process soon, whatever its other threads do. */
static void *soon(void *unused) {
  sleep_ms(25);
  kill(getpid(), fault);
  return unused;
}

static void strike(const char *moment, const char *now) {
  pthread_t thread;
  if (strcmp(moment, now) != 0) return;
  if (strcmp(now, "amid") != 0) raise(fault);
  else if (pthread_create(&thread, NULL, soon, NULL) != 0) MPI_Abort(MPI_COMM_WORLD, 1);
}

int main(int argc, char **argv) {
  static float embeddings[BATCH * DIM], gradient[BATCH * DIM];
  static int64_t labels[BATCH];
  const pfc_matrix e = {embeddings, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix g = {gradient, PFC_F32, 0, BATCH, DIM, DIM};
  const char *moment;
  char text[1024];
  uint8_t nccl_id[128];
  MPI_Comm machine;
  pfc_device *device;
  pfc_comm *comm;
  pfc_head *head;
  pfc_head_options options;
  pfc_status status = PFC_OK;
  double loss;
  int level, local, step, i, waited;

  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (argc != 5 || size < 2) {
    fprintf(stderr, "usage: mpirun -n 3 %s FAULT MOMENT TIMEOUT_MS FOLDER\n", argv[0]);
    return 2;
  }
  fault = strcmp(argv[1], "kill") == 0 ? SIGKILL : SIGSTOP;
  moment = argv[2];
  folder = argv[4];
  snprintf(text, sizeof text, "%ld\n", (long)getpid());
  note("pid", text);

  /* A GPU for each rank of a machine. */
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &machine);
  MPI_Comm_rank(machine, &local);
  MPI_Comm_free(&machine);
  check(pfc_device_cuda(local, NULL, &device), "pfc_device_cuda");
  status = rank == 0 ? pfc_nccl_unique_id(nccl_id) : PFC_OK;
  check(pfc_mpi_share_nccl_id(MPI_COMM_WORLD, status, nccl_id), "pfc_mpi_share_nccl_id");
  check(pfc_comm_nccl(nccl_id, (uint32_t)rank, (uint32_t)size, device, &comm), "pfc_comm_nccl");
  check(pfc_head_options_init(&options), "pfc_head_options_init");
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  options.sample_rate = 0.5;
  check(pfc_head_create(device, comm, &options, &head), "pfc_head_create");

  for (step = 0; status == PFC_OK && step < STEPS; step++) {
    const int lost = rank == 1 && step == 2;
    for (i = 0; i < BATCH; i++) labels[i] = (step * 37 + rank * 11 + i * 5) % CLASSES;
    for (i = 0; i < BATCH * DIM; i++) embeddings[i] = (float)((i * 31 + step * 7) % 23) - 11;
    /* The fault is near: a late rank is a lost one, however busy the machine was before. */
    if (step == 2 && strcmp(moment, "between") != 0) limit_waits(comm, argv[3]);
    if (lost) strike(moment, "amid");
    if (lost) strike(moment, "before");
    status = pfc_head_forward(head, &e, labels, &loss);
    if (step == 2 && strcmp(moment, "between") == 0) limit_waits(comm, argv[3]);
    if (lost) strike(moment, "between");
    if (status == PFC_OK) status = pfc_head_backward(head, 1, 1, &g);
    if (status == PFC_OK) status = pfc_head_update(head, 0.1);
  }
  snprintf(text, sizeof text, "%s: %.900s\n", pfc_status_name(status),
           status == PFC_OK ? "" : pfc_last_error());
  /* Nothing here waits for the lost rank. */
  pfc_head_free(head);
  pfc_comm_free(comm);
  pfc_device_free(device);
  note("end", text);
  /* MPI cannot be finalized without the lost rank; and nobody goes before all have told. */
  for (waited = 0; !all_ended() && waited < LONGEST_MS; waited += 20) sleep_ms(20);
  _exit(0);
}
