#!/bin/sh
# Are the bits of results the same as with an older dsv3.h? Compiles tests/bits.c with both, runs both side by side
# and compares their lines.
#
#     sh tests/bits.sh [OLD] [--new FILE] [--backend NAME] [--only KIND] [--quick] [--all] [--limit N]
#
# OLD        a git revision, or a path of a header; without it, the revision below
# --new      another header than ./dsv3.h
# --backend  one backend
# --only     one kind of cases: plain ops blocks forward long evaluate train
# --quick    one small model, fewer rows
# --all      lines of the backend "reference" count, too. Without it they are compared and reported only
# --limit    so many lines that differ are shown (20); of "reference" only with --all
#
# CC and CFLAGS can be set (-DBITS_CORE: without the cases that use more of the structs than they must). What the
# old header gives is kept in build/bits and used again until the header, tests/bits.c, the compiler or the options
# change. Exit status: 0 equal, 1 something differs, 2 nothing could be compared.
revision=509508f # the last one before the inner loops changed
old=$revision new=dsv3.h all=0 limit=20 options=
CC=${CC:-gcc}
CFLAGS=${CFLAGS:--O2}
dir=build/bits

fail() {
    printf 'bits.sh: %s\n' "$1" >&2
    exit 2
}

case ${1:---} in
--*) ;;
*)
    old=$1
    shift
    ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
    --all) all=1 ;;
    --quick) options="$options $1" ;;
    --new | --limit | --backend | --only)
        [ $# -gt 1 ] || fail "$1 needs a value"
        case $1 in
        --new) new=$2 ;;
        --limit) limit=$2 ;;
        *) options="$options $1 $2" ;;
        esac
        shift
        ;;
    *) fail "what is '$1'? See the beginning of tests/bits.sh" ;;
    esac
    shift
done

# build DIR: DIR/bits from DIR/dsv3.h and tests/bits.c
build() {
    $CC -std=c99 $CFLAGS -DDSV3_SIMD -I"$1" tests/bits.c -o "$1/bits" -lm -lpthread
}
# key DIR: of all that DIR/bits is made from
key() {
    { cat "$1/dsv3.h" tests/bits.c && $CC --version && echo "$CFLAGS"; } | cksum | tr -cd 0-9
}
built() { [ -x "$1/bits" ] && [ "$(cat "$1/key" 2> /dev/null)" = "$(key "$1")" ]; }
# run DIR: DIR/$lines. A program that was built before is used again
run() {
    built "$1" || {
        rm -f "$1/key" "$1"/lines*
        build "$1" || return 1
        key "$1" > "$1/key"
    }
    "$1/bits" $options > "$1/part" && mv "$1/part" "$1/$lines"
}

mkdir -p $dir/old $dir/new || fail "cannot make $dir"
cp "$new" $dir/new/dsv3.h || fail "there is no $new"
if [ -f "$old" ]; then cp "$old" $dir/old.h; else
    git show "$old:dsv3.h" > $dir/old.h 2> /dev/null || fail "'$old' is neither a file nor a revision with dsv3.h"
fi
cmp -s $dir/old.h $dir/old/dsv3.h || cp $dir/old.h $dir/old/dsv3.h

lines=lines$(printf '%s' "$options" | tr -c 'a-z0-9_' -)
old_job=
if ! built $dir/old || [ ! -f "$dir/old/$lines" ]; then
    run $dir/old & # both at once: there are two cores as a rule
    old_job=$!
fi
run $dir/new || fail "the new one failed"
[ -z "$old_job" ] || wait "$old_job" || fail "the old one failed"

# A line: what was computed, then hashes of 16 digits. Lines that differ in pack and threads alone must agree, too.
awk -v all=$all -v limit="$limit" -v old_name="$old" '
function is_hash(word) { return word ~ /=[0-9a-f]+$/ && length(word) - index(word, "=") == 16 }
function read_line(   i) {
    what = $1; found = ""; backend = ""
    for (i = 2; i <= NF; i++) {
        if (is_hash($i)) found = found " " $i
        else what = what " " $i
        if (index($i, "backend=") == 1) backend = substr($i, 9)
    }
    if (count[FILENAME " " what]++ > 0) what = what " again=" count[FILENAME " " what]
    if (!(backend in seen)) { seen[backend] = 1; order[n_backends++] = backend }
}
function differs(backend, what, a, b) {
    differ[backend]++
    kind = what; sub(/ .*/, "", kind)
    by_kind[backend " " kind]++
    if (!(backend " " kind in kinds)) { kinds[backend " " kind] = 1; list[backend] = list[backend] " " kind }
    if (backend == "reference" && !all) return
    if (shown++ < limit) print what "\n    old:" a "\n    new:" b
}
{ read_line() }
FILENAME ~ /old\/lines[^\/]*$/ { old[what] = found; old_backend[what] = backend; next }
{
    n_new++
    if (!(what in old)) differs(backend, what, " no such line", found)
    else if (old[what] != found) differs(backend, what, old[what], found)
    else equal[backend]++
    delete old[what]
    same = what
    gsub(/ (pack|threads)=[0-9]+/, "", same)
    if (!(same in first)) { first[same] = found; first_what[same] = what }
    else if (first[same] != found) {
        broken++
        if (broken <= limit) print "these two should agree:\n    " first_what[same] "\n    " what
    }
}
END {
    for (what in old) differs(old_backend[what], what, old[what], " no such line")
    if (shown > limit) print "... and " shown - limit " more"
    for (i = 0; i < n_backends; i++) {
        b = order[i]
        text = ""
        n = split(list[b], part, " ")
        for (j = 1; j <= n; j++) text = text (j == 1 ? " (" : ", ") part[j] " " by_kind[b " " part[j]]
        print b ": " equal[b] + 0 " lines equal, " differ[b] + 0 " differ" text (n > 0 ? ")" : "")
        if (differ[b] > 0 && (all || b != "reference")) bad = 1
    }
    if (broken > 0) { print broken " lines depend on packing or threads"; bad = 1 }
    if (n_new == 0) { print "there are no lines"; exit 2 }
    print (bad ? "DIFFERENT from " : "same as ") old_name
    exit bad
}' "$dir/old/$lines" "$dir/new/$lines"
