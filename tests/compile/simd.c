/* The implementation with the SIMD backends. */
#define DSV3_SIMD
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
