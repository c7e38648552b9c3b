#!/bin/sh
# The gradients of the float build against those of the double build, which test_gradients compares with finite
# differences: the same models, the same texts, to 1e-4 of each tensor's largest.
mkdir -p build
file=build/gradients-double
${CC:-cc} -std=c99 -O1 -D_POSIX_C_SOURCE=200809L -DGRADIENTS_FLOAT -I. -Itests tests/test_gradients.c \
    -o build/float_gradients -lm && build/test_gradients write $file && build/float_gradients $file
