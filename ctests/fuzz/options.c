// Options of heads, right and wrong ones.
#include "fuzz.h"

pfc_head_options options_of(struct draws *d, int n) {
  pfc_head_options o;
  DO(pfc_head_options_init, &o);
  do o.num_classes = ONE_OF(d, uint64_t, 1, 2, 3, 5, 10, 64, 255, 257, 300, 1000);
  while (o.num_classes < (uint64_t)n);
  o.embedding_dim = ONE_OF(d, uint32_t, 1, 2, 3, 7, 16, 33, 64, 130);
  o.max_batch = ONE_OF(d, uint64_t, 0, 1, 2, 5, 16, 17, 40);
  o.placement = chance(d, 300) ? PFC_PLACEMENT_REPLICATED : PFC_PLACEMENT_SHARDED;
  o.sample_rate = ONE_OF(d, double, 1, 1, 0, 0.1, 0.5, 0.999);
  o.seed = draw(d);
  o.scale = ONE_OF(d, double, 64, 64, 1e-3, 30);
  if (chance(d, 300)) {
    o.m1 = unit(d) * 4 + 1e-3;
    o.m2 = unit(d) * 3.14;
    o.m3 = unit(d) * 2;
  }
  if (chance(d, 200)) o.interclass_filter = unit(d);
  o.margin_gradient = 1 + (int32_t)below(d, 2);
  o.margin_guard = 1 + (int32_t)below(d, 2);
  o.optimizer = 1 + (int32_t)below(d, 2);
  o.row_update = 1 + (int32_t)below(d, 2);
  if (chance(d, 200)) {
    o.momentum = unit(d) * 0.999;
    o.weight_decay = unit(d);
    o.beta1 = unit(d) * 0.999;
    o.beta2 = unit(d) * 0.999;
  }
  o.gradient_scale = ONE_OF(d, double, 1, 4, 1e-3);
  o.init_std = ONE_OF(d, double, 0.01, 0, 1, 1e-20);
  o.ignore_label = chance(d, 300) ? ONE_OF(d, int64_t, -1, -100, INT64_MAX) : INT64_MIN;
  // Not drawn, so that the episodes of earlier seeds keep their draws.
  o.precision = o.seed % 4 == 0 ? PFC_PRECISION_HALF : PFC_PRECISION_AUTO;
  o.gather_dtype = (int32_t)below(d, 4);
  o.weight_dtype = chance(d, 300) ? PFC_BF16 : PFC_F32;
  o.state_dtype = chance(d, 300) ? PFC_BF16 : PFC_F32;
  o.sample_block = chance(d, 300) ? 1u << below(d, 11) : 1;
  if (chance(d, 200)) {
    o.residency = ONE_OF(d, int32_t, PFC_RESIDENCY_HOST, PFC_RESIDENCY_FILE, PFC_RESIDENCY_FILE);
    if (o.residency == PFC_RESIDENCY_FILE) {
      o.storage_path = folder_of_rows();
      o.storage_cache = ONE_OF(d, uint64_t, 0, 100, 4000, UINT64_MAX);
    }
  }
  o.row_terms = chance(d, 400) ? PFC_ROW_TERMS_ON : PFC_ROW_TERMS_OFF;
  return o;
}

int spoil_options(struct draws *d, pfc_head_options *o) {
  switch (below(d, 29)) {
    case 0: o->num_classes = ONE_OF(d, uint64_t, 0, UINT64_MAX, 1ull << 63); return 1;
    case 1: o->embedding_dim = ONE_OF(d, uint32_t, 0, UINT32_MAX, 65537); return 1;
    case 2: o->placement = ONE_OF(d, int32_t, 0, 3, -1, INT32_MIN); return 1;
    case 3: o->sample_rate = ONE_OF(d, double, -1, 1.0000001, NAN, INFINITY); return 1;
    case 4: o->max_batch = ONE_OF(d, uint64_t, UINT64_MAX, 1ull << 25, 1ull << 33); return 1;
    case 5: o->scale = ONE_OF(d, double, 0, -1, 129, NAN, INFINITY); return 1;
    case 6: o->m1 = ONE_OF(d, double, 0, -1, 17, NAN); return 1;
    case 7: o->m2 = ONE_OF(d, double, -0.1, 3.2, NAN); return 1;
    case 8: o->m3 = ONE_OF(d, double, -0.1, 2.1, NAN); return 1;
    case 9: o->interclass_filter = ONE_OF(d, double, -0.1, 1.1, NAN); return 1;
    case 10: o->margin_gradient = 3; return 1;
    case 11: o->margin_guard = 0; return 1;
    case 12: o->optimizer = 77; return 1;
    case 13: o->row_update = -5; return 1;
    case 14:
      o->optimizer = PFC_OPTIMIZER_SGD;
      o->momentum = ONE_OF(d, double, -0.1, 1, NAN);
      return 1;
    case 15: o->weight_decay = ONE_OF(d, double, -0.1, NAN, INFINITY); return 1;
    case 16:
      o->optimizer = PFC_OPTIMIZER_ADAMW;
      o->epsilon = ONE_OF(d, double, 0, -1, NAN, 1e31);
      return 1;
    case 17: o->gradient_scale = ONE_OF(d, double, -1, NAN, INFINITY); return 1;
    case 18: o->init_std = ONE_OF(d, double, -1, NAN, INFINITY); return 1;
    case 19: o->ignore_label = 0; return 1;
    case 20: o->precision = ONE_OF(d, int32_t, 0, 4, 5); return 1;
    case 21: o->gather_dtype = ONE_OF(d, int32_t, 4, 5, -1); return 1;
    case 22: o->weight_dtype = ONE_OF(d, int32_t, 0, 2, 4, 9); return 1;
    case 23:
      // None of them goes with an empty path.
      o->residency = ONE_OF(d, int32_t, 0, 1, 2, 3, 9);
      o->storage_path = "";
      return 1;
    case 24: o->struct_size = ONE_OF(d, uint64_t, 0, 7, 1 << 17, UINT64_MAX); return 1;
    case 25: o->row_terms = ONE_OF(d, int32_t, 0, 3, -1); return 1;
    case 26: o->sample_block = ONE_OF(d, uint32_t, 0, 3, 2048, UINT32_MAX); return 1;
    case 27:
      // A residency that is drawn with it may have one.
      o->storage_cache = ONE_OF(d, uint64_t, 1, 4096, UINT64_MAX);
      return o->residency != PFC_RESIDENCY_FILE;
    // It may be enough.
    default: o->workspace_limit = 1 + below(d, 1 << 22); return 0;
  }
}
