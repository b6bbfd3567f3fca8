/* The MPI header in a second translation unit of the same program. */
#include "partialfc_mpi.h"

pfc_status two(void);

pfc_status two(void) {
  pfc_comm *comm;
  uint8_t id[128];
  const pfc_status status = pfc_mpi_share_nccl_id(MPI_COMM_NULL, PFC_OK, id);
  return status == PFC_OK ? pfc_comm_mpi(MPI_COMM_NULL, &comm) : status;
}
