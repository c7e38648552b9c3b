#!/bin/sh
# dist.sh -- what `make dist` runs, from the top of the repository, with BUILD, VERSION and URL in the environment. Writes to
# BUILD/dist:
#
#   dsv3-VERSION/  .tar.gz  .zip       the library as CMake, Meson, PlatformIO, Arduino, ESP-IDF and Zephyr want it
#   dsv3-VERSION-source.tar.gz         the repository
#   vcpkg/  conan/  meson/             ports and recipes that fetch the first of these archives
#   dsv3.dsv3.VERSION.pack  .pdsc      for CMSIS
#
# Needs GNU tar, gzip and zip. The same source gives the same bytes.
set -eu
umask 022
export LC_ALL=C TZ=UTC
here=$(pwd)/examples/packages
name=dsv3-$VERSION
case $BUILD in /*) ;; *) BUILD=$(pwd)/$BUILD ;; esac
dist=$BUILD/dist
DESCRIPTION="DeepSeek-V3 in one C header" DOWNLOAD=$URL/releases/download/v$VERSION ARCHIVE=$name.tar.gz
AUTHORS=$(sed -n 's/^Copyright (c) [0-9]* //p' LICENSE)
export VERSION URL DESCRIPTION DOWNLOAD ARCHIVE AUTHORS

# filled FROM TO: a folder of templates.
filled() {
    (cd "$1" && find . -type f) | while read -r file; do
        mkdir -p "$2/$(dirname "$file")"
        sh "$here/fill.sh" "$1/$file" > "$2/$file"
    done
}
# sealed FOLDER: modes and times that depend on nothing.
sealed() {
    find "$1" -type d -exec chmod 755 {} +
    find "$1" -type f -exec chmod 644 {} +
    find "$1" -exec touch -h -t 200001010000 {} +
}
tarred() { (cd "$dist" && tar --format=ustar --sort=name --owner=0 --group=0 --numeric-owner -cf - "$1" | gzip -9n > "$1.tar.gz"); }
zipped() { (cd "$1" && rm -f "$3" && find "$2" -type f | sort | zip -X -D -q -@ "$3"); }

rm -rf "$dist"
mkdir -p "$dist/$name/src/dsv3" "$dist/$name/cmake"
filled "$here/library" "$dist/$name"
cp LICENSE "$dist/$name"
cp dsv3.h "$here/dsv3.c" "$dist/$name/src"
cp examples/*.h "$dist/$name/src/dsv3"
cp "$here"/*.in "$here/installed.cmake" "$dist/$name/cmake"
sealed "$dist/$name"
tarred "$name"
zipped "$dist" "$name" "$dist/$name.zip"

mkdir "$dist/$name-source"
cp -R dsv3.h examples tests bench Makefile LICENSE README.md .clang-format "$dist/$name-source"
find "$dist/$name-source" \( -name '*.o' -o -name __pycache__ \) -prune -exec rm -rf {} +
sealed "$dist/$name-source"
find "$dist/$name-source" -name '*.sh' -exec chmod 755 {} +
tarred "$name-source"
rm -rf "$dist/$name-source"

SHA256=$(sha256sum "$dist/$ARCHIVE" | cut -d ' ' -f 1) SHA512=$(sha512sum "$dist/$ARCHIVE" | cut -d ' ' -f 1)
export SHA256 SHA512
for manager in vcpkg conan meson; do filled "$here/$manager" "$dist/$manager"; done
filled "$here/cmsis" "$dist"
mkdir "$dist/pack"
cp -R "$dist/$name/src" LICENSE "$dist/dsv3.dsv3.pdsc" "$dist/pack"
sealed "$dist/pack"
zipped "$dist/pack" . "$dist/dsv3.dsv3.$VERSION.pack"
rm -rf "$dist/pack"
(cd "$dist" && sha256sum -- *.tar.gz *.zip *.pack > SHA256SUMS && ls)
