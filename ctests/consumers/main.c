/* A program outside this repository: it knows the library only as installed. */
#include <stdio.h>

#include <partialfc.h>

int main(void) {
  pfc_device *device = NULL;
  if (pfc_version() != PFC_VERSION || pfc_device_cpu(1, &device) != PFC_OK) {
    fprintf(stderr, "%s\n", pfc_last_error());
    return 1;
  }
  printf("%s\n%s\n", pfc_build_info(), pfc_device_info(device));
  pfc_device_free(device);
  return 0;
}
