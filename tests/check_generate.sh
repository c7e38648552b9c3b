#!/bin/sh
# Greedy texts of the larger demo model (tests/test_generate.c has the small one) with 1 to 15 drafts, by one thread
# and by two, alone and all together, by the best backend here: they must be those of plain decoding, byte for byte.
# Takes minutes.
. tests/lib.sh
for model in austen; do
    out=$(TEST_BACKEND=auto build/test_generate full examples/models/$model 2>&1)
    status=$?
    count=$(printf '%s\n' "$out" | sed -n 's/^generate: \([0-9][0-9]*\) passed, 0 failed$/\1/p')
    if [ "$status" = 0 ] && [ -n "$count" ]; then passed=$((passed + count)); else bad "$model: $out"; fi
done
done_testing "greedy texts"
