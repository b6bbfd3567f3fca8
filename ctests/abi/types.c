/*
 * Something for abidiff to read: a variable of the type of each function, and through that every
 * struct. functions.inc is made from the header by tests/capi/abi, a line FUNCTION(name) for each.
 */
#include "partialfc.h"

#define FUNCTION(name)                        \
  extern __typeof__(name) *const of_##name;   \
  __typeof__(name) *const of_##name = name;
#include "functions.inc"
