// A fault for the fuzzer to find: linked with --wrap=pfc_head_sample_ids, it writes an id too many.
#include <partialfc.h>

pfc_status __real_pfc_head_sample_ids(const pfc_head *head, int64_t *ids, uint64_t capacity,
                                      uint64_t *count);
pfc_status __wrap_pfc_head_sample_ids(const pfc_head *head, int64_t *ids, uint64_t capacity,
                                      uint64_t *count);

pfc_status __wrap_pfc_head_sample_ids(const pfc_head *head, int64_t *ids, uint64_t capacity,
                                      uint64_t *count) {
  pfc_status status = __real_pfc_head_sample_ids(head, ids, capacity, count);
  if (status == PFC_OK && ids != NULL) ids[capacity] = -1;
  return status;
}
