// Lets the allocations of a scenario fail in turn, each in a child of its own, and prints what
// became of them. tests/hostile/out_of_memory.rs turns the addresses into functions and judges.
//
//   out_of_memory SCENARIO [each|from]
//
// By default the first allocations at each place fail: which they are does not depend on how fast
// the threads are. With `each` every one fails, by its number. With `from` all from the n-th on
// fail, as when memory stays short.
//
// One line for each child, with tabs between the fields:
//
//   outcome  call  text  addresses of the allocation's callers, innermost first
//
// outcome: fine (the calls returned a status that fits, and went on), abort, signal, hang, wrong (a
// status or an output that is not as documented; the text says which). An address is an offset in
// the shared library; callers elsewhere are left out.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <partialfc.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

// What this program puts in front of the C library's own.
extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t count, size_t bytes);
extern void *__libc_realloc(void *old, size_t bytes);
extern void *__libc_memalign(size_t alignment, size_t bytes);

enum { DEPTH = 64, SECONDS = 60, PLACES = 4096, NEAR = 8, TIMES = 3 };
enum { BY_PLACE, EACH, FROM };

static int mode = BY_PLACE;
static int armed;
// Set where an allocation is this program's own.
static __thread int own;
// The call of this thread; that of the last thread that made one, for threads of the library.
static __thread const char *call;
static const char *last_call = "";

// Which allocation fails: the `refused_number`-th, of all or of those at one place; none if -1.
static long refused_number = -1;
static uint64_t refused_place;
static long allocations;
// Where it was asked for, and in which call.
static void *frames[DEPTH];
static int depth;
static const char *refused_in = "";

// How often memory was asked for at a place, which is a call and its innermost callers.
static struct {
  uint64_t place;
  long times;
} places[PLACES];
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;

static uint64_t mix(uint64_t hash, uint64_t value) {
  return (hash ^ value) * 0x9E3779B97F4A7C15u ^ (hash >> 29);
}

// The number of this allocation, from 0, among those of its place.
static long number_at(uint64_t place) {
  pthread_mutex_lock(&counting);
  uint64_t at = place % PLACES;
  while (places[at].times > 0 && places[at].place != place) at = (at + 1) % PLACES;
  places[at].place = place;
  long number = places[at].times++;
  pthread_mutex_unlock(&counting);
  return number;
}

static int refuse(void) {
  if (!__atomic_load_n(&armed, __ATOMIC_RELAXED) || own) return 0;
  own = 1;
  const char *in = call != NULL ? call : last_call;
  long number = __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED);
  int here = number == refused_number;
  if (mode == BY_PLACE) {
    void *callers[NEAR];
    int count = backtrace(callers, NEAR);
    uint64_t place = 0;
    for (const char *c = in; *c != 0; c++) place = mix(place, (uint64_t)*c);
    for (int i = 0; i < count; i++) place = mix(place, (uint64_t)callers[i]);
    number = number_at(place);
    here = place == refused_place && number == refused_number;
  }
  if (here) {
    depth = backtrace(frames, DEPTH);
    refused_in = in;
  }
  own = 0;
  int no = here || (mode == FROM && refused_number >= 0 && number > refused_number);
  if (no) errno = ENOMEM;
  return no;
}

void *malloc(size_t bytes) { return refuse() ? NULL : __libc_malloc(bytes); }
void *calloc(size_t count, size_t bytes) { return refuse() ? NULL : __libc_calloc(count, bytes); }
void *realloc(void *old, size_t bytes) { return refuse() ? NULL : __libc_realloc(old, bytes); }
void *aligned_alloc(size_t alignment, size_t bytes) {
  return refuse() ? NULL : __libc_memalign(alignment, bytes);
}
int posix_memalign(void **out, size_t alignment, size_t bytes) {
  void *memory = refuse() ? NULL : __libc_memalign(alignment, bytes);
  if (memory == NULL) return ENOMEM;
  *out = memory;
  return 0;
}
void *mmap(void *at, size_t bytes, int protection, int flags, int file, off_t offset) {
  if (refuse()) return MAP_FAILED;
  return (void *)syscall(SYS_mmap, at, bytes, protection, flags, file, offset);
}

////////////////////////////////////////////////////////////////////////////////////////////////////
// What a child tells: an outcome, and the refused allocation.

static int told = -1;

static void tell(const char *outcome, const char *text) {
  own = 1;
  dprintf(told, "%s\t%s\t%s\t", outcome, refused_in, text);
  uint32_t (*function)(void) = pfc_version;
  void *of_the_library;
  Dl_info library, frame;
  memcpy(&of_the_library, &function, sizeof of_the_library);
  if (dladdr(of_the_library, &library)) {
    for (int i = 0; i < depth; i++) {
      if (!dladdr(frames[i], &frame) || frame.dli_fbase != library.dli_fbase) continue;
      // A return address belongs to the line after the call.
      dprintf(told, "%lx ", (long)((char *)frames[i] - (char *)library.dli_fbase) - 1);
    }
  }
  own = 0;
}

static void write_all(const void *bytes, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t more = write(told, (const char *)bytes + done, size - done);
    if (more <= 0) _exit(3);
    done += (size_t)more;
  }
}

static void on_abort(int signal) {
  (void)signal;
  tell("abort", "");
  _exit(0);
}

static pthread_mutex_t first = PTHREAD_MUTEX_INITIALIZER;
static char wrong[256];
static pfc_status status_of_the_refused;

static void is_wrong(const char *format, ...) {
  va_list list;
  va_start(list, format);
  pthread_mutex_lock(&first);
  own = 1;
  if (wrong[0] == 0) vsnprintf(wrong, sizeof wrong, format, list);
  own = 0;
  pthread_mutex_unlock(&first);
  va_end(list);
}

// A status that memory which is short may lead to; `also` is one more that this call may give.
static pfc_status judge(const char *name, pfc_status status, pfc_status also) {
  switch (status) {
    case PFC_OK:
    case PFC_ERROR_OUT_OF_MEMORY:
    case PFC_ERROR_REMOTE:
    case PFC_ERROR_POISONED:
    case PFC_ERROR_ABORTED: break;
    default:
      if (status != also)
        is_wrong("%s gave %s: %s", name, pfc_status_name(status), pfc_last_error());
  }
  if (status != PFC_OK && pfc_last_error()[0] == 0) is_wrong("%s: no text", name);
  if (status != PFC_OK && status_of_the_refused == PFC_OK) status_of_the_refused = status;
  return status;
}

static void enter(const char *name) { last_call = call = name; }

#define CALL_OR(also, function, ...) \
  (enter(#function), judge(#function, function(__VA_ARGS__), also))
#define CALL(function, ...) CALL_OR(PFC_OK, function, __VA_ARGS__)
// A call after one that may have failed: then it is out of order, too.
#define NEXT(function, ...) CALL_OR(PFC_ERROR_INVALID_ARGUMENT, function, __VA_ARGS__)

// An output that must be as it was after a failure.
#define UNLESS_OK(status, output, was)                                            \
  do {                                                                            \
    if ((status) != PFC_OK && memcmp((output), (was), sizeof(output)) != 0)       \
      is_wrong("%s wrote %s and gave %s", call, #output, pfc_status_name(status)); \
  } while (0)

////////////////////////////////////////////////////////////////////////////////////////////////////
// Scenarios.

enum { D = 24, B = 10, C = 1500, K = 5, ROWS = 8 };

static void embeddings_of(float *to, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) to[i] = (float)(i * 37 % 19) / 9 - 1;
}
static pfc_matrix matrix(float *data, uint64_t rows, uint64_t cols) {
  pfc_matrix m = {data, PFC_F32, 0, rows, cols, cols};
  return m;
}

// Every call of a head, on this rank; `ranks` of them call it.
static void all_calls(pfc_device *device, pfc_comm *comm, const pfc_head_options *options) {
  float embeddings[B * D], gradient[B * D], gradient_was[B * D], rows[ROWS * D], rows_was[ROWS * D];
  float cosines[B * K], cosines_was[B * K];
  int64_t labels[B], ids[B * K], ids_was[B * K], sample[C], given[3];
  double loss[1], loss_was[1] = {-1};
  uint64_t first = 0, count = 0;
  pfc_head *head = NULL;
  pfc_metrics metrics[1], metrics_was[1];
  pfc_status status;

  embeddings_of(embeddings, B * D);
  memset(gradient, 7, sizeof gradient);
  memcpy(gradient_was, gradient, sizeof gradient);
  memset(rows, 7, sizeof rows);
  memset(ids, 7, sizeof ids);
  memcpy(ids_was, ids, sizeof ids);
  memset(cosines, 7, sizeof cosines);
  memcpy(cosines_was, cosines, sizeof cosines);
  for (int i = 0; i < B; i++) labels[i] = i * 131 % C;
  pfc_matrix e = matrix(embeddings, B, D), g = matrix(gradient, B, D), w = matrix(rows, ROWS, D);

  CALL(pfc_head_create, device, comm, options, &head);
  if (head == NULL) return;
  for (int i = 0; i < 2; i++) {
    memcpy(gradient, gradient_was, sizeof gradient);
    loss[0] = -1;
    status = CALL(pfc_head_step, head, &e, labels, 0.1, &g, loss);
    UNLESS_OK(status, gradient, gradient_was);
    UNLESS_OK(status, loss, loss_was);
  }
  // A rank whose prepare failed has no labels, and its forward is a wrong call.
  CALL(pfc_head_prepare, head, labels, B);
  loss[0] = -1;
  status = NEXT(pfc_head_forward, head, &e, NULL, loss);
  UNLESS_OK(status, loss, loss_was);
  memcpy(gradient, gradient_was, sizeof gradient);
  status = NEXT(pfc_head_backward, head, 1, 1, &g);
  UNLESS_OK(status, gradient, gradient_was);
  NEXT(pfc_head_update, head, 0.1);

  // Micro-batches.
  for (int i = 0; i < 2; i++) {
    CALL(pfc_head_forward, head, &e, labels, loss);
    NEXT(pfc_head_backward, head, 1, 1, &g);
    // Only this rank knows that it failed: it asks again, so that it does what the others do.
    status = NEXT(pfc_head_accumulate, head);
    if (status == PFC_ERROR_OUT_OF_MEMORY) NEXT(pfc_head_accumulate, head);
  }
  NEXT(pfc_head_update, head, 0.1);

  // Rows with terms of their own.
  if (options->row_terms == PFC_ROW_TERMS_ON) {
    float terms[B], margins[B], margins_was[B];
    for (int i = 0; i < B; i++) terms[i] = (float)(i % 5) / 8;
    memset(margins, 7, sizeof margins);
    memcpy(margins_was, margins, sizeof margins);
    pfc_forward_options forward;
    pfc_backward_options backward;
    pfc_forward_options_init(&forward);
    pfc_backward_options_init(&backward);
    forward.m2 = forward.weight = terms;
    backward.grad_m2 = margins;
    loss[0] = -1;
    status = CALL(pfc_head_forward_with, head, &e, labels, &forward, loss);
    UNLESS_OK(status, loss, loss_was);
    status = NEXT(pfc_head_backward_with, head, &backward, &g);
    UNLESS_OK(status, margins, margins_was);
    NEXT(pfc_head_update, head, 0.1);
    terms[3] = 4;
    CALL_OR(PFC_ERROR_INVALID_ARGUMENT, pfc_head_forward_with, head, &e, labels, &forward, loss);
  }

  NEXT(pfc_head_sample_ids, head, sample, C, &count);
  CALL(pfc_head_shard, head, &first, &count);
  for (int i = 0; i < 3; i++) given[i] = (int64_t)first + 2 * i;
  CALL(pfc_head_set_sample, head, given, 3);
  CALL(pfc_head_step, head, &e, labels, 0.1, &g, loss);
  pfc_metrics_init(metrics);
  memcpy(metrics_was, metrics, sizeof metrics);
  status = NEXT(pfc_head_metrics, head, metrics);
  UNLESS_OK(status, metrics, metrics_was);
  status = CALL(pfc_head_top_k, head, &e, K, ids, cosines);
  UNLESS_OK(status, ids, ids_was);
  UNLESS_OK(status, cosines, cosines_was);
  memcpy(rows_was, rows, sizeof rows);
  status = CALL(pfc_head_read_centers, head, first, ROWS, &w);
  UNLESS_OK(status, rows, rows_was);
  if (status == PFC_OK) CALL(pfc_head_write_centers, head, first, ROWS, &w);
  memcpy(rows_was, rows, sizeof rows);
  status = CALL(pfc_head_read_state, head, PFC_STATE_MOMENTUM, first, ROWS, &w);
  UNLESS_OK(status, rows, rows_was);
  if (status == PFC_OK) CALL(pfc_head_write_state, head, PFC_STATE_MOMENTUM, first, ROWS, &w);
  CALL(pfc_head_wait, head);

  // A step after all that, then errors, whose texts need memory too.
  CALL(pfc_head_step, head, &e, labels, 0.1, &g, loss);
  labels[0] = -5;
  CALL_OR(PFC_ERROR_LABEL, pfc_head_step, head, &e, labels, 0.1, &g, loss);
  labels[0] = 0;
  embeddings[3] /= 0.0f;
  CALL_OR(PFC_ERROR_NOT_FINITE, pfc_head_forward, head, &e, labels, loss);
  NEXT(pfc_head_forward, head, NULL, labels, loss);
  enter("pfc_head_free");
  pfc_head_free(head);
}

static pfc_head_options options_of(int placement, int optimizer, int rows, double rate) {
  pfc_head_options options;
  pfc_head_options_init(&options);
  options.num_classes = C;
  options.embedding_dim = D;
  options.max_batch = B;
  options.placement = placement;
  options.optimizer = optimizer;
  options.row_update = rows;
  options.sample_rate = rate;
  return options;
}

static int32_t gather_alone(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
  (void)ctx, (void)stream;
  if (bytes > 0 && send != recv) memcpy(recv, send, bytes);
  return 0;
}
static int32_t reduce_alone(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                            int32_t op, void *stream) {
  (void)op;
  uint64_t bytes = count * (dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4);
  return gather_alone(ctx, send, recv, bytes, stream);
}

static void one_rank(const pfc_head_options *options, int custom) {
  pfc_device *device = NULL;
  pfc_comm *comm = NULL;
  pfc_plan_report report;
  pfc_comm_ops ops;
  pfc_plan_report_init(&report);
  CALL(pfc_device_cpu, 1, &device);
  if (device == NULL) return;
  if (custom) {
    pfc_comm_ops_init(&ops);
    ops.size = 1;
    ops.all_gather = gather_alone;
    ops.all_reduce = reduce_alone;
    CALL(pfc_comm_custom, &ops, &comm);
  } else {
    CALL(pfc_comm_self, &comm);
  }
  if (comm != NULL) {
    CALL(pfc_plan, options, 4, 3, &report);
    CALL(pfc_plan_cuda, options, 4, 3, 1 << 30, &report);
    all_calls(device, comm, options);
    CALL(pfc_comm_abort, comm);
    CALL(pfc_comm_barrier, comm);
    enter("pfc_comm_free");
    pfc_comm_free(comm);
  }
  enter("pfc_device_free");
  pfc_device_free(device);
}

static void sharded(void) {
  pfc_head_options options =
      options_of(PFC_PLACEMENT_SHARDED, PFC_OPTIMIZER_SGD, PFC_ROW_UPDATE_LAZY, 1);
  one_rank(&options, 0);
}
static void dense(void) {
  pfc_head_options options =
      options_of(PFC_PLACEMENT_SHARDED, PFC_OPTIMIZER_ADAMW, PFC_ROW_UPDATE_DENSE, 0.1);
  options.row_terms = PFC_ROW_TERMS_ON;
  one_rank(&options, 0);
}
static void replicated(void) {
  pfc_head_options options =
      options_of(PFC_PLACEMENT_REPLICATED, PFC_OPTIMIZER_SGD, PFC_ROW_UPDATE_DENSE, 0.5);
  options.row_terms = PFC_ROW_TERMS_ON;
  one_rank(&options, 1);
}

// Two ranks: an error of one is an error of both, and no rank waits for the other.
static void *rank(void *of) {
  pfc_comm *comm = of;
  pfc_device *device = NULL;
  float rows[3 * 4] = {0}, rows_out[6 * 4], rows_was[6 * 4];
  int64_t ids[3] = {1, 2, 3}, ids_out[6], buffer[4] = {1, 2, 3, 4};
  uint64_t count = 0;
  pfc_head_options options =
      options_of(PFC_PLACEMENT_SHARDED, PFC_OPTIMIZER_SGD, PFC_ROW_UPDATE_LAZY, 0.3);
  memset(rows_out, 7, sizeof rows_out);
  memcpy(rows_was, rows_out, sizeof rows_out);
  pfc_matrix in = matrix(rows, 3, 4), out = matrix(rows_out, 6, 4);
  // Here two threads compute. In the other scenarios the calling thread does, alone, so that they
  // ask for the same memory in each run.
  CALL(pfc_device_cpu, 2, &device);
  if (device == NULL) {
    CALL(pfc_comm_abort, comm);
    return NULL;
  }
  all_calls(device, comm, &options);
  pfc_status status =
      CALL(pfc_all_reduce_rows, comm, device, ids, 3, &in, ids_out, 6, &out, &count);
  UNLESS_OK(status, rows_out, rows_was);
  CALL(pfc_comm_all_gather, comm, ids, ids_out, 8);
  CALL(pfc_comm_all_reduce, comm, buffer, ids_out, 4, PFC_I64, PFC_SUM);
  CALL(pfc_comm_reduce_scatter, comm, buffer, ids_out, 2, PFC_I64, PFC_SUM);
  CALL(pfc_comm_broadcast, comm, buffer, 8, 0);
  CALL(pfc_comm_barrier, comm);
  enter("pfc_device_free");
  pfc_device_free(device);
  return NULL;
}
static void two_ranks(void) {
  pfc_comm *comms[2] = {NULL, NULL};
  pthread_t threads[2];
  CALL(pfc_comm_threads, 2, comms);
  if (comms[0] == NULL) return;
  for (int i = 0; i < 2; i++) {
    own = 1;
    if (pthread_create(&threads[i], NULL, rank, comms[i]) != 0) abort();
    own = 0;
  }
  for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
  for (int i = 0; i < 2; i++) pfc_comm_free(comms[i]);
}

static void on_line(void *user, int32_t level, const char *message) {
  (void)user, (void)level, (void)message;
}

static void kernels(void) {
  enum { S = 60 };
  static float e[B * D], w[S * D], p[B * D], sums[B], logits[B], ge[B * D], gw[S * D];
  static float cosines[B * S], momentum[S * D];
  static char workspace[4 << 20];
  int64_t targets[B], ids[150], positives[2] = {5, 9}, updated[3] = {1, 4, 2};
  uint64_t need = sizeof workspace, count = 0;
  pfc_device *device = NULL, *gpu = NULL;
  pfc_margin margin;
  pfc_optimizer optimizer;
  pfc_margin_init(&margin);
  pfc_optimizer_init(&optimizer);
  embeddings_of(e, B * D);
  embeddings_of(w, S * D);
  for (int i = 0; i < B; i++) targets[i] = i;
  pfc_matrix em = matrix(e, B, D), wm = matrix(w, S, D), pm = matrix(p, B, D);
  pfc_matrix gem = matrix(ge, B, D), gwm = matrix(gw, S, D), cm = matrix(cosines, B, S);
  pfc_matrix mm = matrix(momentum, S, D), three = matrix(ge, 3, D);

  CALL(pfc_set_log, on_line, NULL, PFC_LOG_DEBUG);
  CALL(pfc_device_cpu, 1, &device);
  if (device != NULL) {
    CALL(pfc_fused_forward, device, &margin, &em, &wm, targets, sums, logits, &pm, workspace, need);
    NEXT(pfc_fused_backward, device, &margin, &em, &wm, targets, sums, logits, &pm, 0.1, &gem, &gwm,
         workspace, need);
    CALL(pfc_normalize_rows, device, &em, &pm, sums);
    CALL(pfc_normalize_gemm, device, &em, &wm, &cm, workspace, need);
    CALL(pfc_partial_softmax, device, &margin, &cm, targets, sums);
    CALL(pfc_margin_forward, device, &margin, sums, B, logits);
    CALL(pfc_margin_backward, device, &margin, sums, logits, B, logits);
    CALL(pfc_sample_classes, device, 1, 2, 0, 100000, positives, 2, 150, ids, &count);
    CALL(pfc_update_rows, device, &optimizer, &wm, &mm, NULL, updated, &three, 0.1, 1);
    CALL(pfc_fused_workspace, device, B, D, S, &need);
    updated[0] = -1;
    CALL_OR(PFC_ERROR_INVALID_ARGUMENT, pfc_update_rows, device, &optimizer, &wm, &mm, NULL,
            updated, &three, 0.1, 1);
  }
  // Not there, or not wanted: the text of the error needs memory.
  CALL_OR(PFC_ERROR_UNSUPPORTED, pfc_device_cuda, 0, NULL, &gpu);
  CALL_OR(PFC_ERROR_UNSUPPORTED, pfc_nccl_unique_id, (uint8_t *)ids);
  CALL(pfc_set_log, NULL, NULL, PFC_LOG_OFF);
  pfc_device_free(device);
}

static const struct {
  const char *name;
  void (*run)(void);
} scenarios[] = {{"sharded", sharded},
                 {"dense", dense},
                 {"replicated", replicated},
                 {"two_ranks", two_ranks},
                 {"kernels", kernels}};

////////////////////////////////////////////////////////////////////////////////////////////////////

// The rest of a child: runs the scenario and tells how it went. Without a number no memory is
// refused, and the places are told.
static void child(void (*run)(void), uint64_t place, long number) {
  // What the library says when it aborts is told better by its outcome.
  int nowhere = open("/dev/null", O_WRONLY);
  if (number >= 0) dup2(nowhere, 2);
  signal(SIGABRT, on_abort);
  alarm(SECONDS);
  refused_place = place;
  refused_number = number;
  armed = 1;
  run();
  armed = 0;
  if (number < 0) {
    if (wrong[0] != 0) {
      fprintf(stderr, "with all memory: %s\n", wrong);
    } else if (mode == BY_PLACE) {
      write_all(places, sizeof places);
    } else {
      write_all(&allocations, sizeof allocations);
    }
  } else if (wrong[0] != 0) {
    tell("wrong", wrong);
  } else {
    tell("fine", pfc_status_name(status_of_the_refused));
  }
  _exit(0);
}

// Runs a child; the bytes that it told. `state`: how it ended.
static size_t run_child(void (*run)(void), uint64_t place, long number, void *text, size_t size,
                        int *state) {
  int ends[2];
  if (pipe(ends) != 0) exit(2);
  pid_t process = fork();
  if (process < 0) exit(2);
  if (process == 0) {
    close(ends[0]);
    told = ends[1];
    child(run, place, number);
  }
  close(ends[1]);
  size_t got = 0;
  ssize_t more;
  while ((more = read(ends[0], (char *)text + got, size - got)) > 0) got += (size_t)more;
  close(ends[0]);
  while (waitpid(process, state, 0) < 0) {
  }
  return got;
}

static void one(void (*run)(void), uint64_t place, long number) {
  static char text[1 << 14];
  int state;
  size_t got = run_child(run, place, number, text, sizeof text - 1, &state);
  text[got] = 0;
  if (WIFSIGNALED(state)) {
    const char *outcome = WTERMSIG(state) == SIGALRM ? "hang" : "signal";
    snprintf(text, sizeof text, "%s\t\t%d\t", outcome, WTERMSIG(state));
  }
  puts(text);
}

int main(int argc, char **argv) {
  void (*run)(void) = NULL;
  void *warm[2];
  int state;
  for (size_t i = 0; argc > 1 && i < sizeof scenarios / sizeof *scenarios; i++) {
    if (strcmp(argv[1], scenarios[i].name) == 0) run = scenarios[i].run;
  }
  if (argc > 2) mode = strcmp(argv[2], "each") == 0 ? EACH : FROM;
  if (run == NULL) {
    fprintf(stderr, "out_of_memory sharded|dense|replicated|two_ranks|kernels [each|from]\n");
    return 2;
  }
  // An abort of Rust's reads all line numbers first, which takes longer than all the rest.
  setenv("RUST_BACKTRACE", "0", 1);
  // The first backtrace loads a library, for which memory must be there.
  backtrace(warm, 2);

  size_t size = mode == BY_PLACE ? sizeof places : sizeof allocations;
  void *counted = mode == BY_PLACE ? (void *)places : (void *)&allocations;
  if (run_child(run, 0, -1, counted, size, &state) != size) {
    fprintf(stderr, "%s does not run with all memory\n", argv[1]);
    return 2;
  }
  if (mode == BY_PLACE) {
    static struct {
      uint64_t place;
      long times;
    } found[PLACES];
    memcpy(found, places, sizeof found);
    memset(places, 0, sizeof places);
    for (int i = 0; i < PLACES; i++) {
      for (long k = 0; k < found[i].times && k < TIMES; k++) one(run, found[i].place, k);
    }
  } else {
    long count = allocations;
    allocations = 0;
    for (long k = 0; k < count; k++) one(run, 0, k);
  }
  return 0;
}
