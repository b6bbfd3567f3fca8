// Episodes of heads: ranks are threads, which make the same calls, with a mistake on one of them
// now and then.
#include "heads.h"

#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <unistd.h>

int mistake(struct rank *r, int part) { return chance(&r->own, r->mistakes / part); }

void must_succeed(const struct rank *r, const char *call, pfc_status status) {
  if (r->mistakes == 0 && now.mode != LIES && status != PFC_OK)
    finding("%s gave %s without a mistake", call, pfc_status_name(status));
}
void must_fail(const char *call, pfc_status status) {
  if (status == PFC_OK) finding("%s accepted what is wrong", call);
}
void must_be_kept(const char *call, pfc_status status, const struct block *output) {
  if (status != PFC_OK && !is_kept(output))
    finding("%s gave %s and wrote an output", call, pfc_status_name(status));
}

////////////////////////////////////////////////////////////////////////////////////////////////////
// The other calls of a head.

static void progress(struct rank *r) {
  struct draws *own = &r->own;
  uint64_t draws = 0, updates = 0;
  // Brings dense rows up to date, which replicas must all do.
  if (r->options.placement == PFC_PLACEMENT_REPLICATED && r->options.row_update == PFC_ROW_UPDATE_DENSE && r->mistakes == 0)
    return;
  must_succeed(r, "pfc_head_read_progress",
               DO(pfc_head_read_progress, r->head, &draws, &updates));
  // Writing abandons a step, and another number makes the ranks differ.
  if (r->mistakes > 0 && chance(own, 300)) {
    if (chance(own, 500)) draws += ONE_OF(own, uint64_t, 1, 5, 1ull << 56, UINT64_MAX - draws);
    DO(pfc_head_write_progress, r->head, draws, updates);
  }
}

static void rows(struct rank *r) {
  struct draws *own = &r->own;
  if (chance(own, 200)) progress(r);
  uint64_t of = 0, count = 0;
  must_succeed(r, "pfc_head_shard", DO(pfc_head_shard, r->head, &of, &count));
  uint64_t some = below(own, count + 1), first = of + below(own, count - some + 1), told = some;
  int tensor = (int)below(own, r->options.optimizer == PFC_OPTIMIZER_ADAMW ? 3 : 2);
  // Writing would make the ranks' copies differ, and abandons a step.
  int writes = r->mistakes > 0 && chance(own, 400), wrong = 0;
  int wild = writes && chance(own, 50) ? 40 : 0;
  struct grid g = grid_of(own, some, r->options.embedding_dim, 0, wild);
  if (tensor == PFC_STATE_SECOND_MOMENT && writes) {
    // No number below 0: the sign is the last bit of each.
    for (uint64_t i = 0; i < g.rows; i++)
      for (uint64_t j = 0; j < g.cols; j++)
        g.memory.data[(i * g.stride + j + 1) * g.size - 1] &= 0x7f;
    keep(&g.memory);
  }
  if (mistake(r, 1)) {
    wrong = 1;
    switch (below(own, 5)) {
      case 0: first = ONE_OF(own, uint64_t, UINT64_MAX, of + count + 1, 1ull << 63); break;
      case 1: told = some + 1 + below(own, 5); break;
      case 2: told = UINT64_MAX; break;
      case 3: tensor = 3 + (int)below(own, 9); break;
      default: wrong = spoil(own, &g, 1);
    }
  }
  note("rows: write %d, tensor %d, %zu from %zu, wrong %d", writes, tensor, (size_t)told,
       (size_t)first, wrong);
  pfc_status status;
  if (writes && tensor == 0) {
    status = DO(pfc_head_write_centers, r->head, first, told, &g.m);
  } else if (writes) {
    status = DO(pfc_head_write_state, r->head, tensor, first, told, &g.m);
  } else if (tensor == 0) {
    status = DO(pfc_head_read_centers, r->head, first, told, &g.m);
  } else {
    status = DO(pfc_head_read_state, r->head, tensor, first, told, &g.m);
  }
  must_succeed(r, "a call of rows", status);
  if (wrong) must_fail("a call of rows", status);
  if (writes && !is_kept(&g.memory)) finding("a call of rows wrote its input");
  if (!gaps_are_kept(&g)) finding("a call of rows wrote between the rows");
  must_be_kept("a call of rows", status, &g.memory);
  drop_grid(&g);
}

static void top_k(struct rank *r, uint64_t k) {
  struct draws *own = &r->own;
  uint64_t count = below(own, 5) * below(own, 4), told = k;
  struct grid e = grid_of(own, count, r->options.embedding_dim, 0, 0);
  struct block ids = block_of(count * k * 8, 0x11), cosines = block_of(count * k * 4, 0x22);
  keep(&ids);
  keep(&cosines);
  int wrong = mistake(r, 2) && spoil(own, &e, 0), no_ids = count > 0 && mistake(r, 6);
  if (e.m.rows != count) e.m.data = NULL;
  if (mistake(r, 4))
    told = ONE_OF(own, uint64_t, 0, r->options.num_classes + 1, UINT64_MAX, 1ull << 62);
  note("top_k: %zu rows, k %zu, wrong %d %d", (size_t)count, (size_t)told, wrong, no_ids);
  pfc_status status = DO(pfc_head_top_k, r->head, &e.m, told, no_ids ? NULL : (int64_t *)ids.data,
                         (float *)cosines.data);
  must_succeed(r, "pfc_head_top_k", status);
  must_be_kept("pfc_head_top_k", status, &ids);
  must_be_kept("pfc_head_top_k", status, &cosines);
  if (wrong || no_ids || told != k) must_fail("pfc_head_top_k", status);
  for (uint64_t i = 0; status == PFC_OK && now.mode != LIES && i < count * k; i++) {
    int64_t id = ((int64_t *)ids.data)[i];
    float cosine = ((float *)cosines.data)[i];
    // Class centers that a mistake has made infinite are near to nothing.
    if (r->mistakes > 0) continue;
    if (id < 0 || (uint64_t)id >= r->options.num_classes)
      finding("top_k found class %lld", (long long)id);
    if (!(fabsf(cosine) <= 1.0001f)) finding("top_k found a cosine of %g", (double)cosine);
    if (i % k > 0 && ((float *)cosines.data)[i - 1] < cosine)
      finding("top_k is not in order");
  }
  drop_grid(&e);
  drop(&ids);
  drop(&cosines);
}

static void metrics(struct rank *r) {
  pfc_metrics m, was;
  DO(pfc_metrics_init, &m);
  int wrong = mistake(r, 3), none = mistake(r, 8);
  if (wrong) m.struct_size = ONE_OF(&r->own, uint64_t, 0, 7, UINT64_MAX);
  was = m;
  pfc_status status = DO(pfc_head_metrics, r->head, none ? NULL : &m);
  // Before the first step there is nothing to measure.
  if (r->steps > 0) must_succeed(r, "pfc_head_metrics", status);
  if (wrong || none) must_fail("pfc_head_metrics", status);
  if (status != PFC_OK && memcmp(&m, &was, sizeof m) != 0)
    finding("pfc_head_metrics wrote and failed");
  if (chance(&r->own, 300)) {
    pfc_metrics own = was;
    status = DO(pfc_head_last_metrics, r->head, none ? NULL : &own);
    if (wrong || none) must_fail("pfc_head_last_metrics", status);
    if (status != PFC_OK && memcmp(&own, &was, sizeof own) != 0)
      finding("pfc_head_last_metrics wrote and failed");
    if (status == PFC_OK && r->mistakes == 0 && own.loss != m.loss && now.mode != LIES)
      finding("two losses of one step");
    return;
  }
  if (status == PFC_OK && r->mistakes == 0 && now.mode != LIES) {
    if (!(m.top1 >= 0 && m.top1 <= 1)) finding("top1 is %g", m.top1);
    if (!isfinite(m.grad_embeddings_norm)) finding("a norm of %g", m.grad_embeddings_norm);
  }
}

static void sample_ids(struct rank *r) {
  uint64_t count = 0x77;
  pfc_status status = DO(pfc_head_sample_ids, r->head, NULL, 0, &count);
  if (status != PFC_OK) {
    if (count != 0x77) finding("pfc_head_sample_ids wrote a count and failed");
    return;
  }
  uint64_t capacity = chance(&r->own, 200) ? below(&r->own, count) : count, again = 0x99;
  struct block ids = block_of(capacity * 8, 9);
  keep(&ids);
  status = DO(pfc_head_sample_ids, r->head, (int64_t *)ids.data, capacity, &again);
  must_be_kept("pfc_head_sample_ids", status, &ids);
  if (capacity < count) must_fail("pfc_head_sample_ids", status);
  if (status == PFC_OK && again != count) finding("the sample has another size");
  for (uint64_t i = 1; status == PFC_OK && i < count; i++)
    if (((int64_t *)ids.data)[i] <= ((int64_t *)ids.data)[i - 1])
      finding("the sample is not ascending");
  drop(&ids);
}

// `common`: for ids that are the same on all ranks.
static void set_sample(struct rank *r, struct draws *common) {
  uint64_t of = 0, count = 0, some = 0;
  DO(pfc_head_shard, r->head, &of, &count);
  int replicated = r->options.placement == PFC_PLACEMENT_REPLICATED;
  struct draws *from = replicated && !mistake(r, 2) ? common : &r->own;
  struct block b = block_of(count * 8, 0);
  int64_t *ids = (int64_t *)b.data;
  int density = (int)below(from, 1001);
  for (uint64_t i = 0; i < count; i++)
    if (chance(from, density)) ids[some++] = (int64_t)(of + i);
  int wrong = some > 0 && mistake(r, 2);
  if (wrong)
    ids[below(&r->own, some)] = ONE_OF(&r->own, int64_t, -1, INT64_MAX, (int64_t)(of + count));
  uint64_t told = mistake(r, 4) ? ONE_OF(&r->own, uint64_t, UINT64_MAX, 1ull << 61) : some;
  if (some > 0 && mistake(r, 8)) ids = NULL;
  pfc_status status = DO(pfc_head_set_sample, r->head, ids, told);
  must_succeed(r, "pfc_head_set_sample", status);
  if (wrong || told != some) must_fail("pfc_head_set_sample", status);
  drop(&b);
}

////////////////////////////////////////////////////////////////////////////////////////////////////
// Collectives, and calls that cannot succeed.

static void collective(struct rank *r, int which, uint64_t count, int32_t dtype, int32_t op) {
  struct draws *own = &r->own;
  if (mistake(r, 6)) count += 1;
  if (mistake(r, 8)) dtype = ONE_OF(own, int32_t, -1, 0, PFC_F16, PFC_BF16, 7);
  if (mistake(r, 8)) op = ONE_OF(own, int32_t, -1, 0, 3);
  uint64_t size = which == 0 || which == 3 ? 1 : size_of(dtype), ranks = (uint64_t)r->ranks;
  struct block in = block_of(count * ranks * size, 1), out = block_of(count * ranks * size, 3);
  for (size_t i = 0; i < in.bytes / 8; i++) ((int64_t *)in.data)[i] = (int64_t)below(own, 1000);
  keep(&in);
  keep(&out);
  uint64_t huge = ONE_OF(own, uint64_t, UINT64_MAX, (1ull << 63) + 1, 1ull << 63, UINT64_MAX - 7);
  int is_huge = mistake(r, 6), no_input = count > 0 && mistake(r, 8), misaligned = mistake(r, 8);
  uint32_t root = mistake(r, 6) ? (uint32_t)ranks : 0;
  const void *send = no_input ? NULL : in.data;
  if (misaligned && count > 1 && size > 1 && !no_input) send = in.data + 1, count--;
  uint64_t told = is_huge ? huge : count;
  note("collective %d: %zu of %d, op %d", which, (size_t)told, (int)dtype, (int)op);
  pfc_status status = PFC_OK;
  switch (which) {
    case 0: status = DO(pfc_comm_all_gather, r->comm, send, out.data, told); break;
    case 1: status = DO(pfc_comm_all_reduce, r->comm, send, out.data, told, dtype, op); break;
    case 2: status = DO(pfc_comm_reduce_scatter, r->comm, send, out.data, told, dtype, op); break;
    case 3: status = DO(pfc_comm_broadcast, r->comm, out.data, told, root); break;
    default: status = DO(pfc_comm_barrier, r->comm);
  }
  must_succeed(r, "a collective", status);
  if (is_huge && which < 4) must_fail("a collective", status);
  if (!is_kept(&in)) finding("a collective wrote what it sends");
  drop(&in);
  drop(&out);
}

static void reduce_rows(struct rank *r, uint64_t cols, int equal) {
  struct draws *own = &r->own;
  uint64_t count = equal ? 5 : below(own, 12), capacity = 12 * (uint64_t)r->ranks;
  if (mistake(r, 2)) capacity = below(own, 12);
  if (mistake(r, 6)) cols += 1;
  struct block ids = block_of(count * 8, 0), ids_out = block_of(capacity * 8, 7);
  struct block got = block_of(8, 0x6B);
  int64_t id = equal ? 3 : (int64_t)below(own, 3);
  for (uint64_t i = 0; i < count; i++, id += equal ? 2 : 1 + (int64_t)below(own, 4))
    ((int64_t *)ids.data)[i] = id;
  if (count > 0 && mistake(r, 2))
    ((int64_t *)ids.data)[below(own, count)] = ONE_OF(own, int64_t, -5, INT64_MAX, 3);
  struct grid in = grid_of(own, count, cols, 0, 0), out = grid_of(own, capacity, cols, 0, 0);
  keep(&ids_out);
  keep(&got);
  if (mistake(r, 2)) spoil(own, &in, 0);
  if (mistake(r, 2)) spoil(own, &out, 0);
  // More rows than the memory has are no mistake that the library can see.
  if (in.m.rows > count) in.m.rows = count;
  if (out.m.rows > capacity) out.m.rows = capacity;
  note("rows: %zu ids, capacity %zu, %zu columns", (size_t)count, (size_t)capacity, (size_t)cols);
  pfc_status status =
      DO(pfc_all_reduce_rows, r->comm, r->device, (int64_t *)ids.data, count, &in.m,
         equal ? NULL : (int64_t *)ids_out.data, capacity, &out.m, (uint64_t *)got.data);
  must_succeed(r, "pfc_all_reduce_rows", status);
  // Rows go through the output while they are summed: after an error of the ranks it has any.
  if (status == PFC_ERROR_INVALID_ARGUMENT || status == PFC_ERROR_REMOTE) {
    must_be_kept("pfc_all_reduce_rows", status, &ids_out);
    must_be_kept("pfc_all_reduce_rows", status, &out.memory);
    must_be_kept("pfc_all_reduce_rows", status, &got);
  }
  if (!gaps_are_kept(&out)) finding("pfc_all_reduce_rows wrote between the rows");
  drop(&ids);
  drop(&ids_out);
  drop(&got);
  drop_grid(&in);
  drop_grid(&out);
}

static void hopeless(struct rank *r) {
  uint64_t a = 7;
  double loss = 3;
  pfc_matrix m;
  pfc_traffic traffic;
  char text[300];
  memset(&m, 0, sizeof m);
  pfc_status status = PFC_ERROR_INVALID_ARGUMENT;
  switch (below(&r->own, 30)) {
    case 0: status = DO(pfc_head_forward, NULL, &m, NULL, &loss); break;
    case 1: status = DO(pfc_head_step, NULL, NULL, NULL, 0, NULL, NULL); break;
    case 2: status = DO(pfc_head_backward, NULL, 1, 1, NULL); break;
    case 3: status = DO(pfc_head_update, NULL, 1); break;
    case 4: status = DO(pfc_head_wait, NULL); break;
    case 5: status = DO(pfc_head_metrics, NULL, NULL); break;
    case 6: status = DO(pfc_head_top_k, NULL, NULL, 0, NULL, NULL); break;
    case 7: status = DO(pfc_head_sample_ids, NULL, NULL, 0, NULL); break;
    case 8: status = DO(pfc_head_shard, r->head, NULL, &a); break;
    case 9: status = DO(pfc_comm_traffic, NULL, &traffic); break;
    case 10: status = DO(pfc_comm_traffic, r->comm, NULL); break;
    case 11: status = DO(pfc_comm_set_timeout, r->comm, 0); break;
    case 12: status = DO(pfc_comm_set_timeout, NULL, 1); break;
    case 13: status = DO(pfc_comm_abort, NULL); break;
    case 14: status = DO(pfc_comm_barrier, NULL); break;
    case 15: status = DO(pfc_head_prepare, NULL, NULL, 0); break;
    case 16: status = DO(pfc_head_save, NULL, "/nonexistent", NULL); break;
    case 17: status = DO(pfc_head_load, NULL, "/nonexistent", NULL); break;
    case 18: DO_OTHER(pfc_device_info, (NULL)); break;
    case 19: DO_OTHER(pfc_status_name, ((int32_t)draw(&r->own))); break;
    case 20: DO_OTHER(pfc_last_error_copy, (text, below(&r->own, sizeof text))); break;
    case 21: status = DO(pfc_head_last_metrics, r->head, NULL); break;
    case 22: DO_OTHER(pfc_head_error, (r->head, text, below(&r->own, sizeof text))); break;
    case 23: status = DO(pfc_head_update_with, r->head, NULL); break;
    case 24: status = DO(pfc_head_accumulate, NULL); break;
    case 25: status = DO(pfc_head_forward_with, NULL, &m, NULL, NULL, &loss); break;
    case 26: status = DO(pfc_head_backward_with, NULL, NULL, NULL); break;
    case 27: status = DO(pfc_head_resize, NULL, 1, NULL); break;
    case 28: status = DO(pfc_head_save_poll, NULL, NULL, NULL); break;
    default:
      if (DO(pfc_comm_traffic, r->comm, &traffic) != PFC_OK) finding("no traffic");
      if (DO_OTHER(pfc_device_info, (r->device)) == NULL) finding("no text of a device");
      if (DO_OTHER(pfc_comm_rank, (r->comm)) != (uint32_t)r->index) finding("another rank");
      if (DO_OTHER(pfc_comm_size, (r->comm)) != (uint32_t)r->ranks) finding("other ranks");
  }
  must_fail("a call with NULL or 0", status);
  if (a != 7 || loss != 3) finding("a call with NULL wrote an output");
}

// Where the ranks of this process keep their checkpoint.
static void name_folder(char folder[64]) {
  snprintf(folder, 64, "/tmp/partialfc-fuzz-%ld", (long)getpid());
}

// Where they keep the rows of a head that has them in files.
const char *folder_of_rows(void) {
  static char folder[80];
  snprintf(folder, sizeof folder, "/tmp/partialfc-fuzz-rows-%ld", (long)getpid());
  return folder;
}

static void checkpoint(struct rank *r) {
  struct draws *own = &r->own;
  char folder[64];
  name_folder(folder);
  pfc_save_options save;
  pfc_load_options load;
  DO(pfc_save_options_init, &save);
  DO(pfc_load_options_init, &load);
  int wrong = mistake(r, 3), none = mistake(r, 6), elsewhere = mistake(r, 6);
  if (wrong) save.struct_size = load.struct_size = ONE_OF(own, uint64_t, 0, 7, UINT64_MAX);
  int defaults = !wrong && chance(own, 500);
  // All ranks draw the same table; one of other classes is a mistake.
  int64_t map[1001];
  const int mapped = chance(&r->common, 200), of_others = mapped && mistake(r, 6);
  for (uint64_t i = 0; mapped && i < r->options.num_classes; i++)
    map[i] = (int64_t)below(&r->common, r->options.num_classes + 1) - 1;
  if (mapped) load.class_map = map, load.class_map_count = r->options.num_classes;
  if (of_others) map[0] = (int64_t)r->options.num_classes;
  const char *where = none ? NULL : elsewhere ? "/dev/null" : folder;
  note("checkpoint: wrong %d %d %d", wrong, none, elsewhere);
  pfc_status status;
  int32_t done = 0;
  if (chance(&r->common, 100)) must_fail("pfc_head_save_poll", DO(pfc_head_save_poll, r->head, &done, NULL));
  if (chance(&r->common, 400)) {
    status = DO(pfc_head_save_start, r->head, where, defaults ? NULL : &save);
    // The rank that is wrong about it may be another.
    while (status == PFC_OK && !done) {
      status = DO(pfc_head_save_poll, r->head, &done, NULL);
      sched_yield();
    }
  } else {
    status = DO(pfc_head_save, r->head, where, defaults ? NULL : &save);
  }
  if (wrong || none || elsewhere) must_fail("pfc_head_save", status);
  // Accumulated gradients are refused without a mistake, too.
  if (status != PFC_ERROR_INVALID_ARGUMENT) must_succeed(r, "pfc_head_save", status);
  int saved = status == PFC_OK;
  status = DO(pfc_head_load, r->head, where, defaults && !mapped ? NULL : &load);
  if (wrong || none || elsewhere || of_others) must_fail("pfc_head_load", status);
  if (saved && !of_others) must_succeed(r, "pfc_head_load", status);
}

// All ranks draw the same classes, but for a mistake.
static void other_classes(struct rank *r) {
  struct draws *own = &r->own, *all = &r->common;
  uint64_t old = r->options.num_classes, to = (uint64_t)r->ranks + below(all, 400), count = 0;
  int which = (int)below(all, 3), weighted = chance(all, 300);
  int64_t map[1001], from[4], into[4], moved[1001];
  float weights[1001];
  for (uint64_t i = 0; i < old; i++) {
    map[i] = (int64_t)below(all, to + 1) - 1;
    weights[i] = 1 + (float)below(all, 9);
  }
  // Each of the first classes into one behind them.
  uint64_t most = below(all, 5), room = old - (uint64_t)r->ranks;
  for (; count < most && count < room; count++) from[count] = (int64_t)count;
  for (uint64_t i = 0; i < count; i++) into[i] = (int64_t)(count + below(all, old - count));
  pfc_remap_options options;
  DO(pfc_remap_options_init, &options);
  if (weighted && which != 0) options.class_weights = weights, options.class_weights_count = old;
  int wrong = mistake(r, 6), beyond = mistake(r, 6), few = mistake(r, 6);
  if (wrong) options.struct_size = ONE_OF(own, uint64_t, 0, 7, UINT64_MAX);
  if (beyond) map[0] = (int64_t)to, into[0] = -1;
  note("classes: %zu to %zu, %d, wrong %d %d %d", (size_t)old, (size_t)to, which, wrong, beyond, few);
  int must = wrong;
  pfc_status status;
  if (which == 0) {
    must |= few;
    status = DO(pfc_head_resize, r->head, few ? 0 : to, &options);
  } else if (which == 1) {
    must |= beyond || few;
    status = DO(pfc_head_remap, r->head, to, map, few ? old - 1 : old, &options);
  } else {
    must |= (beyond && count > 0) || few;
    to = old - count;
    status = DO(pfc_head_merge, r->head, from, into, count, moved, few ? old - 1 : old, &options);
    for (uint64_t i = 0; status == PFC_OK && i < old; i++)
      if (moved[i] < 0 || moved[i] >= (int64_t)to) finding("pfc_head_merge wrote a class that is none");
  }
  if (must) must_fail("other classes", status);
  // Accumulated gradients are refused without a mistake, too.
  if (status != PFC_ERROR_INVALID_ARGUMENT) must_succeed(r, "other classes", status);
  if (status == PFC_OK) r->options.num_classes = to;
}

static void remove_checkpoint(void) {
  char folder[64], path[512];
  // Its files went with their heads.
  if (remove(folder_of_rows()) != 0 && errno == ENOTEMPTY) finding("rows of a head that is gone");
  name_folder(folder);
  DIR *list = opendir(folder);
  if (list == NULL) return;
  for (struct dirent *entry; (entry = readdir(list)) != NULL;) {
    snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
    remove(path);
  }
  closedir(list);
  remove(folder);
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// What all ranks draw is drawn first, so that they stay in step.
static void operation(struct rank *r) {
  struct draws *all = &r->common;
  int pick = (int)below(all, 100);
  uint64_t classes = r->options.num_classes, k = 1 + below(all, classes < 9 ? classes : 9);
  uint64_t count = chance(all, 30) ? 30000 : below(all, 60) * below(all, 3) + below(all, 5);
  uint64_t cols = 1 + below(all, 9);
  int32_t dtype = ONE_OF(all, int32_t, PFC_F32, PFC_F64, PFC_I32, PFC_I64);
  int32_t op = 1 + (int32_t)below(all, 2);
  int which = (int)below(all, 5), equal = chance(all, 300), update = chance(all, 900);
  double rate = ONE_OF(all, double, 0.1, 0, 1e-3, 0.5), weight = ONE_OF(all, double, 1, 0.5, 0);
  double factor = ONE_OF(all, double, 1, 1, 0.5, -0.25, NAN, INFINITY);
  int kept = chance(all, 300);
  struct draws sample = {draw(all)};
  if (mistake(r, 10)) return;
  if (mistake(r, 40)) DO(pfc_comm_abort, r->comm);
  if (r->mistakes > 0) {
    double other = rate_of(r);
    if (other != 0) rate = other;
  }
  if (r->head == NULL && pick < 70) pick = 70 + pick % 30;
  if (pick < 25) {
    whole_step(r, rate);
  } else if (pick < 42) {
    parts_of_a_step(r, pick >= 35, rate, weight, update, factor, kept);
  } else if (pick < 50) {
    rows(r);
  } else if (pick < 55) {
    top_k(r, k);
  } else if (pick < 60) {
    metrics(r);
  } else if (pick < 65) {
    sample_ids(r);
  } else if (pick < 68) {
    set_sample(r, &sample);
  } else if (pick < 69) {
    other_classes(r);
  } else if (pick < 70) {
    checkpoint(r);
  } else if (pick < 76) {
    hopeless(r);
  } else if (pick < 92) {
    collective(r, which, count, dtype, op);
  } else {
    reduce_rows(r, cols, equal);
  }
}

// The bits of a replicated head's class centers, which are the same on all ranks.
static uint64_t hash_of_centers(struct rank *r) {
  uint64_t hash = 0;
  struct grid g = grid_of(&r->own, r->options.num_classes, r->options.embedding_dim, 1, 0);
  if (DO(pfc_head_read_centers, r->head, 0, r->options.num_classes, &g.m) == PFC_OK)
    for (uint64_t i = 0; i < g.rows; i++)
      for (uint64_t j = 0; j < g.cols * 4; j++)
        hash = (hash ^ g.memory.data[i * g.stride * 4 + j]) * 0x100000001B3u;
  drop_grid(&g);
  return hash;
}

static void *run_rank(void *of) {
  struct rank *r = of;
  now.rank = r->index;
  pfc_head_options options = r->options;
  int wrong = mistake(r, 4) && spoil_options(&r->own, &options);
  note("create: C %zu, d %u, B %zu, placement %d, rate %g, optimizer %d, rows %d, wrong %d",
       (size_t)options.num_classes, options.embedding_dim, (size_t)options.max_batch,
       options.placement, options.sample_rate, options.optimizer, options.row_update, wrong);
  pfc_device *device = mistake(r, 30) ? NULL : r->device;
  pfc_status status = DO(pfc_head_create, device, r->comm, &options, &r->head);
  must_succeed(r, "pfc_head_create", status);
  if (wrong) must_fail("pfc_head_create", status);
  if ((r->head != NULL) != (status == PFC_OK)) finding("pfc_head_create wrote a head and failed");
  for (int i = 0; i < r->operations; i++) operation(r);
  if (r->head != NULL && r->mistakes == 0 && options.placement == PFC_PLACEMENT_REPLICATED)
    r->centers = hash_of_centers(r);
  if (r->head != NULL) DO(pfc_head_wait, r->head);
  if (r->free_comm_first) {
    DO_OTHER(pfc_comm_free, (r->comm));
    r->comm = NULL;
    if (r->head != NULL) whole_step(r, 0.1);
  }
  DO_OTHER(pfc_head_free, (r->head));
  DO_OTHER(pfc_comm_free, (r->comm));
  return NULL;
}

static struct episode of_all;
static void *run_thread(void *of) {
  now = of_all;
  return run_rank(of);
}

static void refused_handles(struct draws *d) {
  pfc_comm *comms[2] = {NULL, NULL};
  pfc_device *device = NULL;
  uint8_t id[128];
  uint32_t ranks = ONE_OF(d, uint32_t, 0, 4097, UINT32_MAX);
  must_fail("pfc_comm_threads", DO(pfc_comm_threads, ranks, comms));
  must_fail("pfc_comm_threads", DO(pfc_comm_threads, 2, NULL));
  must_fail("pfc_comm_self", DO(pfc_comm_self, NULL));
  must_fail("pfc_device_cpu", DO(pfc_device_cpu, 5000, &device));
  must_fail("pfc_device_cpu", DO(pfc_device_cpu, 1, NULL));
  must_fail("pfc_device_cuda", DO(pfc_device_cuda, 0, NULL, NULL));
  must_fail("pfc_comm_nccl", DO(pfc_comm_nccl, NULL, 0, 1, NULL, comms));
  DO(pfc_nccl_unique_id, id);
  must_fail("pfc_nccl_unique_id", DO(pfc_nccl_unique_id, NULL));
  if (comms[0] != NULL || comms[1] != NULL || device != NULL)
    finding("a handle was made and refused");
  DO_OTHER(pfc_version, ());
  DO_OTHER(pfc_build_info, ());
}

void episode_of_heads(enum mode mode, uint64_t seed) {
  static const int much[] = {0, 0, 20, 100, 300};
  static struct rank ranks[MOST_RANKS];
  struct draws d = {seed * MODES + (uint64_t)mode};
  int n = mode == SINGLE ? 1 : 2 + (int)below(&d, MOST_RANKS - 1);
  int mistakes = much[below(&d, 5)];
  int custom = mode == CUSTOM || mode == LIES || (mode == SINGLE && chance(&d, 250));
  struct episode this = {mode, seed, mistakes, -1};
  now = of_all = this;
  pfc_comm *comms[MOST_RANKS];
  pfc_device *shared = NULL, *devices[MOST_RANKS];

  if (chance(&d, 50)) refused_comms(&d);
  if (chance(&d, 20)) refused_handles(&d);
  if (custom) {
    int failing = mistakes > 0 && mode != LIES && chance(&d, 300) ? 5 : 0;
    int lying = mode == LIES ? 20 + 80 * (int)below(&d, 2) : 0;
    custom_comms(&d, n, failing, lying, comms);
  } else if (n > 1 || chance(&d, 500)) {
    DO(pfc_comm_threads, (uint32_t)n, comms);
  } else {
    DO(pfc_comm_self, comms);
  }
  pfc_head_options options = options_of(&d, n);
  if (chance(&d, 300)) DO(pfc_device_cpu, 1 + (uint32_t)below(&d, 3), &shared);
  uint64_t common = draw(&d);
  int operations = 10 + (int)below(&d, 40), free_comm_first = chance(&d, 200);
  // Where nobody makes a mistake all that is waited for comes, however busy the machine is.
  uint64_t timeout = mistakes == 0 && mode != LIES ? 300000 : 60 + below(&d, 80);
  memset(ranks, 0, sizeof ranks);
  for (int i = 0; i < n; i++) {
    struct rank *r = &ranks[i];
    r->common.state = common;
    r->own.state = draw(&d);
    r->index = i;
    r->ranks = n;
    r->mistakes = mistakes;
    r->operations = operations;
    r->free_comm_first = free_comm_first;
    r->comm = comms[i];
    r->options = options;
    if (shared == NULL) DO(pfc_device_cpu, 1 + (uint32_t)below(&d, 2), &devices[i]);
    r->device = shared != NULL ? shared : devices[i];
    DO(pfc_comm_set_timeout, r->comm, timeout);
  }
  for (int i = 0; i < n && n > 1; i++) {
    if (pthread_create(&ranks[i].thread, NULL, run_thread, &ranks[i]) != 0) abort();
  }
  if (n == 1) run_rank(&ranks[0]);
  for (int i = 0; i < n && n > 1; i++) pthread_join(ranks[i].thread, NULL);
  now.rank = -1;
  for (int i = 1; i < n && mistakes == 0 && mode != LIES; i++) {
    if (ranks[i].steps != ranks[0].steps ||
        memcmp(ranks[i].losses, ranks[0].losses, sizeof ranks[0].losses) != 0)
      finding("ranks 0 and %d have different losses", i);
    if (ranks[i].centers != ranks[0].centers) finding("ranks 0 and %d have different centers", i);
  }
  for (int i = 0; i < n && shared == NULL; i++) DO_OTHER(pfc_device_free, (devices[i]));
  DO_OTHER(pfc_device_free, (shared));
  remove_checkpoint();
}
