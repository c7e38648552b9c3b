# lib.sh -- counting for test scripts: check NAME COMMAND..., then done_testing.
passed=0 failed=0
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$1" >&2; }
# The command must succeed; its output is shown when it does not.
check() {
    check_name=$1
    shift
    if "$@" > build/check-output 2>&1; then ok; else bad "$check_name"; head -n 20 build/check-output >&2; fi
}
done_testing() {
    printf '%s: %s passed, %s failed\n' "$1" "$passed" "$failed"
    [ "$failed" = 0 ]
}
