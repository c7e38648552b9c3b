#!/bin/sh
# How well the two demo models predict the last 5 percent of the text, which they were not trained on. Takes minutes:
# the number would move if any part of the forward pass lost accuracy that the short tests cannot see.
. tests/lib.sh
for model in "micro 1.17 1.24" "austen 1.00 1.06"; do
    set -- $model
    out=$(build/dsv3 score examples/models/"$1" examples/text/austen.txt --last 5 2>&1)
    nats=$(printf '%s\n' "$out" | sed -n 's/^nats.token  //p')
    if awk -v x="$nats" -v low="$2" -v high="$3" 'BEGIN { exit !(x != "" && x >= low && x <= high) }'; then ok; else
        bad "$1: expected $2 to $3 nats a byte, found '$out'"
    fi
    if printf '%s\n' "$out" | grep -q '^tokens      201424$'; then ok; else bad "$1: expected 201425 tokens: '$out'"; fi
done
done_testing score
