#!/bin/sh
# tests/programs/raii.cpp by CMake, with the header alone and with the library, against DSV3_PREFIX (absolute), where dsv3 is
# installed; without that variable it is installed below build/ first. A failure means that a C++ project which says
# find_package(dsv3) does not build without a warning, or that owning and moving the library's objects goes wrong.
. tests/lib.sh
unset MAKEFLAGS MAKELEVEL
tmp=$(pwd)/build/cmake-program
rm -rf "$tmp"
mkdir -p "$tmp"
for tool in cmake g++; do
    command -v $tool > /dev/null && continue
    printf 'skipped: the C++ program needs %s\n' $tool
    done_testing cmake-program
    exit
done
prefix=${DSV3_PREFIX:-$tmp/a prefix}
[ -n "${DSV3_PREFIX:-}" ] || check "install" make install PREFIX="$prefix"
check "configure" cmake -S tests/programs/cmake -B "$tmp/build" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_CXX_COMPILER="${CXX:-g++}" \
    -DCMAKE_CXX_FLAGS="-Werror ${CXXFLAGS:--O1}"
for kind in dsv3 static; do
    check "build with dsv3::$kind" cmake --build "$tmp/build" --target raii_$kind
    says_ok() { "$tmp/build/raii_$kind" "$(pwd)" | grep -x 'raii: ok'; }
    check "run with dsv3::$kind" says_ok
done
rm -rf "$tmp"
done_testing cmake-program
