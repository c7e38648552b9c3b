/* The implementation for test programs, with assertions. As it stands it is for those that call only what is published;
 * compiled with the dsv3.h of tests/inside.awk, as the Makefile does, it is for those that look inside, too. */
#include <assert.h>
#define DSV3_ASSERT(x) assert(x)
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
