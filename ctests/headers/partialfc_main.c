/* The header by itself, included twice. */
#include "partialfc.h"
#include "partialfc.h"

int two(void);

int main(void) {
  pfc_head_options options;
  return pfc_head_options_init(&options) == PFC_OK ? two() : 1;
}
