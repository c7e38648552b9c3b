/* A second unit: only declarations, linked with implement.c and use.c. */
#include "dsv3.h"
dsv3_result use_everything(void);
int main(void) { return use_everything() == DSV3_OK ? 0 : 1; }
