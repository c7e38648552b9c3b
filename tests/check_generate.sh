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
# The first draft is accepted three times of four or more: ten texts behind prompts from the last 5 percent of the
# novel, which the model was not trained on.
text=examples/text/austen.txt
held=$(($(wc -c < $text) / 20))
for i in 0 1 2 3 4 5 6 7 8 9; do
    prompt=$(tail -c $((held - held / 10 * i)) $text | head -c 128)
    build/dsv3 generate examples/models/austen -p "$prompt" -n 300 --temp 0 --mtp 1 --stats 2>&1 > /dev/null |
        sed -n 's/^drafts .* accepted \([0-9.]*\) %.*/\1/p'
done > build/accepted
if awk '{ sum += $1 } END { printf "%.2f %% of %d\n", sum / NR, NR; exit !(NR == 10 && sum / NR >= 75) }' build/accepted \
    > $check_output; then ok; else bad "first drafts accepted: $(cat $check_output)"; fi
done_testing "greedy texts"
