/* The NCCL header in a second translation unit of the same program. */
#include "partialfc_nccl.h"

pfc_status two(void);

pfc_status two(void) {
  pfc_comm *comm;
  ncclComm_t none = NULL;
  const pfc_status status = pfc_comm_from_nccl(&none, &comm);
  return status == PFC_OK || pfc_nccl_last_error()[0] == 0 ? PFC_OK : status;
}
