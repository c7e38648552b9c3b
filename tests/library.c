/* The implementation for test programs that call only what is published (the others look inside and include their
 * own): an archive of this is linked with every test. */
#include <assert.h>
#define DSV3_ASSERT(x) assert(x)
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
