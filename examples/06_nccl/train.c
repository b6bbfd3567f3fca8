/*
 * Trains on many GPUs, a process for each, without MPI: the launcher tells every process its rank
 * in the environment, a file brings NCCL's id from rank 0 to the others.
 *
 *   cc -O2 train.c -lpartialfc -lm -lpthread -o train
 *   torchrun --nproc-per-node 4 --no-python ./train --id id.$$
 *   srun -n 8 --gpus-per-node 4 ./train --id id.$SLURM_JOB_ID
 *
 * With --threads the ranks are threads of one process that share a GPU, which needs no launcher, no
 * file and no NCCL.
 *
 * The data are made up but honest: each of 200 people is a point in 32 dimensions, a photo is that
 * point plus noise. The backbone is linear, E = X @ V, the same on all ranks; the class centers are
 * sharded over them.
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "partialfc.h"

static const char *const usage =
    "Trains a small recognizer under a PartialFC head, on GPUs that NCCL joins.\n"
    "\n"
    "  LAUNCHER train --id FILE [options]     a process for each rank\n"
    "  train --threads N [options]            N threads of this process, on one GPU; no NCCL\n"
    "\n"
    "The launcher is torchrun, srun, or an mpirun: what sets RANK, WORLD_SIZE and LOCAL_RANK, or\n"
    "variables of its own that mean the same.\n"
    "\n"
    "  --id FILE           where rank 0 leaves NCCL's id for the others: in a folder that all\n"
    "                      see, under a name that no other run has; gone when all have joined\n"
    "  --gpu N             GPU of the machine (default: the rank's number on it; threads: 0)\n"
    "  --steps N           (default: 300)\n"
    "  --timeout SECONDS   how long a rank waits for the id, and for another rank in a step\n"
    "                      (default: 60); for all to join: 10 minutes\n"
    "  --loss FILE         rank 0 writes every step's loss there\n"
    "  --help\n";

enum { PEOPLE = 200, INPUT = 32, DIM = 24, BATCH = 64, MOST_THREADS = 64, ID_BYTES = 128 };

struct settings {
  const char *id, *loss;
  long threads, gpu, steps, timeout;
};

/* A process's place among those that the launcher has started. */
struct place {
  long rank, size, local;
};

/* One rank, and how its training ended. */
struct rank {
  const struct settings *settings;
  pfc_comm *comm;
  pfc_device *device;
  int failed;
};

static void fail(const char *what, const char *why) {
  fprintf(stderr, "train: %s: %s\n", what, why);
  exit(1);
}

/* A whole number, of an option or of a variable of the environment. */
static long whole(const char *name, const char *text, long least, long most) {
  char *rest;
  long value;
  errno = 0;
  value = strtol(text, &rest, 10);
  if (rest == text || *rest != 0 || errno != 0 || value < least || value > most) {
    fprintf(stderr, "train: %s is '%s', not a whole number from %ld to %ld\n", name, text, least,
            most);
    exit(2);
  }
  return value;
}

static struct settings read_settings(int argc, char **argv) {
  struct settings s = {NULL, NULL, 0, -1, 300, 60};
  int i;
  for (i = 1; i < argc; i++) {
    const char *option = argv[i], *value;
    if (strcmp(option, "--help") == 0) {
      fputs(usage, stdout);
      exit(0);
    }
    value = argv[++i];
    if (value == NULL) {
      fprintf(stderr, "train: %s needs a value or is unknown; see --help\n", option);
      exit(2);
    }
    if (strcmp(option, "--id") == 0) s.id = value;
    else if (strcmp(option, "--loss") == 0) s.loss = value;
    else if (strcmp(option, "--threads") == 0) s.threads = whole(option, value, 1, MOST_THREADS);
    else if (strcmp(option, "--gpu") == 0) s.gpu = whole(option, value, 0, 1023);
    else if (strcmp(option, "--steps") == 0) s.steps = whole(option, value, 1, 1000000);
    else if (strcmp(option, "--timeout") == 0) s.timeout = whole(option, value, 1, 1000000);
    else {
      fprintf(stderr, "train: '%s' is no option; see --help\n", option);
      exit(2);
    }
  }
  if ((s.id == NULL) == (s.threads == 0)) {
    fprintf(stderr, "train: one of --id FILE and --threads N is needed; see --help\n");
    exit(2);
  }
  return s;
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- Which rank this is. ---- */

static struct place read_place(void) {
  /* torchrun's come first: within a Slurm job, too, they are the ones that hold. */
  static const char *const names[][3] = {
      {"RANK", "WORLD_SIZE", "LOCAL_RANK"},
      {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"},
      {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
      {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},
  };
  struct place place = {0, 0, 0};
  size_t i;
  for (i = 0; i < sizeof names / sizeof *names; i++) {
    const char *rank = getenv(names[i][0]), *size = getenv(names[i][1]);
    const char *local = getenv(names[i][2]);
    if (rank == NULL || size == NULL || local == NULL) continue;
    place.size = whole(names[i][1], size, 1, 1000000);
    place.rank = whole(names[i][0], rank, 0, place.size - 1);
    place.local = whole(names[i][2], local, 0, 1023);
    return place;
  }
  fail("no launcher", "neither RANK, WORLD_SIZE and LOCAL_RANK nor what srun or mpirun set are in "
       "the environment");
  return place;
}

/* ---- NCCL's id, from rank 0 to the others. ---- */

/* Under another name first: who finds the file finds all of it. */
static void leave_id(const char *path, const uint8_t *id) {
  char part[4096];
  FILE *file;
  if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part) fail(path, "too long");
  file = fopen(part, "wb");
  if (file == NULL) fail(part, strerror(errno));
  if (fwrite(id, 1, ID_BYTES, file) != ID_BYTES || fclose(file) != 0 || rename(part, path) != 0) {
    fail(path, strerror(errno));
  }
}

static void await_id(const char *path, long timeout, uint8_t *id) {
  const struct timespec pause = {0, 20000000};
  const double start = seconds();
  for (;;) {
    FILE *file = fopen(path, "rb");
    if (file != NULL) {
      const size_t length = fread(id, 1, ID_BYTES, file);
      fclose(file);
      if (length != ID_BYTES) fail(path, "not an id of NCCL's");
      return;
    }
    if (errno != ENOENT) fail(path, strerror(errno));
    if (seconds() - start > (double)timeout) fail(path, "rank 0 has left no id there in time");
    nanosleep(&pause, NULL);
  }
}

/* Joins the ranks, each on its GPU. */
static pfc_status join_by_nccl(const struct settings *s, const struct place *place,
                               const pfc_device *device, pfc_comm **comm) {
  uint8_t id[ID_BYTES];
  pfc_status status;
  if (place->rank == 0) {
    /* The others may have read it already, and would wait for ranks that never come. */
    if (access(s->id, F_OK) == 0) fail(s->id, "is there already; each run needs its own name");
    status = pfc_nccl_unique_id(id);
    if (status != PFC_OK) return status;
    leave_id(s->id, id);
  } else {
    await_id(s->id, s->timeout, id);
  }
  status = pfc_comm_nccl(id, (uint32_t)place->rank, (uint32_t)place->size, device, comm);
  /* All have read it, or it serves no more. */
  if (place->rank == 0) unlink(s->id);
  return status;
}

/* ---- Training: the same whatever joins the ranks. ---- */

/* Between 0 and 1: number b of the sequence a. */
static double uniform(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b * 0xbf58476d1ce4e5b9u + 1;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return ((double)((x ^ x >> 31) >> 11) + 0.5) / 9007199254740992.0;
}

static float normal(uint64_t a, uint64_t b) {
  const double length = sqrt(-2 * log(uniform(a, 2 * b)));
  return (float)(length * cos(6.283185307179586 * uniform(a, 2 * b + 1)));
}

static int64_t photograph(uint64_t number, float *photo) {
  const int64_t person = (int64_t)(uniform(1, number) * PEOPLE);
  uint64_t k;
  for (k = 0; k < INPUT; k++) {
    photo[k] = normal(2, (uint64_t)person * INPUT + k) + 0.5f * normal(3, number * INPUT + k);
  }
  return person;
}

#define TRY(call)                                                                           \
  do {                                                                                      \
    const pfc_status status_ = (call);                                                      \
    if (status_ != PFC_OK) {                                                                \
      fprintf(stderr, "train: %s: %s\n", pfc_status_name(status_), pfc_last_error());       \
      goto failed;                                                                          \
    }                                                                                       \
  } while (0)

static void *train(void *argument) {
  struct rank *self = argument;
  const struct settings *s = self->settings;
  const uint32_t rank = pfc_comm_rank(self->comm), size = pfc_comm_size(self->comm);
  /* Row i of the global batch is the same photo, whatever the number of ranks. */
  const long begin = (long)(BATCH * (uint64_t)rank / size);
  const long rows = (long)(BATCH * ((uint64_t)rank + 1) / size) - begin;
  float photos[BATCH][INPUT], embeddings[BATCH][DIM], gradient[BATCH][DIM];
  float backbone[INPUT][DIM], change[INPUT][DIM];
  int64_t labels[BATCH];
  pfc_matrix batch = {NULL, PFC_F32, 0, 0, DIM, DIM}, grad;
  pfc_head_options options;
  pfc_head *head = NULL;
  FILE *curve = NULL;
  double first = 0, loss = 0;
  long step, i, j, k;

  self->failed = 1;
  TRY(pfc_comm_set_timeout(self->comm, 1000 * (uint64_t)s->timeout));
  TRY(pfc_head_options_init(&options));
  options.num_classes = PEOPLE;
  options.embedding_dim = DIM;
  options.max_batch = (BATCH + (uint64_t)size - 1) / size; /* of one rank */
  options.sample_rate = 0.5;
  options.scale = 24;
  options.m2 = 0.3;
  TRY(pfc_head_create(self->device, self->comm, &options, &head));
  if (rank == 0 && s->loss != NULL && (curve = fopen(s->loss, "w")) == NULL) {
    fprintf(stderr, "train: %s: %s\n", s->loss, strerror(errno));
    goto failed;
  }
  if (rank == 0) {
    printf("%lu ranks, %s\n", (unsigned long)size, pfc_device_info(self->device));
    fflush(stdout); /* a launcher's log is no terminal */
  }
  for (k = 0; k < INPUT; k++) {
    for (j = 0; j < DIM; j++) backbone[k][j] = normal(4, (uint64_t)(k * DIM + j)) / sqrtf(INPUT);
  }
  batch.data = embeddings;
  batch.rows = (uint64_t)rows;
  grad = batch;
  grad.data = gradient;

  for (step = 0; step < s->steps; step++) {
    for (i = 0; i < rows; i++) {
      labels[i] = photograph((uint64_t)(step * BATCH + begin + i), photos[i]);
      for (j = 0; j < DIM; j++) {
        embeddings[i][j] = 0;
        for (k = 0; k < INPUT; k++) embeddings[i][j] += photos[i][k] * backbone[k][j];
      }
    }
    /* Loss, the gradient of this rank's embeddings, and the update of the class centers. */
    TRY(pfc_head_step(head, &batch, labels, 0.5, &grad, &loss));
    /* The backbone is the program's own: dV = X^T @ dE, summed over the ranks. */
    for (k = 0; k < INPUT; k++) {
      for (j = 0; j < DIM; j++) {
        change[k][j] = 0;
        for (i = 0; i < rows; i++) change[k][j] += photos[i][k] * gradient[i][j];
      }
    }
    TRY(pfc_comm_all_reduce(self->comm, change, change, INPUT * DIM, PFC_F32, PFC_SUM));
    for (k = 0; k < INPUT; k++) {
      for (j = 0; j < DIM; j++) backbone[k][j] -= 0.1f * change[k][j];
    }
    if (step == 0) first = loss;
    if (curve != NULL) fprintf(curve, "%ld %.17g\n", step + 1, loss);
  }
  if (rank == 0) printf("loss %.3f at first, %.3f after %ld steps\n", first, loss, s->steps);
  self->failed = 0;
failed:
  if (curve != NULL && fclose(curve) != 0) {
    fprintf(stderr, "train: %s: %s\n", s->loss, strerror(errno));
    self->failed = 1;
  }
  /* Nothing here waits for other ranks any more. They end with their launcher, or on their own
     timeout; threads hear of it at once. */
  if (self->failed) pfc_comm_abort(self->comm);
  pfc_head_free(head);
  return NULL;
}

static int train_as_a_process(const struct settings *s) {
  const struct place place = read_place();
  struct rank self = {s, NULL, NULL, 1};
  const int32_t gpu = (int32_t)(s->gpu < 0 ? place.local : s->gpu);
  pfc_status status = pfc_device_cuda(gpu, NULL, &self.device);
  if (status == PFC_OK) status = join_by_nccl(s, &place, self.device, &self.comm);
  if (status == PFC_OK) train(&self);
  else fprintf(stderr, "train: %s: %s\n", pfc_status_name(status), pfc_last_error());
  pfc_comm_free(self.comm);
  pfc_device_free(self.device);
  return self.failed;
}

static int train_on_threads(const struct settings *s) {
  struct rank ranks[MOST_THREADS];
  pthread_t threads[MOST_THREADS];
  pfc_comm *comms[MOST_THREADS];
  pfc_device *device;
  long r;
  int failed = 0;
  if (pfc_device_cuda(s->gpu < 0 ? 0 : (int32_t)s->gpu, NULL, &device) != PFC_OK ||
      pfc_comm_threads((uint32_t)s->threads, comms) != PFC_OK) {
    fail("no ranks", pfc_last_error());
  }
  for (r = 0; r < s->threads; r++) {
    struct rank rank = {s, comms[r], device, 1};
    ranks[r] = rank;
    if (pthread_create(&threads[r], NULL, train, &ranks[r]) != 0) fail("pthread_create", "failed");
  }
  for (r = 0; r < s->threads; r++) {
    pthread_join(threads[r], NULL);
    failed |= ranks[r].failed;
    pfc_comm_free(comms[r]);
  }
  pfc_device_free(device);
  return failed;
}

int main(int argc, char **argv) {
  const struct settings settings = read_settings(argc, argv);
  return settings.threads > 0 ? train_on_threads(&settings) : train_as_a_process(&settings);
}
