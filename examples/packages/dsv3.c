/* dsv3.c -- dsv3.h as a library: compiled once, with its SIMD backends; programs then only include "dsv3.h". */
#ifndef DSV3_SIMD
#define DSV3_SIMD
#endif
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
