#!/bin/sh
# run.sh PROGRAM... -- runs test programs and scripts, one on each core (or JOBS at a time), goes on after failures,
# and adds up their last lines ("name: 12 passed, 0 failed"), which it prints in the order of its arguments. A program
# that dies without such a line counts as one failure. Ends with the plain line "N passed, N failed"; exit status 1 if
# anything failed. `make check` calls it twice: the wide checks (tests/check_*), which keep all cores busy by
# themselves and run one after the other, begin with the sums of the tests before them, kept in build/test-sums.
set -u
OMP_WAIT_POLICY=passive # spinning threads help nobody on a shared machine
export OMP_WAIT_POLICY
dir=build/test-runs
rm -rf $dir
mkdir -p $dir
passed=0 failed=0 jobs=${JOBS:-$(nproc 2> /dev/null || echo 2)}
case "${1:-}" in tests/check_*)
    jobs=1
    [ -f build/test-sums ] && read -r passed failed < build/test-sums
    ;;
esac
report() {
    for t in "$@"; do
        out=$dir/$(basename "$t")
        while [ ! -f $out.status ] && [ ! -f $dir/end ]; do
            sleep 0.1
            kill -0 $$ 2> /dev/null || exit # interrupted
        done
        status=$(cat $out.status 2> /dev/null)
        line=$(tail -n 1 $out.out)
        p=$(printf '%s\n' "$line" | sed -n 's/^[A-Za-z0-9_ .-]*: \([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1/p')
        f=$(printf '%s\n' "$line" | sed -n 's/^[A-Za-z0-9_ .-]*: \([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\2/p')
        if [ -z "$p" ]; then
            p=0 f=1 line="$t: ended with status $status and no count"
        elif [ "$f" = 0 ] && [ "$status" != 0 ]; then
            f=1 line="$line, but exit status $status"
        fi
        printf '%s\n' "$line"
        [ "$f" = 0 ] || head -n 40 $out.err
        passed=$((passed + p)) failed=$((failed + f))
    done
    printf '%s %s\n' "$passed" "$failed" > build/test-sums
    printf '%s passed, %s failed\n' "$passed" "$failed"
    [ "$failed" = 0 ]
}
report "$@" &
printf '%s\n' "$@" | xargs -P "$jobs" -I{} sh -c '
    out=$1/$(basename "$2")
    case "$2" in *.sh) set -- "$2" sh "$2" ;; *) set -- "$2" "$2" ;; esac
    shift
    "$@" > $out.out 2> $out.err < /dev/null
    echo $? > $out.part && mv $out.part $out.status' run $dir {}
: > $dir/end
wait $!
