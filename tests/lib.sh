# lib.sh -- counting for test scripts: check NAME COMMAND..., then done_testing. Slow and independent ones go by
# later NAME COMMAND... and run together, one for each core, when run_later is called; build/check-seconds then tells
# how long each took.
passed=0 failed=0
later_count=0 later_dir=build/later.$$ check_output=build/check-output.$$
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$1" >&2; }
# The command must succeed; its output is shown when it does not.
check() {
    check_name=$1
    shift
    if "$@" > $check_output 2>&1; then ok; else bad "$check_name"; head -n 20 $check_output >&2; fi
}
later() {
    mkdir -p $later_dir
    later_count=$((later_count + 1))
    later_file=$later_dir/$(printf '%05d' $later_count)
    printf '%s\n' "$1" > $later_file.name
    shift
    for later_word in "$@"; do
        printf "'%s' " "$(printf '%s\n' "$later_word" | sed "s/'/'\\\\''/g")"
    done > $later_file
}
run_later() {
    [ $later_count = 0 ] && return
    ls $later_dir | grep -v '\.' | xargs -P "$(nproc 2> /dev/null || echo 2)" -I{} \
        sh -c "begin=\$(date +%s); sh $later_dir/{} > $later_dir/{}.out 2>&1 < /dev/null && : > $later_dir/{}.ok
               echo \$((\$(date +%s) - begin)) > $later_dir/{}.seconds"
    for later_file in $later_dir/*.name; do
        later_file=${later_file%.name}
        printf '%s %s\n' "$(cat $later_file.seconds)" "$(cat $later_file.name)" >> build/check-seconds
        if [ -f $later_file.ok ]; then ok; else
            bad "$(cat $later_file.name)"
            tail -n 20 $later_file.out >&2
        fi
    done
    rm -rf $later_dir
    later_count=0
}
# library DIR "CC and its flags": DIR/libdsv3.a, for test programs that call only what is published.
library() {
    check "build $1/libdsv3.a" $2 -I. -c tests/library.c -o $1/library.o
    rm -f $1/libdsv3.a
    ar rc $1/libdsv3.a $1/library.o
}
# training OBJECT: its symbols that only training needs.
training() { nm $1 | grep -E 'train|_back(ward)?(_|$)|saved|parameters|learning_rate|text_count$|adamw|optimizer'; }
done_testing() {
    run_later
    rm -f $check_output
    printf '%s: %s passed, %s failed\n' "$1" "$passed" "$failed"
    [ "$failed" = 0 ]
}
