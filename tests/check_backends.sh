#!/bin/sh
# The SIMD backends that run here but are not the best one.
exec sh tests/test_backends.sh others
