/*
 * A program that its file gives more rights than its user has, as `chmod u+s` does: the user's environment must not steer the
 * library. Prints whether the system says so of the process, then what the settings did.
 *
 *   cc -std=c99 privileged.c -lpartialfc -lm -pthread && PFC_CHECK=perhaps ./a.out
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>

#include "partialfc.h"

enum { CLASSES = 20, DIM = 4, BATCH = 2 };

int main(void) {
  pfc_comm *comm = NULL;
  pfc_device *device = NULL;
  pfc_head *head = NULL;
  pfc_head_options options;
  unsigned char id[128];

  printf("privileged %lu\n", getauxval(AT_SECURE));
  printf("PFC_CHECK %s\n", pfc_comm_self(&comm) == PFC_OK ? "is ignored" : pfc_last_error());
  if (pfc_nccl_unique_id(id) != PFC_OK) {
    const int named = strstr(pfc_last_error(), "no_library_here") != NULL;
    printf("PFC_NCCL_LIB %s\n", named ? "is loaded" : "is ignored");
  }
  if (comm == NULL) return EXIT_SUCCESS;
  pfc_head_options_init(&options);
  options.num_classes = CLASSES;
  options.embedding_dim = DIM;
  options.max_batch = BATCH;
  if (pfc_device_cpu(1, &device) != PFC_OK || pfc_head_create(device, comm, &options, &head) != PFC_OK) {
    fprintf(stderr, "%s\n", pfc_last_error());
    return EXIT_FAILURE;
  }
  pfc_head_free(head);
  pfc_comm_free(comm);
  pfc_device_free(device);
  return EXIT_SUCCESS;
}
