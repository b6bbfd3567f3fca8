/*
 * Prints where C has every field of every struct. A test compares that with where Rust has it, and
 * makes fields.inc: a line STRUCT(type) or FIELD(type, field) for each.
 */
#include <stddef.h>
#include <stdio.h>

#include "partialfc.h"

#define STRUCT(type) printf("%s %u\n", #type, (unsigned)sizeof(type));
#define FIELD(type, field)                                                      \
  printf("%s.%s %u %u\n", #type, #field, (unsigned)offsetof(type, field),       \
         (unsigned)sizeof(((type *)0)->field));

int main(void) {
#include "fields.inc"
  return 0;
}
