/* The header in a second translation unit of the same program. */
#include "partialfc.h"

int two(void);

int two(void) {
  pfc_plan_report report;
  return pfc_plan_report_init(&report) == PFC_OK && pfc_version() == PFC_VERSION ? 0 : 1;
}
