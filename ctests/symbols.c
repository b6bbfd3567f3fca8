/*
 * Takes the address of every function that the header declares: it links only if all are there.
 * functions.inc is made from the header by tests/capi/programs.rs, a line FUNCTION(name) for each.
 */
#include <stdio.h>

#include "partialfc.h"

typedef void (*function)(void);

static const struct {
  const char *name;
  function address;
} functions[] = {
#define FUNCTION(name) {#name, (function)name},
#include "functions.inc"
};

int main(void) {
  const size_t count = sizeof functions / sizeof functions[0];
  size_t i;
  for (i = 0; i < count; i++) {
    if (functions[i].address == NULL) {
      printf("%s is not there\n", functions[i].name);
      return 1;
    }
  }
  printf("%d functions\n", (int)count);
  return count > 50 ? 0 : 1;
}
