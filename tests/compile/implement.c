/* The one file of a program that has the implementation. The header is included twice on purpose: declarations
 * first, as a program's own headers would, then the implementation. */
#include "dsv3.h"
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
