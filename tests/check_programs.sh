#!/bin/sh
# Programs as a user of the library writes them (tests/programs), against an installed header: each is built as pkg-config says,
# C as C99 and as C++17, C++ as C++17, without a warning, is run on the repository's demo models, checks itself, and must say
# "NAME: ok". A failure means that what the documentation promises does not hold, or cannot be written down without a warning.
. tests/lib.sh
CC=${CC:-cc}
unset MAKEFLAGS MAKELEVEL
top=$(pwd) tmp=$(pwd)/build/programs
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -O1"
rm -rf "$tmp"
mkdir -p "$tmp"
# needs TOOL WHAT
needs() {
    command -v "$1" > /dev/null && return
    printf 'skipped: %s needs %s\n' "$2" "$1"
    return 1
}
# says_ok PROGRAM NAME: a command for sh. The last line says ok, and a program that fails has told why.
says_ok() { printf 'said=$("%s" "%s"); status=$?; echo "$said"; [ $status = 0 ] && [ "$(echo "$said" | tail -n 1)" = "%s: ok" ]' "$1" "$top" "$2"; }
# program FILE STD "CC and flags": built and run, later. The linker is told of threads, which is the program's own business.
program() {
    name=${1##*/} name=${name%.*}
    later "${1##*/}, $2" sh -c "$3 $warn $cflags '$1' -o '$tmp/$name-$2' $libs -lpthread && $(says_ok "$tmp/$name-$2" "$name")"
}

prefix="$tmp/a prefix"
check "install" make install PREFIX="$prefix"
PKG_CONFIG_PATH="$prefix/share/pkgconfig:$prefix/lib/pkgconfig"
export PKG_CONFIG_PATH
if needs pkg-config "what is built as pkg-config says"; then
    check "pkg-config: dsv3" pkg-config --exists dsv3
    cflags=$(pkg-config --cflags dsv3) libs=$(pkg-config --libs dsv3) # with blanks quoted: for a shell
    needs g++ "C++17" && cxx=yes || cxx=
    for file in tests/programs/*.c; do
        program "$file" c99 "$CC -std=c99"
        [ -z "$cxx" ] || program "$file" c++17 "g++ -x c++ -std=c++17"
    done
    for file in tests/programs/*.cpp; do
        [ -f "$file" ] && [ -n "$cxx" ] && program "$file" c++17 "g++ -std=c++17"
    done
    run_later
fi

rm -rf "$tmp"
done_testing programs
