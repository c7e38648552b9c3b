/* Static mode: everything private to this file; linked beside implement.c without a clash or a warning. */
#define DSV3_STATIC
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
const char *static_unit(void);
const char *static_unit(void) { return dsv3_result_string(DSV3_OK); }
