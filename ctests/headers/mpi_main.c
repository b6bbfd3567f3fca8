/* The MPI header by itself, included twice. */
#include "partialfc_mpi.h"
#include "partialfc_mpi.h"

pfc_status two(void);

int main(void) {
  pfc_comm_ops ops;
  return pfc_mpi_ops(MPI_COMM_NULL, &ops) == PFC_OK || two() == PFC_OK;
}
