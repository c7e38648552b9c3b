/* Static mode: the declarations by one #include, the implementation by another. */
#define DSV3_STATIC
#include "dsv3.h"
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
const char *twice_unit(void);
const char *twice_unit(void) { return dsv3_result_string(DSV3_OK); }
