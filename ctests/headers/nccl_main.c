/* The NCCL header by itself, included twice. */
#include "partialfc_nccl.h"
#include "partialfc_nccl.h"

pfc_status two(void);

int main(void) {
  pfc_comm_ops ops;
  return pfc_nccl_ops(NULL, &ops) == PFC_OK || two() == PFC_OK;
}
