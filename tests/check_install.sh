#!/bin/sh
# make install into an empty folder, then a program built against what is there, and nothing left by make uninstall.
. tests/lib.sh
dest=$(pwd)/build/install
rm -rf "$dest"
check "install" make install DESTDIR="$dest" PREFIX=/opt/dsv3
check "header" test -f "$dest/opt/dsv3/include/dsv3.h"
check "pkg-config file" grep -q '^Cflags: -I' "$dest/opt/dsv3/share/pkgconfig/dsv3.pc"
if command -v pkg-config > /dev/null; then
    check "pkg-config reads it" env PKG_CONFIG_PATH="$dest/opt/dsv3/share/pkgconfig" pkg-config --exact-version=0.1.0 dsv3
fi
check "builds against it" gcc -std=c99 -I"$dest/opt/dsv3/include" tests/compile/main.c tests/compile/use.c \
    tests/compile/implement.c -o build/installed -lm
check "runs" build/installed
check "uninstall" make uninstall DESTDIR="$dest" PREFIX=/opt/dsv3
if [ -z "$(find "$dest" -type f)" ]; then ok; else bad "files left behind"; fi
rm -rf "$dest"
done_testing install
