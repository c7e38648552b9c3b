#!/bin/sh
# Each lesson prints what its first comment promises, and stays within a lesson's length.
. tests/lib.sh
for source in examples/[0-9]*.c; do
    name=$(basename "$source" .c)
    sed -n '/^ \* Expected output:/,/^ \*\//p' "$source" | sed -e '1d;$d' -e 's/^ \*     //' > build/expected
    build/$name > build/printed 2>&1
    if [ $? = 0 ] && [ -s build/expected ] && diff build/expected build/printed >&2; then ok; else bad "$name"; fi
    lines=$(wc -l < "$source")
    if [ "$lines" -le 160 ]; then ok; else bad "$name has $lines lines"; fi
done
done_testing lessons
