#!/bin/sh
# make install from a source that nothing is written to, under umask 077, with blanks in PREFIX, with other flags than the
# build's; then a program built against what is there, and nothing left by make uninstall. A failure means that a system
# administrator's or a distribution's `make install` goes wrong.
. tests/lib.sh
CC=${CC:-cc}
unset MAKEFLAGS MAKELEVEL
tmp=$(pwd)/build/install
version=$(sed -n 's/^#define DSV3_VERSION_[A-Z]* \([0-9]*\).*/\1/p' dsv3.h | paste -s -d. -)
built=$tmp/built tree=$tmp/tree
[ -d "$tmp" ] && chmod -R u+w "$tmp"
rm -rf "$tmp"
mkdir -p "$tree/examples" "$tree/bench"
cp -r Makefile LICENSE dsv3.h "$tree"
cp -r examples/*.h examples/*.c examples/packages "$tree/examples"
chmod -R a-w "$tree"
listing() { (cd "$1" && find . -exec ls -ld --time-style=full-iso {} + | sort -k 9); }
listing "$tree" > "$tmp/before"
in_tree() { make -C "$tree" BUILD="$built" "$@"; }
same_tree() {
    listing "$tree" > "$tmp/after"
    check "$1: nothing is written to the source" cmp "$tmp/before" "$tmp/after"
}

check "make -n install" make -C "$tree" -n install
check "make -n install, out of the tree" in_tree -n install
same_tree "make -n install"
if [ -e "$built" ]; then bad "make -n install writes to BUILD"; else ok; fi
check "make, out of the tree" in_tree CFLAGS=-O0 "$built/dsv3" "$built/lib/libdsv3.a" "$built/dsv3.1"
same_tree "make BUILD="
cp -p "$built/flags" "$tmp/flags"
ls -l --time-style=full-iso "$built" "$built/lib" > "$tmp/as-built"

dest="$tmp/dest dir" prefix="/opt/dsv3 and more"
prefixed="$dest$prefix"
install_private() { (umask 077 && in_tree install CC="$CC -g" CFLAGS=-O1 DESTDIR="$dest" PREFIX="$prefix"); }
check "install, blanks, umask 077, other flags" install_private
if grep -q 'built with other flags' $check_output; then ok; else bad "other flags are passed over in silence"; fi
ls -l --time-style=full-iso "$built" "$built/lib" > "$tmp/as-installed"
check "other flags: nothing is built again" cmp "$tmp/as-built" "$tmp/as-installed"
check "other flags: they are not taken down" cmp "$tmp/flags" "$built/flags"
same_tree "make install"
(cd "$prefixed" && find . -type f | LC_ALL=C sort | tr '\n' ' ') > "$tmp/files"
companions=$(cd examples && for h in *.h; do printf './include/dsv3/%s ' "$h"; done)
printf '%s' "./bin/dsv3 ./include/dsv3.h $companions./lib/cmake/dsv3/CMakeLists.txt ./lib/cmake/dsv3/dsv3-config-version.cmake" \
    " ./lib/cmake/dsv3/dsv3-config.cmake ./lib/libdsv3.a ./lib/pkgconfig/dsv3-static.pc ./share/doc/dsv3/LICENSE" \
    " ./share/man/man1/dsv3.1 ./share/pkgconfig/dsv3.pc " > "$tmp/expected"
check "what is installed" diff "$tmp/expected" "$tmp/files"
find "$dest/opt" -type d ! -perm 755 > "$tmp/modes"
find "$dest/opt" -type f ! -perm 644 ! -path '*/bin/dsv3' >> "$tmp/modes"
find "$prefixed/bin/dsv3" ! -perm 755 >> "$tmp/modes"
if [ -s "$tmp/modes" ]; then bad "modes: $(cat "$tmp/modes")"; else ok; fi
check "the header" cmp dsv3.h "$prefixed/include/dsv3.h"
check "the tool" test "$("$prefixed/bin/dsv3" --version)" = "dsv3 $version"
check "the manual page" grep -q "^\.TH DSV3 1 .*dsv3 $version" "$prefixed/share/man/man1/dsv3.1"
check "the manual page: every command" test "$(grep -c '^usage: dsv3 ' "$prefixed/share/man/man1/dsv3.1")" = 8
check "builds against it" $CC -std=c99 -I"$prefixed/include" tests/compile/main.c tests/compile/use.c -o "$tmp/installed" \
    -L"$prefixed/lib" -ldsv3 -lm
check "runs" "$tmp/installed"
if grep -rl "$tmp" "$prefixed" > "$tmp/named"; then bad "the folders of the build are named in $(cat "$tmp/named")"; else ok; fi
check "uninstall" in_tree uninstall DESTDIR="$dest" PREFIX="$prefix"
if [ -z "$(find "$dest" -type f)" ]; then ok; else bad "files left behind: $(find "$dest" -type f)"; fi
if [ -z "$(find "$dest" -name dsv3)" ]; then ok; else bad "folders left behind: $(find "$dest" -name dsv3)"; fi

# The folders of GNU's standard, as a distribution sets them; an apostrophe; a PREFIX that is not absolute.
check "install, GNU folders" in_tree install DESTDIR="$dest" PREFIX=/usr LIBDIR=/usr/lib/x86_64-linux-gnu INCLUDEDIR=/usr/include/d3 \
    BINDIR=/usr/libexec DATADIR=/usr/share/x MANDIR=/usr/man
for file in lib/x86_64-linux-gnu/libdsv3.a lib/x86_64-linux-gnu/pkgconfig/dsv3-static.pc lib/x86_64-linux-gnu/cmake/dsv3/dsv3-config.cmake \
    include/d3/dsv3.h include/d3/dsv3/json.h libexec/dsv3 share/x/pkgconfig/dsv3.pc man/man1/dsv3.1; do
    check "GNU folders: $file" test -f "$dest/usr/$file"
done
check "GNU folders: pkg-config file" grep -q '^includedir=${prefix}/include/d3$' "$dest/usr/share/x/pkgconfig/dsv3.pc"
check "install, an apostrophe" in_tree install PREFIX="$tmp/it's"
check "an apostrophe: pkg-config file" grep -q "^prefix=$tmp/it's\$" "$tmp/it's/share/pkgconfig/dsv3.pc"
check "install, relative" make install BUILD="$built" PREFIX=build/install/relative
check "relative: pkg-config file" grep -q "^prefix=$tmp/relative\$" "$tmp/relative/share/pkgconfig/dsv3.pc"
chmod -R u+w "$tmp"
rm -rf "$tmp"
done_testing install
