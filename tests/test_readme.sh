#!/bin/sh
# Every C block of the READMEs compiles without a warning and, if it is a program, runs from the top of the
# repository; every command of a shell block that names make or build/ works as far as `make -n` and --help can tell.
. tests/lib.sh
CC=${CC:-cc}
out=build/readme
rm -rf $out
mkdir -p $out
for readme in README.md examples/README.md bench/README.md; do
    [ -f $readme ] || { bad "$readme is missing"; continue; }
    awk -v out="$out/$(echo $readme | tr / -)" '/^```c$/ { n++; on = 1; next } /^```/ { on = 0 }
        on { print > (out "-" n ".c") }' $readme
    awk '/^```sh$/ { on = 1; next } /^```/ { on = 0 } on' $readme >> $out/commands
done
for block in $out/*.c; do
    [ -f "$block" ] || continue
    if grep -q '^int main' "$block"; then
        check "$block" $CC -std=c99 -Wall -Wextra -Wpedantic -Werror -O2 -I. "$block" -o "${block%.c}" -lm
        check "$block runs" "${block%.c}"
    else
        check "$block" $CC -std=c99 -Wall -Wextra -Wpedantic -Werror -I. -c "$block" -o $out/program
    fi
done
[ -f "$out/README.md-1.c" ] || bad "README.md has no program"
check "README.md's program, without -std" $CC -I. -fsyntax-only $out/README.md-1.c
words=$($out/README.md-1 | tr -cs 'A-Za-z' '\n' | grep -c '[a-z][a-z][a-z]')
if [ "$words" -ge 20 ]; then ok; else bad "README.md's program writes $words words, expected 20 or more"; fi
sed -e 's/#.*//' -e 's/ *&& */\n/g' $out/commands | sed 's/^ *//' > $out/lines
while read -r first second rest; do
    case $first in
    make) check "make $second" make -n ${second:+"$second"} ;;
    build/dsv3) check "$first $second" $first "$second" --help ;;
    build/*) check "$first" make -n "$first" ;;
    esac
done < $out/lines
done_testing readme
