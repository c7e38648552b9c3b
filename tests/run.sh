#!/bin/sh
# run.sh PROGRAM... -- runs each test program or script, goes on after failures, and adds up their last lines
# ("name: 12 passed, 0 failed"). A program that dies without such a line counts as one failure. Ends with the
# plain line "N passed, N failed"; exit status 1 if anything failed. `make check` calls it twice: the wide checks
# (tests/check_*) begin with the sums of the tests before them, kept in build/test-sums.
set -u
OMP_WAIT_POLICY=passive # spinning threads help nobody on a shared machine
export OMP_WAIT_POLICY
mkdir -p build
passed=0 failed=0
case "${1:-}" in tests/check_*) [ -f build/test-sums ] && read -r passed failed < build/test-sums ;; esac
for t in "$@"; do
    case "$t" in *.sh) set -- sh "$t" ;; *) set -- "$t" ;; esac
    "$@" > build/test-output 2> build/test-errors < /dev/null
    status=$?
    line=$(tail -n 1 build/test-output)
    p=$(printf '%s\n' "$line" | sed -n 's/^[A-Za-z0-9_ .-]*: \([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1/p')
    f=$(printf '%s\n' "$line" | sed -n 's/^[A-Za-z0-9_ .-]*: \([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\2/p')
    if [ -z "$p" ]; then
        p=0 f=1 line="$t: ended with status $status and no count"
    elif [ "$f" = 0 ] && [ "$status" != 0 ]; then
        f=1 line="$line, but exit status $status"
    fi
    printf '%s\n' "$line"
    [ "$f" = 0 ] || head -n 40 build/test-errors
    passed=$((passed + p)) failed=$((failed + f))
done
printf '%s %s\n' "$passed" "$failed" > build/test-sums
printf '%s passed, %s failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
