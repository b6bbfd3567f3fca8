/*
 * Ranks whose headers do not fit together: made with different PFC_MPI_STAGE, they learn of it and
 * are not killed.
 *
 *   mpicc -std=c99 stages.c -lpartialfc -o a.out
 *   mpicc -std=c99 -DPFC_MPI_STAGE=65536 stages.c -lpartialfc -o b.out
 *   mpirun -n 1 ./a.out : -n 1 ./b.out
 */
#include "partialfc_mpi.h"

int main(int argc, char **argv) {
  int level, rank, size;
  pfc_comm *comm = NULL;
  pfc_status status;
  if (MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) return 2;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  status = pfc_comm_mpi(MPI_COMM_WORLD, &comm);
  printf("rank %d of %d: %s: %s\n", rank, size, pfc_status_name(status), pfc_mpi_last_error());
  fflush(stdout);
  if (status == PFC_OK && (status = pfc_comm_barrier(comm)) != PFC_OK) {
    printf("rank %d: %s: %s\n", rank, pfc_status_name(status), pfc_last_error());
    fflush(stdout);
  }
  pfc_comm_free(comm);
  MPI_Finalize();
  return 0;
}
