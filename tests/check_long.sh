#!/bin/sh
# The longest tests in their long form: more texts, more draws, every type, every byte.
. tests/lib.sh
for name in generate same_bits state; do
    if grep -q 'test_light()' tests/test_$name.c; then ok; else bad "test_$name has one form only"; fi
    later "long $name" env TEST_LONG=1 build/test_$name
done
done_testing "long"
