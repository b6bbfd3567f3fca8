// Steps of a head, in one call or in several.
#include "heads.h"

static struct block labels_of(struct rank *r, uint64_t batch) {
  struct block b = block_of(batch * 8, 0);
  int64_t *labels = (int64_t *)b.data, classes = (int64_t)r->options.num_classes;
  for (uint64_t i = 0; i < batch; i++) {
    labels[i] = (int64_t)below(&r->own, (uint64_t)classes);
    if (r->options.ignore_label != INT64_MIN && chance(&r->own, 200))
      labels[i] = r->options.ignore_label;
  }
  if (batch > 0 && mistake(r, 2))
    labels[below(&r->own, batch)] =
        ONE_OF(&r->own, int64_t, -7, classes, INT64_MAX - 1, INT64_MIN + 1);
  return b;
}

static void keep_loss(struct rank *r, double loss) {
  if (now.mode != LIES && !(isfinite(loss) && loss >= 0)) finding("a loss of %g", loss);
  if (r->steps < LOSSES) r->losses[r->steps] = loss;
  r->steps++;
}

// What a step works on.
struct batch {
  struct grid embeddings, gradient;
  struct block labels, loss;
  int wrong_embeddings, wrong_gradient;
};

static struct batch batch_of(struct rank *r) {
  struct draws *own = &r->own;
  struct batch b;
  // A head without max_batch takes what comes.
  const uint64_t most = r->options.max_batch == 0 ? 40 : r->options.max_batch;
  uint64_t rows = chance(own, 100) ? 0 : below(own, most + 1);
  if (r->options.max_batch != 0 && mistake(r, 6)) rows = most + 1 + below(own, 3);
  int wild = r->mistakes > 0 && chance(own, 100) ? 60 : 0;
  b.embeddings = grid_of(own, rows, r->options.embedding_dim, 0, wild);
  b.gradient = grid_of(own, rows, r->options.embedding_dim, 0, 0);
  b.labels = labels_of(r, rows);
  b.loss = block_of(8, 0x5B);
  keep(&b.loss);
  b.wrong_embeddings = mistake(r, 2) && spoil(own, &b.embeddings, 1);
  b.wrong_gradient = mistake(r, 2) && spoil(own, &b.gradient, 1);
  return b;
}
static void drop_batch(struct batch *b) {
  drop_grid(&b->embeddings);
  drop_grid(&b->gradient);
  drop(&b->labels);
  drop(&b->loss);
}
static double loss_in(const struct batch *b) {
  double loss;
  memcpy(&loss, b->loss.data, 8);
  return loss;
}
double rate_of(struct rank *r) {
  if (mistake(r, 4)) return ONE_OF(&r->own, double, -1, NAN, INFINITY, 1e300);
  return r->mistakes > 0 && chance(&r->own, 50) ? 1e30 : 0;
}

void whole_step(struct rank *r, double rate) {
  struct batch b = batch_of(r);
  struct grid *e = &b.embeddings, *g = &b.gradient;
  int no_labels = mistake(r, 6), no_loss = mistake(r, 8);
  // The gradient may be written over the embeddings.
  int over = chance(&r->own, 80) && e->size == g->size && e->m.dtype == g->m.dtype &&
             e->stride == g->stride && !b.wrong_embeddings && !b.wrong_gradient;
  note("step: %zu rows, rate %g, wrong %d %d %d %d, over %d", (size_t)e->rows, rate,
       b.wrong_embeddings, b.wrong_gradient, no_labels, no_loss, over);
  pfc_status status = DO(pfc_head_step, r->head, &e->m, no_labels ? NULL : (int64_t *)b.labels.data,
                         rate, over ? &e->m : &g->m, no_loss ? NULL : (double *)b.loss.data);
  must_succeed(r, "pfc_head_step", status);
  must_be_kept("pfc_head_step", status, &b.loss);
  must_be_kept("pfc_head_step", status, over ? &e->memory : &g->memory);
  if (b.wrong_embeddings || b.wrong_gradient || no_loss) must_fail("pfc_head_step", status);
  if (!over && !is_kept(&e->memory)) finding("pfc_head_step wrote its embeddings");
  if (!gaps_are_kept(over ? e : g)) finding("pfc_head_step wrote between the rows");
  if (status == PFC_OK) {
    keep_loss(r, loss_in(&b));
    // In 16 bits a gradient may overflow.
    if (r->mistakes == 0 && now.mode != LIES && g->m.dtype == PFC_F32 && !is_finite(over ? e : g))
      finding("pfc_head_step wrote a gradient that is not finite");
  }
  drop_batch(&b);
}

// A forward, with margins and weights of the rows' own or not; *wrong: it has to fail.
static pfc_status forward(struct rank *r, struct batch *b, const int64_t *labels, double *loss,
                          int *wrong) {
  struct draws *own = &r->own;
  struct grid *e = &b->embeddings;
  if (chance(own, 500)) return DO(pfc_head_forward, r->head, &e->m, labels, loss);
  struct block terms[3];
  const float *given[3] = {NULL, NULL, NULL};
  const int on = r->options.row_terms == PFC_ROW_TERMS_ON, unasked = !on && mistake(r, 4);
  for (int t = 0; t < 3; t++) {
    terms[t] = block_of(e->rows * 4, 0);
    float *values = (float *)terms[t].data;
    for (uint64_t i = 0; i < e->rows; i++) values[i] = (float)(unit(own) * (t == 0 ? 3 : 2));
    // It may be of an ignored row.
    if (e->rows > 0 && mistake(r, 4))
      values[below(own, e->rows)] = ONE_OF(own, float, -1, 4, NAN, INFINITY, -0.0f);
    keep(&terms[t]);
    if (unasked || (on && chance(own, 600))) given[t] = values;
  }
  pfc_forward_options o;
  DO(pfc_forward_options_init, &o);
  o.m2 = given[0];
  o.m3 = given[1];
  o.weight = given[2];
  const int odd = mistake(r, 4);
  if (odd) o.reserved = 1;
  // A block without bytes may have no address.
  *wrong |= odd || (unasked && (o.m2 != NULL || o.m3 != NULL || o.weight != NULL));
  pfc_status status = DO(pfc_head_forward_with, r->head, &e->m, labels,
                         odd && chance(own, 500) ? NULL : &o, loss);
  for (int t = 0; t < 3; t++) {
    if (!is_kept(&terms[t])) finding("pfc_head_forward_with wrote its options' arrays");
    drop(&terms[t]);
  }
  return status;
}

// A backward, with gradients of the margins or not.
static pfc_status backward(struct rank *r, struct batch *b, double weight, double scale) {
  struct draws *own = &r->own;
  struct grid *g = &b->gradient;
  if (chance(own, 500)) return DO(pfc_head_backward, r->head, weight, scale, &g->m);
  struct block margins[2];
  for (int t = 0; t < 2; t++) {
    margins[t] = block_of(b->embeddings.rows * 4, 0x5B);
    keep(&margins[t]);
  }
  const int on = r->options.row_terms == PFC_ROW_TERMS_ON, unasked = !on && mistake(r, 4);
  pfc_backward_options o;
  DO(pfc_backward_options_init, &o);
  o.loss_weight = weight;
  o.loss_scale = scale;
  if (unasked || (on && chance(own, 600))) o.grad_m2 = (float *)margins[0].data;
  if (unasked || (on && chance(own, 600))) o.grad_m3 = (float *)margins[1].data;
  const int odd = mistake(r, 4);
  if (odd) o.reserved = 1;
  pfc_status status = DO(pfc_head_backward_with, r->head, odd && chance(own, 500) ? NULL : &o,
                         &g->m);
  if (odd || (unasked && o.grad_m2 != NULL)) must_fail("pfc_head_backward_with", status);
  for (int t = 0; t < 2; t++) {
    const int asked = (t == 0 ? o.grad_m2 : o.grad_m3) != NULL;
    if ((!on || !asked || odd) && !is_kept(&margins[t]))
      finding("pfc_head_backward_with wrote an array that was not given or is wrong");
    drop(&margins[t]);
  }
  // A wrong array of this kind leaves the other outputs right.
  if (unasked) keep(&g->memory);
  return status;
}

void parts_of_a_step(struct rank *r, int prepare, double rate, double weight, int update,
                     double factor, int kept) {
  struct batch b = batch_of(r);
  struct grid *e = &b.embeddings, *g = &b.gradient;
  const int64_t *labels = (int64_t *)b.labels.data;
  int no_loss = mistake(r, 8), no_labels = mistake(r, 8);
  note("parts: prepare %d, %zu rows, wrong %d %d %d", prepare, (size_t)e->rows, b.wrong_embeddings,
       b.wrong_gradient, no_loss);
  if (prepare) {
    must_succeed(r, "pfc_head_prepare", DO(pfc_head_prepare, r->head, labels, e->rows));
    no_labels = 1;
  }
  int wrong_terms = 0;
  pfc_status status = forward(r, &b, no_labels ? NULL : labels,
                              no_loss ? NULL : (double *)b.loss.data, &wrong_terms);
  must_succeed(r, "pfc_head_forward", status);
  must_be_kept("pfc_head_forward", status, &b.loss);
  if (b.wrong_embeddings || no_loss || wrong_terms) must_fail("pfc_head_forward", status);
  if (!is_kept(&e->memory)) finding("pfc_head_forward wrote its embeddings");
  if (status == PFC_OK) keep_loss(r, loss_in(&b));
  if (!mistake(r, 8)) {
    double scale = ONE_OF(&r->own, double, 1, 128, 0.5);
    if (mistake(r, 4)) weight = ONE_OF(&r->own, double, NAN, -1, INFINITY, 1e39);
    status = backward(r, &b, weight, scale);
    must_succeed(r, "pfc_head_backward", status);
    must_be_kept("pfc_head_backward", status, &g->memory);
    if (b.wrong_gradient) must_fail("pfc_head_backward", status);
    if (!gaps_are_kept(g)) finding("pfc_head_backward wrote between the rows");
    if (kept) must_succeed(r, "pfc_head_accumulate", DO(pfc_head_accumulate, r->head));
    if (update && factor == 1)
      must_succeed(r, "pfc_head_update", DO(pfc_head_update, r->head, rate));
    if (update && factor != 1) {
      float other = ONE_OF(&r->own, float, 1, 1, 2);
      pfc_update_options o;
      DO(pfc_update_options_init, &o);
      o.learning_rate = rate;
      o.factor = factor / other;
      o.device_factor = chance(&r->own, 500) || other != 1 ? &other : NULL;
      int wrong = mistake(r, 4);
      if (wrong) o.reserved = 1;
      status = DO(pfc_head_update_with, r->head, wrong && chance(&r->own, 500) ? NULL : &o);
      must_succeed(r, "pfc_head_update_with", status);
      if (wrong) must_fail("pfc_head_update_with", status);
    }
    if (mistake(r, 4)) DO(pfc_head_update, r->head, rate);
  }
  drop_batch(&b);
}
