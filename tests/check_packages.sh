#!/bin/sh
# Each package once, by a program that uses it: pkg-config, CMake (installed, moved, as a folder), Meson, vcpkg's port, Arduino's
# way of building; the rest of what `make dist` writes is held against the fields that each format asks for. A failure
# means that a user of that package manager cannot build. Tools that are absent are named; `make deps` installs them.
. tests/lib.sh
CC=${CC:-cc}
unset MAKEFLAGS MAKELEVEL
version=$(sed -n 's/^#define DSV3_VERSION_[A-Z]* \([0-9]*\).*/\1/p' dsv3.h | paste -s -d. -)
top=$(pwd) tmp=$(pwd)/build/packages
units="tests/compile/main.c tests/compile/use.c"
warn="-Wall -Wextra -Wconversion -Werror -O0"
rm -rf "$tmp"
mkdir -p "$tmp"
# needs TOOL WHAT
needs() {
    command -v "$1" > /dev/null && return
    printf 'skipped: %s needs %s\n' "$2" "$1"
    return 1
}

prefix="$tmp/a prefix"
check "install" make install PREFIX="$prefix"
for header in "$prefix"/include/dsv3/*.h; do # each alone
    name=${header##*/}
    printf '#include <dsv3/%s>\n' "$name" > "$tmp/alone.c"
    check "$name, C99" $CC -std=c99 $warn -I"$prefix/include" -fsyntax-only "$tmp/alone.c"
    if needs g++ "$name, C++17"; then
        check "$name, C++17" g++ -std=c++17 -x c++ $warn -I"$prefix/include" -fsyntax-only "$tmp/alone.c"
    fi
done
PKG_CONFIG_PATH="$prefix/share/pkgconfig:$prefix/lib/pkgconfig"
export PKG_CONFIG_PATH
# config_build STD "CC and flags" PACKAGE SOURCES: a program with what pkg-config says.
config_build() {
    eval "$2 $warn $(pkg-config --cflags "$3") $4 -o \"$tmp/$3-$1\" $(pkg-config --libs "$3")" && "$tmp/$3-$1"
}
if needs pkg-config pkg-config; then
    for package in dsv3 dsv3-static; do
        check "pkg-config: version of $package" pkg-config --exact-version="$version" $package
    done
    if needs g++ "pkg-config, C++17"; then cxx="g++ -std=c++17 -x c++"; else cxx=; fi
    for c in "$CC -std=c99" ${cxx:+"$cxx"}; do
        std=${c##*-std=} std=${std%% *}
        check "pkg-config: header, $std" config_build "$std" "$c" dsv3 "$units tests/compile/implement.c"
        # -x none: what follows, the library, is no C++
        check "pkg-config: static, $std" config_build "$std" "$c" dsv3-static "$units -x none"
    done
    mkdir -p "$tmp/companions"
    companions() { # "CC and flags" NAME
        eval "$1 $warn $(pkg-config --cflags dsv3-static) tests/packages/companions.c -x none -o \"$tmp/companions/$2\" $(pkg-config --libs dsv3-static) -lpthread" &&
            "$tmp/companions/$2" examples/models/micro | grep -q "dsv3 $version\$"
    }
    check "companions, C99" companions "$CC -std=c99" c99
    [ -z "$cxx" ] || check "companions, C++17" companions "$cxx" c++17
fi

if needs zip "make dist"; then
    check "make dist" make dist
    cp build/dist/SHA256SUMS "$tmp/sums"
    dist_again() { (umask 077 && make dist); }
    check "make dist, again, umask 077" dist_again
    check "make dist: the same bytes" cmp "$tmp/sums" build/dist/SHA256SUMS
    dist=$top/build/dist library=$tmp/library
    mkdir "$tmp/zip" "$tmp/source"
    check "archive" tar -xzf "$dist/dsv3-$version.tar.gz" -C "$tmp"
    mv "$tmp/dsv3-$version" "$library"
    check "archive: header" cmp dsv3.h "$library/src/dsv3.h"
    check "source archive" tar -xzf "$dist/dsv3-$version-source.tar.gz" -C "$tmp/source"
    check "source archive: install" make -C "$tmp/source/dsv3-$version-source" -n install
    check "source archive: itself" test -f "$tmp/source/dsv3-$version-source/examples/packages/dist.sh"
    if needs unzip "zip archive"; then
        check "zip archive" unzip -q "$dist/dsv3-$version.zip" -d "$tmp/zip"
        check "zip archive: the same files" diff -r "$tmp/zip/dsv3-$version" "$library"
    fi
    if needs python3 "what manifests say"; then
        python=python3 # Debian's own has the modules that `make deps` installs
        $python -c 'import yaml, kconfiglib' 2> /dev/null || [ ! -x /usr/bin/python3 ] || python=/usr/bin/python3
        check "manifests" $python tests/packages/manifests.py build/dist "$version"
        grep '^skipped: ' $check_output || :
    fi
    if needs xmllint "the .pdsc file"; then check "pdsc: well-formed" xmllint --noout build/dist/dsv3.dsv3.pdsc; fi
fi

# cmake_consumer NAME OPTIONS...: builds and runs the programs named.
programs="header_c header_cxx static_c static_cxx"
cmake_consumer() {
    name=$1
    shift
    cmake -S tests/packages -B "$tmp/cmake-$name" -DUNITS="$top/tests/compile" -DVERSION="$version" -DCMAKE_C_COMPILER="$CC" "$@" \
        -DCMAKE_BUILD_TYPE=Debug && cmake --build "$tmp/cmake-$name" --target $programs || return
    for program in $programs; do "$tmp/cmake-$name/$program" || return; done
}
mv "$prefix" "$tmp/moved prefix" # it must work wherever it lies
PKG_CONFIG_PATH="$tmp/moved prefix/share/pkgconfig:$tmp/moved prefix/lib/pkgconfig"
if command -v pkg-config > /dev/null; then
    moved() { pkg-config --define-prefix --cflags --libs dsv3-static | sed 's/\\//g' | grep -F -e "-I$tmp/moved prefix/include" | grep -F -e "-L$tmp/moved prefix/lib"; }
    check "pkg-config: moved" moved
fi
if needs cmake CMake; then
    check "CMake: find_package" cmake_consumer find -DCMAKE_PREFIX_PATH="$tmp/moved prefix"
    programs="static_c static_cxx"
    check "CMake: add_subdirectory, installed" cmake_consumer installed -DHOW="$tmp/moved prefix/lib/cmake/dsv3"
    if [ -n "${library:-}" ]; then
        programs="header_c header_cxx static_c static_cxx"
        check "CMake: add_subdirectory, copied" cmake_consumer copied -DHOW="$library"
        programs=static_c
        check "ESP-IDF and Zephyr lists" cmake -DLIBRARY="$library" -P tests/packages/components.cmake
        check "vcpkg: port" cmake -DPORT="$dist/vcpkg/portfile.cmake" -DARCHIVE="$dist/dsv3-$version.tar.gz" -DWORK="$tmp/vcpkg" \
            -P tests/packages/vcpkg.cmake
        check "vcpkg: license" test -f "$tmp/vcpkg/package/share/dsv3/LICENSE"
        check "vcpkg: find_package" cmake_consumer vcpkg -DCMAKE_PREFIX_PATH="$tmp/vcpkg/package"
        PKG_CONFIG_PATH="$tmp/vcpkg/package/share/pkgconfig:$tmp/vcpkg/package/lib/pkgconfig"
        if needs pkg-config "vcpkg, pkg-config"; then
            check "vcpkg: pkg-config" config_build vcpkg "$CC -std=c99" dsv3-static "$units"
        fi
    fi
fi

meson_consumer() {
    mkdir -p "$tmp/meson/subprojects/packagecache"
    cp tests/packages/meson.build "$tmp/meson"
    for unit in main use implement; do
        cp tests/compile/$unit.c "$tmp/meson/$unit.c"
        cp tests/compile/$unit.c "$tmp/meson/$unit.cpp"
    done
    cp "$dist/meson/dsv3.wrap" "$tmp/meson/subprojects"
    cp "$dist/dsv3-$version.tar.gz" "$tmp/meson/subprojects/packagecache" # so that nothing is fetched
    (unset PKG_CONFIG_PATH && cd "$tmp/meson" && meson setup build --wrap-mode=forcefallback && meson compile -C build && meson test -C build)
}
if [ -n "${library:-}" ] && needs meson Meson; then check "Meson: subproject by its wrap" meson_consumer; fi

# Arduino compiles src/ with itself on the path, and a sketch as C++; a board is played by a few lines.
sketch() {
    cat > "$tmp/Arduino.h" <<'END'
#include <stdio.h>
static struct {
    void begin(long) {}
    void print(long n) { printf("%ld", n); }
    void print(const char *s) { printf("%s", s); }
    void println(const char *s) { printf("%s\n", s); }
    void println(float x, int digits) { printf("%.*f\n", digits, static_cast<double>(x)); }
} Serial;
END
    printf '#include "Arduino.h"\n#include "%s"\nint main() { setup(); loop(); }\n' "$library/examples/Router/Router.ino" > "$tmp/sketch.cpp"
    $CC -std=gnu11 -I"$library/src" -DDSV3_NO_TRAINING -fsyntax-only "$library/src/dsv3.c" &&
        g++ -std=gnu++11 $warn -I"$library/src" "$tmp/sketch.cpp" build/lib/libdsv3.a -o "$tmp/sketch" && "$tmp/sketch" > "$tmp/sketch.out" &&
        printf '0 with weight 0.5143\n4 with weight 0.4857\n7 with weight 0.3333\n0 with weight 0.6667\n' | diff - "$tmp/sketch.out"
}
if [ -n "${library:-}" ] && needs g++ "Arduino's way"; then check "Arduino: sketch" sketch; fi
for tool in conan pio arduino-cli vcpkg; do needs $tool "$tool itself" || :; done
rm -rf "$tmp"
done_testing packages
