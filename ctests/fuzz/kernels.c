// Episodes of calls without a head: kernels over the caller's memory, and the plan.
#include "fuzz.h"

#include <stdint.h>

static void must_fail(const char *call, pfc_status status) {
  if (status == PFC_OK) finding("%s accepted what is wrong", call);
}
static void must_be_kept(const char *call, pfc_status status, const struct block *output) {
  if (status != PFC_OK && !is_kept(output))
    finding("%s gave %s and wrote an output", call, pfc_status_name(status));
}
// What a matrix may hold after a call that writes it: nothing new in its gaps, nothing new at all
// after a failure.
static void judge_written(const char *call, pfc_status status, const struct grid *g) {
  must_be_kept(call, status, &g->memory);
  if (!gaps_are_kept(g)) finding("%s wrote between the rows", call);
}

// A shape, and the chance of elements that are not ordinary.
struct shape {
  uint64_t batch, dim, classes;
  int wild;
};

static struct block numbers(struct draws *d, uint64_t count, double from, double to) {
  struct block b = block_of(count * 4, 0);
  for (uint64_t i = 0; i < count; i++) ((float *)b.data)[i] = (float)(from + unit(d) * (to - from));
  keep(&b);
  return b;
}
// The column of each row's class, or -1. `wrong` is set if one is neither.
static struct block targets_of(struct draws *d, const struct shape *s, int *wrong) {
  struct block b = block_of(s->batch * 8, 0);
  for (uint64_t i = 0; i < s->batch; i++) {
    int64_t target = (int64_t)below(d, s->classes + 1) - 1;
    if (chance(d, 5)) {
      target = ONE_OF(d, int64_t, -2, (int64_t)s->classes, INT64_MAX, INT64_MIN);
      *wrong = 1;
    }
    ((int64_t *)b.data)[i] = target;
  }
  return b;
}

static pfc_margin margin_of(struct draws *d, int *wrong) {
  pfc_margin m;
  DO(pfc_margin_init, &m);
  m.scale = ONE_OF(d, double, 64, 1e-3, 128, 30);
  m.m1 = unit(d) * 15 + 0.01;
  m.m2 = unit(d) * 3.14;
  m.m3 = unit(d) * 2;
  m.interclass_filter = chance(d, 300) ? unit(d) : 0;
  m.margin_guard = 1 + (int32_t)below(d, 2);
  m.margin_gradient = 1 + (int32_t)below(d, 2);
  *wrong = chance(d, 60);
  if (!*wrong) return m;
  switch (below(d, 5)) {
    case 0: m.scale = NAN; break;
    case 1: m.m1 = -1; break;
    case 2: m.m2 = 9; break;
    case 3: m.margin_guard = 9; break;
    default: m.struct_size = 3;
  }
  return m;
}

static void normalize(struct draws *d, pfc_device *device, const struct shape *s) {
  struct grid in = grid_of(d, s->batch, s->dim, 0, s->wild);
  struct grid out = grid_of(d, s->batch, s->dim, 0, 0);
  struct block norms = numbers(d, s->batch, 0, 1);
  // Two wrong rows may agree.
  int wrong = chance(d, 100) && spoil(d, &in, 0), over = !wrong && chance(d, 200);
  if (in.m.rows != s->batch) wrong = 1;
  pfc_status status = DO(pfc_normalize_rows, device, &in.m, over ? &in.m : &out.m,
                         chance(d, 300) ? NULL : (float *)norms.data);
  if (wrong) must_fail("pfc_normalize_rows", status);
  judge_written("pfc_normalize_rows", status, over ? &in : &out);
  must_be_kept("pfc_normalize_rows", status, &norms);
  if (status == PFC_OK && s->wild == 0 && !is_finite(over ? &in : &out))
    finding("pfc_normalize_rows wrote what is not finite");
  drop_grid(&in);
  drop_grid(&out);
  drop(&norms);
}

static void cosines(struct draws *d, pfc_device *device, const struct shape *s) {
  struct grid e = grid_of(d, s->batch, s->dim, 0, s->wild);
  struct grid w = grid_of(d, s->classes, s->dim, 0, s->wild);
  struct grid out = grid_of(d, s->batch, s->classes, 1, 0);
  uint64_t need = 0;
  DO(pfc_normalize_gemm_workspace, device, s->batch, s->dim, s->classes, &need);
  int wrong = chance(d, 60) && spoil(d, &e, 0), small = need > 0 && chance(d, 60);
  struct block workspace = block_of(small ? need - 1 : need, 0x77);
  pfc_status status =
      DO(pfc_normalize_gemm, device, &e.m, &w.m, &out.m, workspace.data, workspace.bytes);
  if (wrong || small) must_fail("pfc_normalize_gemm", status);
  judge_written("pfc_normalize_gemm", status, &out);
  if (status == PFC_OK && s->wild == 0 && !is_finite(&out)) finding("a cosine is not finite");
  drop_grid(&e);
  drop_grid(&w);
  drop_grid(&out);
  drop(&workspace);
}

static void workspaces(struct draws *d, pfc_device *device, const struct shape *s) {
  uint64_t huge = ONE_OF(d, uint64_t, UINT64_MAX, 1ull << 32, 1ull << 63, 65537, 1ull << 40);
  uint64_t bytes = 5, batch = s->batch, dim = s->dim, classes = s->classes;
  *ONE_OF(d, uint64_t *, &batch, &dim, &classes) = huge;
  DO(pfc_normalize_gemm_workspace, device, batch, dim, classes, &bytes);
  DO(pfc_fused_workspace, device, batch, dim, classes, &bytes);
  must_fail("pfc_fused_workspace", DO(pfc_fused_workspace, device, batch, dim, classes, NULL));
}

static void margins(struct draws *d, pfc_device *device, const struct shape *s) {
  int wrong;
  pfc_margin m = margin_of(d, &wrong);
  struct block in = numbers(d, s->batch, -1.01, 1.01), out = numbers(d, s->batch, 0, 1);
  uint64_t count = s->batch;
  if (chance(d, 50)) count = ONE_OF(d, uint64_t, UINT64_MAX, 1ull << 61, 1ull << 63);
  const float *cosine = s->batch > 0 && chance(d, 50) ? NULL : (float *)in.data;
  wrong |= count != s->batch || cosine == NULL;
  pfc_status status =
      chance(d, 500)
          ? DO(pfc_margin_forward, device, &m, cosine, count, (float *)out.data)
          : DO(pfc_margin_backward, device, &m, cosine, cosine, count, (float *)out.data);
  if (wrong) must_fail("a margin", status);
  must_be_kept("a margin", status, &out);
  drop(&in);
  drop(&out);
}

static void softmax(struct draws *d, pfc_device *device, const struct shape *s) {
  int wrong, wrong_target = 0;
  pfc_margin m = margin_of(d, &wrong);
  struct grid c = grid_of(d, s->batch, s->classes, 1, s->wild);
  struct block targets = targets_of(d, s, &wrong_target), sums = numbers(d, s->batch, 0, 1);
  if (wrong_target) wrong = 1;
  struct block offsets = numbers(d, s->batch, 0, 1);
  pfc_status status =
      chance(d, 300)
          ? DO(pfc_partial_softmax_offsets, device, &m, &c.m, (int64_t *)targets.data,
               (float *)sums.data, (float *)offsets.data)
          : DO(pfc_partial_softmax, device, &m, &c.m, (int64_t *)targets.data, (float *)sums.data);
  must_be_kept("pfc_partial_softmax", status, &offsets);
  drop(&offsets);
  if (wrong) must_fail("pfc_partial_softmax", status);
  judge_written("pfc_partial_softmax", status, &c);
  must_be_kept("pfc_partial_softmax", status, &sums);
  drop_grid(&c);
  drop(&targets);
  drop(&sums);
}

static void fused(struct draws *d, pfc_device *device, const struct shape *s) {
  int wrong, wrong_target = 0;
  uint64_t need = 0;
  pfc_margin m = margin_of(d, &wrong);
  struct grid e = grid_of(d, s->batch, s->dim, 0, s->wild);
  struct grid w = grid_of(d, s->classes, s->dim, 0, s->wild);
  struct grid p = grid_of(d, s->batch, s->dim, 1, 0);
  struct grid ge = grid_of(d, s->batch, s->dim, 0, 0), gw = grid_of(d, s->classes, s->dim, 0, 0);
  struct block targets = targets_of(d, s, &wrong_target), sums = numbers(d, s->batch, 0, 1);
  struct block logits = numbers(d, s->batch, 0, 1);
  DO(pfc_fused_workspace, device, s->batch, s->dim, s->classes, &need);
  int small = s->batch > 0 && need > 0 && chance(d, 40);
  int wrong_grid = chance(d, 60) && spoil(d, &p, 1);
  struct block workspace = block_of(small ? need - 1 : need, 0x77);
  struct block offsets = numbers(d, s->batch, 0, 1);
  const int has_offsets = chance(d, 300);
  pfc_status status =
      has_offsets
          ? DO(pfc_fused_forward_offsets, device, &m, &e.m, &w.m, (int64_t *)targets.data,
               (float *)sums.data, (float *)offsets.data, (float *)logits.data, &p.m,
               workspace.data, workspace.bytes)
          : DO(pfc_fused_forward, device, &m, &e.m, &w.m, (int64_t *)targets.data,
               (float *)sums.data, (float *)logits.data, &p.m, workspace.data, workspace.bytes);
  must_be_kept("pfc_fused_forward", status, &offsets);
  if (wrong || wrong_target || small || wrong_grid) must_fail("pfc_fused_forward", status);
  judge_written("pfc_fused_forward", status, &p);
  must_be_kept("pfc_fused_forward", status, &sums);
  must_be_kept("pfc_fused_forward", status, &logits);
  if (status == PFC_OK || chance(d, 200)) {
    double weight = chance(d, 30) ? NAN : 0.1;
    int wrong_gradient = chance(d, 60) && spoil(d, chance(d, 500) ? &ge : &gw, 1);
    status =
        has_offsets
            ? DO(pfc_fused_backward_offsets, device, &m, &e.m, &w.m, (int64_t *)targets.data,
                 (float *)sums.data, (float *)offsets.data, (float *)logits.data,
                 (float *)offsets.data, &p.m, weight, &ge.m, &gw.m, workspace.data, workspace.bytes)
            : DO(pfc_fused_backward, device, &m, &e.m, &w.m, (int64_t *)targets.data,
                 (float *)sums.data, (float *)logits.data, &p.m, weight, &ge.m, &gw.m,
                 workspace.data, workspace.bytes);
    if (wrong || wrong_target || small || wrong_gradient || isnan(weight))
      must_fail("pfc_fused_backward", status);
    judge_written("pfc_fused_backward", status, &ge);
    judge_written("pfc_fused_backward", status, &gw);
  }
  drop_grid(&e);
  drop_grid(&w);
  drop_grid(&p);
  drop_grid(&ge);
  drop_grid(&gw);
  drop(&targets);
  drop(&sums);
  drop(&logits);
  drop(&offsets);
  drop(&workspace);
}

static void sample(struct draws *d, pfc_device *device) {
  uint64_t rows = ONE_OF(d, uint64_t, 0, 1, 10, 1000, 70000, 200000), count = 0x55;
  uint64_t first = chance(d, 100) ? ONE_OF(d, uint64_t, UINT64_MAX, 1ull << 63, INT64_MAX - 5ull)
                                  : below(d, 1000000);
  uint64_t positives = below(d, rows < 30 ? rows + 1 : 30);
  uint64_t size = below(d, (rows < 2000 ? rows : 2000) + 1);
  uint64_t capacity = positives > size ? positives : size, told = rows;
  struct block given = block_of(positives * 8, 0), ids = block_of(capacity * 8, 3);
  for (uint64_t i = 0; i < positives; i++)
    ((uint64_t *)given.data)[i] = first + i * (rows / positives);
  int wrong = positives > 0 && chance(d, 50);
  if (wrong) ((int64_t *)given.data)[below(d, positives)] = -3;
  if (chance(d, 20)) told = ONE_OF(d, uint64_t, UINT64_MAX, (1ull << 40) + 1), wrong = 1;
  if (chance(d, 30)) size = rows + 1, wrong |= told == rows;
  keep(&ids);
  pfc_status status =
      DO(pfc_sample_classes, device, draw(d), chance(d, 100) ? UINT64_MAX : below(d, 1000), first,
         told, (int64_t *)given.data, positives, size, (int64_t *)ids.data, &count);
  if (wrong) must_fail("pfc_sample_classes", status);
  must_be_kept("pfc_sample_classes", status, &ids);
  if (status == PFC_OK ? count != capacity : count != 0x55) finding("%zu ids", (size_t)count);
  for (uint64_t i = 1; status == PFC_OK && i < count; i++)
    if (((int64_t *)ids.data)[i] <= ((int64_t *)ids.data)[i - 1])
      finding("the ids are not ascending");
  drop(&given);
  drop(&ids);
}

static void update(struct draws *d, pfc_device *device, const struct shape *s) {
  uint64_t rows = 1 + below(d, 20), count = below(d, rows + 1);
  struct grid w = grid_of(d, rows, s->dim, 1, s->wild), m = grid_of(d, rows, s->dim, 1, 0);
  struct grid v = grid_of(d, rows, s->dim, 1, 0), g = grid_of(d, count, s->dim, 0, s->wild);
  struct block ids = block_of(count * 8, 0);
  int wrong = 0;
  for (uint64_t i = 0; i < count; i++) ((int64_t *)ids.data)[i] = (int64_t)(rows - 1 - i);
  if (count > 1 && chance(d, 60)) {
    ((int64_t *)ids.data)[0] = ONE_OF(d, int64_t, -1, (int64_t)rows, (int64_t)rows - 2, INT64_MAX);
    wrong = 1;
  }
  pfc_optimizer o;
  DO(pfc_optimizer_init, &o);
  o.kind = 1 + (int32_t)below(d, 2);
  if (chance(d, 30)) o.kind = 9, wrong = 1;
  if (chance(d, 30)) o.momentum = NAN, wrong |= o.kind == PFC_OPTIMIZER_SGD;
  if (chance(d, 60)) wrong |= spoil(d, ONE_OF(d, struct grid *, &w, &m, &g), 0);
  // The ids are as many as the gradients have rows.
  if (g.m.rows != count) g.m.rows = count, g.m.data = g.memory.data, wrong = 1, g.m.reserved = 1;
  double rate = 0.1;
  if (chance(d, 40)) rate = ONE_OF(d, double, -1, NAN, INFINITY), wrong = 1;
  uint64_t number = 1 + below(d, 100);
  if (chance(d, 40)) number = ONE_OF(d, uint64_t, 0, UINT64_MAX, 1ull << 40), wrong |= number == 0;
  int none = o.kind == PFC_OPTIMIZER_SGD && chance(d, 700);
  note("update: %zu of %zu rows, wrong %d, rate %g, number %zu", (size_t)count, (size_t)rows, wrong,
       rate, (size_t)number);
  pfc_status status = DO(pfc_update_rows, device, &o, &w.m, &m.m, none ? NULL : &v.m,
                         (int64_t *)ids.data, &g.m, rate, number);
  // Without rows there is nothing to refuse.
  if (wrong && count > 0) must_fail("pfc_update_rows", status);
  judge_written("pfc_update_rows", status, &w);
  judge_written("pfc_update_rows", status, &m);
  judge_written("pfc_update_rows", status, &v);
  if (!is_kept(&g.memory)) finding("pfc_update_rows wrote its gradients");
  drop_grid(&w);
  drop_grid(&m);
  drop_grid(&v);
  drop_grid(&g);
  drop(&ids);
}

/* What a plan wrote over `was`. */
static void judge_plan(pfc_status status, const pfc_plan_report *report,
                       const pfc_plan_report *was) {
  if (status != PFC_OK && memcmp(report, was, sizeof *report) != 0)
    finding("a plan wrote and failed");
  if (status == PFC_OK && report->struct_size >= sizeof *report &&
      (report->total_bytes < report->weight_bytes || report->total_bytes < report->state_bytes ||
       report->traffic_bytes < report->embeddings_bytes))
    finding("a sum of a plan overflows");
}

static void plan(struct draws *d) {
  pfc_head_options o = options_of(d, 1 + (int)below(d, MOST_RANKS));
  pfc_plan_report report, was;
  DO(pfc_plan_report_init, &report);
  if (chance(d, 400)) spoil_options(d, &o);
  if (chance(d, 200)) {
    o.num_classes = 1ull << below(d, 40);
    o.embedding_dim = 1u << below(d, 17);
    o.max_batch = 1ull << below(d, 25);
  }
  uint32_t ranks = 1 + (uint32_t)below(d, 9);
  if (chance(d, 300)) ranks = ONE_OF(d, uint32_t, 0, UINT32_MAX, 1u << 20, 65534);
  uint64_t batch = chance(d, 100) ? UINT64_MAX : below(d, (o.max_batch == 0 ? 4096 : o.max_batch) + 1);
  if (chance(d, 50)) report.struct_size = ONE_OF(d, uint64_t, 0, 8, 40, UINT64_MAX);
  was = report;
  judge_plan(DO(pfc_plan, &o, ranks, batch, &report), &report, &was);
  must_fail("pfc_plan", DO(pfc_plan, &o, ranks, batch, NULL));
  uint64_t gpu = chance(d, 200) ? ONE_OF(d, uint64_t, 0, 1, UINT64_MAX) : 1ull << below(d, 40);
  was = report;
  judge_plan(DO(pfc_plan_cuda, &o, ranks, batch, gpu, &report), &report, &was);
  must_fail("pfc_plan_cuda", DO(pfc_plan_cuda, &o, ranks, batch, gpu, NULL));
}

static void on_line(void *user, int32_t level, const char *text) {
  (void)user;
  if (level < PFC_LOG_ERROR || level > PFC_LOG_DEBUG || text == NULL) abort();
}

void episode_of_kernels(uint64_t seed) {
  struct draws d = {seed * MODES + KERNELS};
  struct episode this = {KERNELS, seed, 0, -1};
  pfc_device *device = NULL;
  now = this;
  DO(pfc_set_log, on_line, NULL, (int32_t)below(&d, 5));
  if (DO(pfc_device_cpu, 1 + (uint32_t)below(&d, 3), &device) != PFC_OK) finding("no device");
  for (int i = 0; i < 20; i++) {
    struct shape s = {below(&d, 20), ONE_OF(&d, uint64_t, 1, 2, 5, 16, 17, 33, 100),
                      ONE_OF(&d, uint64_t, 0, 1, 2, 5, 100, 256, 257, 600), 0};
    if (chance(&d, 40)) s.dim = 0;
    if (chance(&d, 200)) s.wild = 50;
    note("B %zu, d %zu, S %zu, wild %d", (size_t)s.batch, (size_t)s.dim, (size_t)s.classes, s.wild);
    switch (below(&d, 9)) {
      case 0: normalize(&d, device, &s); break;
      case 1: cosines(&d, device, &s); break;
      case 2: workspaces(&d, device, &s); break;
      case 3: margins(&d, device, &s); break;
      case 4: softmax(&d, device, &s); break;
      case 5: fused(&d, device, &s); break;
      case 6: sample(&d, device); break;
      case 7: update(&d, device, &s); break;
      default: plan(&d);
    }
  }
  DO(pfc_set_log, NULL, NULL, PFC_LOG_OFF);
  DO_OTHER(pfc_device_free, (device));
}
