/* DSV3_FREESTANDING: neither <math.h> nor <string.h> is included; the program supplies the hooks. */
float my_expf(float), my_logf(float), my_sqrtf(float), my_sinf(float), my_cosf(float);
double my_pow(double, double), my_log(double);
#define DSV3_FREESTANDING
#define DSV3_EXPF my_expf
#define DSV3_LOGF my_logf
#define DSV3_SQRTF my_sqrtf
#define DSV3_SINF my_sinf
#define DSV3_COSF my_cosf
#define DSV3_POW my_pow
#define DSV3_LOG my_log
#define DSV3_MEMCPY __builtin_memcpy
#define DSV3_MEMSET __builtin_memset
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
