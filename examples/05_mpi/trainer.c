/*
 * Trains a recognizer of glyphs on many ranks: processes that MPI joins, on one machine or on many.
 * With --threads they are threads of one process instead: the loss is the same, bit for bit.
 *
 *   cargo run --release -p glyphs -- --classes 500 --export glyphs.bin
 *   mpicc -O2 trainer.c -lpartialfc -lm -lpthread -o trainer
 *   mpirun -n 4 ./trainer --data glyphs.bin
 *
 * Each rank has a replica of the backbone, here E = X @ V for images X, and its share of every
 * batch; the replicas' gradients are summed over the ranks. The classification head is sharded.
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "partialfc_mpi.h"

static const char *const usage =
    "Trains a linear recognizer under a PartialFC head, on the ranks of mpirun or on threads.\n"
    "\n"
    "  mpirun -n N trainer --data FILE [options]\n"
    "  trainer --threads N --data FILE [options]\n"
    "\n"
    "  --data FILE         images, written by: cargo run --release -p glyphs -- --export FILE\n"
    "  --threads N         ranks are N threads of this process; no MPI\n"
    "  --device cpu|cuda   where the head computes; cuda: a GPU for each rank of a machine, and\n"
    "                      NCCL between them, or one GPU for all threads (default: cpu)\n"
    "  --steps N           (default: 200)\n"
    "  --batch N           images in a step, of all ranks together (default: 256)\n"
    "  --dim N             numbers in an embedding (default: 64)\n"
    "  --sample-rate R     share of the classes in a step, 0 to 1 (default: 0.1)\n"
    "  --replicated        every rank holds all class centers\n"
    "  --learning-rate R   of backbone and head (default: 0.2)\n"
    "  --timeout SECONDS   how long a rank waits for another (default: 60)\n"
    "  --loss FILE         rank 0 writes every step's loss there\n"
    "  --help\n";

enum { MOST_THREADS = 256 };

struct settings {
  const char *data, *loss;
  int threads, cuda, replicated;
  long steps, batch, dim;
  double sample_rate, learning_rate, timeout;
};

/* What glyphs --export writes: a class for each image, and its pixels. */
struct images {
  uint64_t classes, pixels, training, held_out;
  int64_t *labels;
  unsigned char *ink;
};

/* One rank's place, and what it trains with. */
struct rank {
  const struct settings *settings;
  const struct images *images;
  pfc_comm *comm;      /* carries the backbone's gradients, in host memory */
  pfc_comm *head_comm; /* carries the head's messages: the same, or NCCL */
  pfc_device *device;
  int failed;
};

/* ---- Errors: every one says what and where, and ends all ranks. ---- */

static int under_mpi;

static void say(int rank, const char *format, ...) {
  va_list arguments;
  char text[1024];
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fprintf(stderr, rank < 0 ? "trainer: %s\n" : "trainer: %s (rank %d)\n", text, rank);
}

static void end(int code) {
  fflush(stdout);
  /* MPI_Finalize would wait for ranks that do not come. */
  if (under_mpi) MPI_Abort(MPI_COMM_WORLD, code);
  exit(code);
}

/* ---- Settings. ---- */

static double number(const char *option, const char *text, double least, double most) {
  char *rest;
  double value;
  errno = 0;
  value = strtod(text, &rest);
  if (rest == text || *rest != 0 || errno != 0 || !(value >= least && value <= most)) {
    say(-1, "%s is '%s', not a number from %g to %g", option, text, least, most);
    end(2);
  }
  return value;
}

static long whole(const char *option, const char *text, long least, long most) {
  double value = number(option, text, (double)least, (double)most);
  if (value != floor(value)) {
    say(-1, "%s is '%s', not a whole number", option, text);
    end(2);
  }
  return (long)value;
}

static struct settings read_settings(int argc, char **argv) {
  struct settings s = {NULL, NULL, 0, 0, 0, 200, 256, 64, 0.1, 0.2, 60};
  int i;
  for (i = 1; i < argc; i++) {
    const char *option = argv[i], *value;
    if (strcmp(option, "--replicated") == 0) {
      s.replicated = 1;
      continue;
    }
    if ((value = argv[++i]) == NULL) {
      say(-1, "%s needs a value or is unknown; see --help", option);
      end(2);
    } else if (strcmp(option, "--data") == 0) {
      s.data = value;
    } else if (strcmp(option, "--loss") == 0) {
      s.loss = value;
    } else if (strcmp(option, "--threads") == 0) {
      s.threads = (int)whole(option, value, 1, MOST_THREADS);
    } else if (strcmp(option, "--steps") == 0) {
      s.steps = whole(option, value, 1, 1000000);
    } else if (strcmp(option, "--batch") == 0) {
      s.batch = whole(option, value, 1, 1 << 20);
    } else if (strcmp(option, "--dim") == 0) {
      s.dim = whole(option, value, 1, 1 << 14);
    } else if (strcmp(option, "--sample-rate") == 0) {
      s.sample_rate = number(option, value, 0, 1);
    } else if (strcmp(option, "--learning-rate") == 0) {
      s.learning_rate = number(option, value, 0, 1000);
    } else if (strcmp(option, "--timeout") == 0) {
      s.timeout = number(option, value, 0.001, 1e6);
    } else if (strcmp(option, "--device") == 0) {
      s.cuda = strcmp(value, "cuda") == 0;
      if (!s.cuda && strcmp(value, "cpu") != 0) {
        say(-1, "--device is '%s', not cpu or cuda", value);
        end(2);
      }
    } else {
      say(-1, "'%s' is no option; see --help", option);
      end(2);
    }
  }
  if (s.data == NULL) {
    say(-1, "--data FILE is missing; see --help");
    end(2);
  }
  return s;
}

/* ---- Images. ---- */

static void damaged(const char *path, const char *why) {
  say(-1, "%s: %s", path, why);
  end(1);
}

static struct images read_images(const char *path) {
  struct images images;
  uint64_t counts[4], total, i;
  char magic[8];
  FILE *file = fopen(path, "rb");
  if (file == NULL) damaged(path, strerror(errno));
  if (fread(magic, 1, 8, file) != 8 || memcmp(magic, "pfcimage", 8) != 0 ||
      fread(counts, 8, 4, file) != 4) {
    damaged(path, "not images of glyphs --export");
  }
  images.classes = counts[0];
  images.pixels = counts[1];
  images.training = counts[2];
  images.held_out = counts[3];
  for (i = 0; i < 4; i++) {
    if (counts[i] > (uint64_t)1 << 26) damaged(path, "a count in it is too large");
  }
  total = images.training + images.held_out;
  if (images.classes == 0 || images.pixels == 0 || images.training == 0) damaged(path, "no images");
  images.labels = malloc(total * sizeof *images.labels);
  images.ink = malloc(total * images.pixels);
  if (images.labels == NULL || images.ink == NULL) damaged(path, "no memory for its images");
  if (fread(images.labels, sizeof *images.labels, total, file) != total ||
      fread(images.ink, images.pixels, total, file) != total || fgetc(file) != EOF) {
    damaged(path, "not as long as it says");
  }
  for (i = 0; i < total; i++) {
    if (images.labels[i] < 0 || (uint64_t)images.labels[i] >= images.classes) {
      damaged(path, "a label in it is no class");
    }
  }
  fclose(file);
  return images;
}

/* ---- The backbone: E = X @ V, dV = X^T @ dE. ---- */

static uint64_t random_bits(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b * 0xbf58476d1ce4e5b9u + 1;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

static double uniform(uint64_t a, uint64_t b) {
  return ((double)(random_bits(a, b) >> 11) + 0.5) / 9007199254740992.0;
}

static float pixel(unsigned char ink) { return (float)ink / 255.0f - 0.25f; }

static void forward(const struct images *images, const uint64_t *shots, long rows, long dim,
                    const float *v, float *e) {
  const long pixels = (long)images->pixels;
  long i, j, k;
  for (i = 0; i < rows; i++) {
    const unsigned char *ink = images->ink + shots[i] * images->pixels;
    float *to = e + i * dim;
    for (j = 0; j < dim; j++) to[j] = 0;
    for (k = 0; k < pixels; k++) {
      const float x = pixel(ink[k]);
      for (j = 0; j < dim; j++) to[j] += x * v[k * dim + j];
    }
  }
}

static void backward(const struct images *images, const uint64_t *shots, long rows, long dim,
                     const float *de, float *dv) {
  const long pixels = (long)images->pixels;
  long i, j, k;
  for (k = 0; k < pixels * dim; k++) dv[k] = 0;
  for (i = 0; i < rows; i++) {
    const unsigned char *ink = images->ink + shots[i] * images->pixels;
    for (k = 0; k < pixels; k++) {
      const float x = pixel(ink[k]);
      for (j = 0; j < dim; j++) dv[k * dim + j] += x * de[i * dim + j];
    }
  }
}

/* ---- Training: the same whatever joins the ranks. ---- */

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#define TRY(call)                                                              \
  do {                                                                         \
    const pfc_status status_ = (call);                                         \
    if (status_ != PFC_OK) {                                                   \
      say((int)rank, "%s: %s", pfc_status_name(status_), pfc_last_error());    \
      goto failed;                                                             \
    }                                                                          \
  } while (0)

/* How many of the held-out images have their own class center nearest, over all ranks. */
static pfc_status recognize(struct rank *self, pfc_head *head, const float *v, int64_t *right) {
  enum { AT_ONCE = 256 };
  const struct images *images = self->images;
  const uint64_t rank = pfc_comm_rank(self->comm), size = pfc_comm_size(self->comm);
  const uint64_t first = images->held_out * rank / size;
  const uint64_t last = images->held_out * (rank + 1) / size;
  const uint64_t most = (images->held_out + size - 1) / size;
  const long dim = self->settings->dim;
  float *e = malloc(AT_ONCE * (size_t)dim * sizeof *e);
  uint64_t shots[AT_ONCE], done;
  int64_t nearest[AT_ONCE];
  float cosines[AT_ONCE];
  pfc_status status = e == NULL ? PFC_ERROR_OUT_OF_MEMORY : PFC_OK;
  *right = 0;
  /* Collective: a rank with fewer images asks for none as often as the others ask. */
  for (done = 0; status == PFC_OK && done < most; done += AT_ONCE) {
    pfc_matrix probes = {NULL, PFC_F32, 0, 0, 0, 0};
    long i, rows = 0;
    while (rows < AT_ONCE && first + done + (uint64_t)rows < last) {
      shots[rows] = images->training + first + done + (uint64_t)rows;
      rows++;
    }
    forward(images, shots, rows, dim, v, e);
    probes.data = e;
    probes.rows = (uint64_t)rows;
    probes.cols = probes.row_stride = (uint64_t)dim;
    status = pfc_head_top_k(head, &probes, 1, nearest, cosines);
    for (i = 0; status == PFC_OK && i < rows; i++) *right += nearest[i] == images->labels[shots[i]];
  }
  free(e);
  return status == PFC_OK ? pfc_comm_all_reduce(self->comm, right, right, 1, PFC_I64, PFC_SUM)
                          : status;
}

static void *train(void *argument) {
  struct rank *self = argument;
  const struct settings *s = self->settings;
  const struct images *images = self->images;
  const uint64_t rank = pfc_comm_rank(self->comm), size = pfc_comm_size(self->comm);
  /* The same images in the same rows of the global batch, whatever the number of ranks. */
  const long first = (long)((uint64_t)s->batch * rank / size);
  const long rows = (long)((uint64_t)s->batch * (rank + 1) / size) - first;
  const size_t weights = (size_t)images->pixels * (size_t)s->dim;
  const size_t room = (size_t)(rows > 0 ? rows : 1);
  float *v = malloc(weights * sizeof *v), *dv = malloc(weights * sizeof *dv);
  float *momentum = calloc(weights, sizeof *momentum);
  float *e = malloc(room * (size_t)s->dim * sizeof *e);
  float *de = malloc(room * (size_t)s->dim * sizeof *de);
  int64_t *labels = malloc(room * sizeof *labels), right;
  uint64_t *shots = malloc(room * sizeof *shots);
  FILE *curve = NULL;
  pfc_head *head = NULL;
  pfc_head_options options;
  pfc_matrix embeddings = {NULL, PFC_F32, 0, 0, 0, 0}, gradient;
  double loss = 0, start, head_seconds = 0;
  size_t k;
  long step, i;

  self->failed = 1;
  if (v == NULL || dv == NULL || momentum == NULL || e == NULL || de == NULL || labels == NULL ||
      shots == NULL) {
    say((int)rank, "no memory for a backbone of %lu weights", (unsigned long)weights);
    goto failed;
  }
  TRY(pfc_comm_set_timeout(self->comm, (uint64_t)(1000 * s->timeout)));
  if (self->head_comm != self->comm) {
    TRY(pfc_comm_set_timeout(self->head_comm, (uint64_t)(1000 * s->timeout)));
  }
  TRY(pfc_head_options_init(&options));
  options.num_classes = images->classes;
  options.embedding_dim = (uint32_t)s->dim;
  options.placement = s->replicated ? PFC_PLACEMENT_REPLICATED : PFC_PLACEMENT_SHARDED;
  options.sample_rate = s->sample_rate;
  options.max_batch = ((uint64_t)s->batch + size - 1) / size;
  options.scale = 30;
  options.m2 = 0.2;
  TRY(pfc_head_create(self->device, self->head_comm, &options, &head));
  if (rank == 0 && s->loss != NULL && (curve = fopen(s->loss, "w")) == NULL) {
    say((int)rank, "%s: %s", s->loss, strerror(errno));
    goto failed;
  }
  if (rank == 0) {
    printf("%lu images of %lu classes, %lu ranks, %s\n", (unsigned long)images->training,
           (unsigned long)images->classes, (unsigned long)size, pfc_device_info(self->device));
  }
  for (k = 0; k < weights; k++) {
    v[k] = (float)((uniform(1, k) - 0.5) * sqrt(12.0 / (double)images->pixels));
  }

  embeddings.data = e;
  embeddings.rows = (uint64_t)rows;
  embeddings.cols = embeddings.row_stride = (uint64_t)s->dim;
  gradient = embeddings;
  gradient.data = de;
  start = seconds();
  for (step = 0; step < s->steps; step++) {
    const double done = (double)step / (double)s->steps;
    const double rate = s->learning_rate * 0.5 * (1 + cos(3.14159265358979 * done));
    double before;
    for (i = 0; i < rows; i++) {
      shots[i] = random_bits(2, (uint64_t)(step * s->batch + first + i)) % images->training;
      labels[i] = images->labels[shots[i]];
    }
    forward(images, shots, rows, s->dim, v, e);
    before = seconds();
    TRY(pfc_head_step(head, &embeddings, labels, rate, &gradient, &loss));
    head_seconds += seconds() - before;
    backward(images, shots, rows, s->dim, de, dv);
    /* The loss is the mean over all ranks' rows, so the replicas' gradients add up. */
    TRY(pfc_comm_all_reduce(self->comm, dv, dv, weights, PFC_F32, PFC_SUM));
    for (k = 0; k < weights; k++) {
      momentum[k] = 0.9f * momentum[k] + dv[k];
      v[k] -= (float)rate * momentum[k];
    }
    if (curve != NULL) fprintf(curve, "%ld %.17g\n", step + 1, loss);
    if (rank == 0 && ((step + 1) % 20 == 0 || step + 1 == s->steps)) {
      printf("step %ld of %ld  loss %.4f  %.1f s\n", step + 1, s->steps, loss, seconds() - start);
      fflush(stdout);
    }
  }
  start = seconds() - start;
  TRY(recognize(self, head, v, &right));
  if (rank == 0) {
    printf("%.1f ms a step, of which %.1f the head; ", 1000 * start / (double)s->steps,
           1000 * head_seconds / (double)s->steps);
    printf("%ld of %lu images in unseen fonts recognized\n", (long)right,
           (unsigned long)images->held_out);
  }
  self->failed = 0;
failed:
  if (curve != NULL && fclose(curve) != 0) {
    say((int)rank, "%s: %s", s->loss, strerror(errno));
    self->failed = 1;
  }
  /* The other ranks wait for this one: let them fail as well. */
  if (self->failed) {
    pfc_comm_abort(self->comm);
    if (self->head_comm != self->comm) pfc_comm_abort(self->head_comm);
  }
  pfc_head_free(head);
  free(v);
  free(dv);
  free(momentum);
  free(e);
  free(de);
  free(labels);
  free(shots);
  return NULL;
}

/* ---- Joining the ranks. ---- */

static pfc_status make_device(const struct settings *s, int gpu, pfc_device **device) {
  return s->cuda ? pfc_device_cuda(gpu, NULL, device) : pfc_device_cpu(1, device);
}

static int train_on_threads(const struct settings *s, const struct images *images) {
  struct rank ranks[MOST_THREADS];
  pthread_t threads[MOST_THREADS];
  pfc_comm *comms[MOST_THREADS];
  int r, started, failed = 0;
  if (pfc_comm_threads((uint32_t)s->threads, comms) != PFC_OK) {
    say(-1, "%s", pfc_last_error());
    return 1;
  }
  for (started = 0; started < s->threads; started++) {
    struct rank rank = {s, images, comms[started], comms[started], NULL, 1};
    const pfc_status status = make_device(s, 0, &rank.device);
    ranks[started] = rank;
    if (status != PFC_OK || pthread_create(&threads[started], NULL, train, &ranks[started]) != 0) {
      say(started, status != PFC_OK ? pfc_last_error() : "no thread");
      pfc_device_free(rank.device);
      pfc_comm_abort(comms[started]);
      failed = 1;
      break;
    }
  }
  for (r = 0; r < started; r++) {
    pthread_join(threads[r], NULL);
    pfc_device_free(ranks[r].device);
    failed |= ranks[r].failed;
  }
  for (r = 0; r < s->threads; r++) pfc_comm_free(comms[r]);
  return failed;
}

/* A program built with one MPI and started by another's mpirun finds itself alone, N times. */
static void check_launcher(int size) {
  static const char *const variables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"};
  size_t i;
  for (i = 0; size == 1 && i < sizeof variables / sizeof *variables; i++) {
    const char *value = getenv(variables[i]);
    if (value != NULL && atol(value) > 1) {
      say(-1, "%s is %s, but MPI knows of 1 rank: the program was built with another MPI than "
          "the one that starts it", variables[i], value);
      end(2);
    }
  }
}

/* Joins the head's ranks by NCCL, whose id MPI carries. */
static pfc_status join_by_nccl(int rank, int size, const pfc_device *device, pfc_comm **comm) {
  uint8_t id[128];
  pfc_status status = rank == 0 ? pfc_nccl_unique_id(id) : PFC_OK;
  status = pfc_mpi_share_nccl_id(MPI_COMM_WORLD, status, id);
  if (status != PFC_OK) return status;
  return pfc_comm_nccl(id, (uint32_t)rank, (uint32_t)size, device, comm);
}

static int train_over_mpi(const struct settings *s, const struct images *images) {
  struct rank self = {s, images, NULL, NULL, NULL, 1};
  MPI_Comm machine;
  int rank, size, local;
  pfc_status status;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  check_launcher(size);
  /* A GPU for each rank of a machine. */
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &machine);
  MPI_Comm_rank(machine, &local);
  MPI_Comm_free(&machine);
  status = pfc_comm_mpi(MPI_COMM_WORLD, &self.comm);
  self.head_comm = self.comm;
  if (status == PFC_OK) status = make_device(s, local, &self.device);
  if (status == PFC_OK && s->cuda) status = join_by_nccl(rank, size, self.device, &self.head_comm);
  if (status == PFC_OK) train(&self);
  else say(rank, "%s: %s", pfc_status_name(status), pfc_mpi_last_error());
  if (self.head_comm != self.comm) pfc_comm_free(self.head_comm);
  pfc_comm_free(self.comm);
  pfc_device_free(self.device);
  return self.failed;
}

int main(int argc, char **argv) {
  struct settings settings;
  struct images images;
  int i, level, failed;
  for (i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--help") == 0) {
      fputs(usage, stdout);
      return 0;
    }
  }
  settings = read_settings(argc, argv);
  if (settings.threads == 0) {
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    under_mpi = 1;
  }
  images = read_images(settings.data);
  failed = under_mpi ? train_over_mpi(&settings, &images) : train_on_threads(&settings, &images);
  free(images.labels);
  free(images.ink);
  if (failed) end(1);
  if (under_mpi) MPI_Finalize();
  return 0;
}
