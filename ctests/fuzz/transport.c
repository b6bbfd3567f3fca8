// A communicator of the caller's functions, for threads. Its functions may fail, and they may lie:
// bring back other bytes than were sent, blocks in another order, counts that no rank has.
#include "fuzz.h"

#include <limits.h>

enum { FAILED = 42, ENDED = 7, UNEQUAL = 9 };

struct hub {
  pthread_mutex_t lock;
  pthread_cond_t all_are_here;
  int ranks, here, ended, unequal, ends;
  unsigned turn;
  // What each rank sent; freed with the hub, as a rank that was aborted may still read.
  unsigned char *sent[MOST_RANKS];
  uint64_t bytes[MOST_RANKS];
};
struct end {
  struct hub *hub;
  int rank, failing, lying, freed;
  struct draws d;
};

// Waits for all ranks; 0 if all came with the same number of bytes.
static int meet(struct hub *h, int rank, uint64_t bytes) {
  pthread_mutex_lock(&h->lock);
  h->bytes[rank] = bytes;
  unsigned turn = h->turn;
  if (h->ended) {
    // Nobody comes any more.
  } else if (++h->here == h->ranks) {
    h->here = 0;
    h->turn++;
    h->unequal = 0;
    for (int i = 1; i < h->ranks; i++) h->unequal |= h->bytes[i] != h->bytes[0];
    pthread_cond_broadcast(&h->all_are_here);
  } else {
    while (h->turn == turn && !h->ended) pthread_cond_wait(&h->all_are_here, &h->lock);
  }
  int code = h->turn == turn ? ENDED : h->unequal ? UNEQUAL : 0;
  pthread_mutex_unlock(&h->lock);
  return code;
}

// Bytes that another rank, or the way from it, has spoilt.
static void garble(struct draws *d, unsigned char *bytes, uint64_t count) {
  if (count == 0) return;
  switch (below(d, 4)) {
    case 0:
      for (uint64_t i = 0; i < count; i++)
        if (chance(d, 125)) bytes[i] = (unsigned char)draw(d);
      break;
    case 1: memset(bytes, (int)below(d, 2) * 255, count); break;
    default:
      // One word, such as a count.
      if (count >= 8) {
        int64_t word =
            ONE_OF(d, int64_t, 0, 1, -1, 3, 40, 1 << 20, INT64_MAX, INT64_MIN, 1ll << 33);
        uint64_t words = count / 8, early = words < 6 ? words : 6;
        memcpy(bytes + 8 * below(d, chance(d, 500) ? early : words), &word, 8);
      }
  }
}

static int fails(struct end *e) { return chance(&e->d, e->failing); }

// Sends `bytes` to the hub. 0 if all ranks did.
static int send_to_all(struct end *e, const void *send, uint64_t bytes, uint64_t kind, int lie) {
  struct hub *h = e->hub;
  pthread_mutex_lock(&h->lock);
  unsigned char *to = h->ended ? NULL : realloc(h->sent[e->rank], bytes + 1);
  if (to != NULL) h->sent[e->rank] = to;
  pthread_mutex_unlock(&h->lock);
  if (to == NULL) return ENDED;
  if (bytes > 0) memcpy(to, send, bytes);
  if (lie) garble(&e->d, to, bytes);
  return meet(h, e->rank, bytes * 64 + kind);
}
// No rank sends anew before all have read.
static int all_have_read(struct end *e) { return meet(e->hub, e->rank, 0); }

static int32_t all_gather(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
  struct end *e = ctx;
  struct hub *h = e->hub;
  (void)stream;
  if (fails(e)) return FAILED;
  int lie = chance(&e->d, e->lying) ? 1 + (int)below(&e->d, 4) : 0;
  int code = send_to_all(e, send, bytes, 1, lie == 1);
  if (code != 0) return code;
  // 2: two blocks in each other's place. 3: as by a group that counts its ranks otherwise.
  int first = (int)below(&e->d, (uint64_t)h->ranks);
  int second = (int)below(&e->d, (uint64_t)h->ranks);
  for (int i = 0; i < h->ranks && bytes > 0; i++) {
    int of = lie == 3 ? (i + 1) % h->ranks : i;
    if (lie == 2) of = i == first ? second : i == second ? first : i;
    memcpy((char *)recv + (uint64_t)i * bytes, h->sent[of], bytes);
  }
  if (lie == 4) garble(&e->d, recv, bytes * (uint64_t)h->ranks);
  return all_have_read(e);
}

// Integers wrap, which only unsigned ones may in C.
#define REDUCE(type, wrapping)                                                               \
  do {                                                                                       \
    type all, more;                                                                          \
    memcpy(&all, h->sent[0] + i * sizeof all, sizeof all);                                   \
    for (int k = 1; k < h->ranks; k++) {                                                     \
      memcpy(&more, h->sent[k] + i * sizeof more, sizeof more);                              \
      if (op == PFC_SUM) {                                                                   \
        all = (type)((wrapping)all + (wrapping)more);                                        \
      } else if (more > all) {                                                               \
        all = more;                                                                          \
      }                                                                                      \
    }                                                                                        \
    memcpy((char *)recv + (i - first) * sizeof all, &all, sizeof all);                       \
  } while (0)

// Elements `first` to `first + count` of the reduced.
static void reduce(struct hub *h, void *recv, uint64_t first, uint64_t count, int32_t dtype,
                   int32_t op) {
  for (uint64_t i = first; i < first + count; i++) {
    switch (dtype) {
      case PFC_F32: REDUCE(float, float); break;
      case PFC_F64: REDUCE(double, double); break;
      case PFC_I32: REDUCE(int32_t, uint32_t); break;
      default: REDUCE(int64_t, uint64_t);
    }
  }
}

static int32_t all_reduce(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                          int32_t op, void *stream) {
  struct end *e = ctx;
  (void)stream;
  if (fails(e)) return FAILED;
  uint64_t bytes = count * size_of(dtype);
  int lie = chance(&e->d, e->lying) ? 1 + (int)below(&e->d, 3) : 0;
  int code = send_to_all(e, send, bytes, 8 + (uint64_t)dtype, lie == 1);
  if (code != 0) return code;
  reduce(e->hub, recv, 0, count, dtype, op);
  if (lie == 2) garble(&e->d, recv, bytes);
  if (lie == 3 && bytes > 0) memcpy(recv, e->hub->sent[e->rank], bytes);
  return all_have_read(e);
}

static int32_t reduce_scatter(void *ctx, const void *send, void *recv, uint64_t count,
                              int32_t dtype, int32_t op, void *stream) {
  struct end *e = ctx;
  (void)stream;
  if (fails(e)) return FAILED;
  uint64_t bytes = count * size_of(dtype);
  int lie = chance(&e->d, e->lying);
  int code = send_to_all(e, send, bytes * (uint64_t)e->hub->ranks, 16 + (uint64_t)dtype, 0);
  if (code != 0) return code;
  reduce(e->hub, recv, (uint64_t)e->rank * count, count, dtype, op);
  if (lie) garble(&e->d, recv, bytes);
  return all_have_read(e);
}

static int32_t broadcast(void *ctx, void *buffer, uint64_t bytes, uint32_t root, void *stream) {
  struct end *e = ctx;
  (void)stream;
  if (fails(e)) return FAILED;
  int code = send_to_all(e, buffer, bytes, 32 + root, 0);
  if (code != 0) return code;
  if (bytes > 0) memcpy(buffer, e->hub->sent[root], bytes);
  return all_have_read(e);
}

static int32_t barrier(void *ctx) {
  struct end *e = ctx;
  return fails(e) ? FAILED : meet(e->hub, e->rank, 0);
}
static void end_hub(void *ctx) {
  struct hub *h = ((struct end *)ctx)->hub;
  pthread_mutex_lock(&h->lock);
  h->ended = 1;
  pthread_cond_broadcast(&h->all_are_here);
  pthread_mutex_unlock(&h->lock);
}
static int32_t async_error(void *ctx) {
  struct end *e = ctx;
  return e->failing > 0 && chance(&e->d, 1) ? 77 : 0;
}
// A text that fills the buffer and has no end, or bytes that are no UTF-8.
static void error_string(void *ctx, int32_t code, char *buffer, uint64_t size) {
  (void)ctx;
  if (code == FAILED) {
    memset(buffer, 'x', size);
  } else {
    snprintf(buffer, size, "\xff\xfe code %d", (int)code);
  }
}
static void free_end(void *ctx) {
  struct end *e = ctx;
  struct hub *h = e->hub;
  if (e->freed++ > 0) finding("a communicator's ctx was freed twice");
  // By the lock, which ThreadSanitizer sees where it does not see this program's own accesses.
  pthread_mutex_lock(&h->lock);
  int left = --h->ends;
  pthread_mutex_unlock(&h->lock);
  if (left == 0) {
    for (int i = 0; i < h->ranks; i++) free(h->sent[i]);
    pthread_mutex_destroy(&h->lock);
    pthread_cond_destroy(&h->all_are_here);
    free(h);
  }
  free(e);
}

void custom_comms(struct draws *d, int n, int failing, int lying, pfc_comm **out) {
  struct hub *h = calloc(1, sizeof *h);
  pthread_mutex_init(&h->lock, NULL);
  pthread_cond_init(&h->all_are_here, NULL);
  h->ranks = h->ends = n;
  uint64_t parts = draw(d);
  for (int i = 0; i < n; i++) {
    struct end *e = calloc(1, sizeof *e);
    pfc_comm_ops ops;
    e->hub = h;
    e->rank = i;
    e->failing = failing;
    e->lying = lying;
    e->d.state = draw(d);
    DO(pfc_comm_ops_init, &ops);
    ops.ctx = e;
    ops.rank = (uint32_t)i;
    ops.size = (uint32_t)n;
    ops.all_gather = all_gather;
    ops.all_reduce = all_reduce;
    ops.abort = end_hub;
    ops.free = free_end;
    if (parts & 1) ops.reduce_scatter = reduce_scatter;
    if (parts & 2) ops.broadcast = broadcast;
    if (parts & 4) ops.barrier = barrier;
    if (parts & 8) ops.error_string = error_string;
    if (parts & 16) ops.async_error = async_error;
    if (DO(pfc_comm_custom, &ops, &out[i]) != PFC_OK) finding("functions were refused");
  }
}

// Tables that are wrong; the library calls and frees nothing of them.
void refused_comms(struct draws *d) {
  struct end e;
  pfc_comm_ops ops;
  pfc_comm *out = NULL;
  memset(&e, 0, sizeof e);
  e.freed = 1;
  pfc_comm_ops_init(&ops);
  ops.ctx = &e;
  ops.size = 1;
  ops.all_gather = all_gather;
  ops.all_reduce = all_reduce;
  ops.free = free_end;
  switch (below(d, 8)) {
    case 0: ops.size = 0; break;
    case 1: ops.rank = 1; break;
    case 2: ops.flags = 0; break;
    case 3: ops.flags = 0xffff; break;
    case 4: ops.all_gather = NULL; break;
    case 5: ops.all_reduce = NULL; break;
    case 6: ops.reserved = 3; break;
    default: ops.struct_size = ONE_OF(d, uint64_t, 0, 7, 1 << 20, UINT64_MAX);
  }
  if (DO(pfc_comm_custom, &ops, &out) == PFC_OK) finding("a wrong table was accepted");
  if (out != NULL) finding("a communicator was made of a wrong table");
}
