#!/bin/sh
# How much of the header a program carries that is compiled for size, without training, and linked without what it does not
# reach: code and constants, without the C library's. An object of everything is larger, and nobody's program.
. tests/lib.sh
out=build/size
mkdir -p $out

# carries NAME LIMIT CC FLAGS...
carries() {
    name=$1 limit=$2
    shift 2
    if ! "$@" -std=c99 -Os -DDSV3_NO_OPENMP -ffunction-sections -fdata-sections -ffreestanding -I. -c tests/compile/firmware.c \
        -o $out/firmware.o || ! "$@" -nostdlib -Wl,--gc-sections,-e,main,--unresolved-symbols=ignore-all $out/firmware.o \
        -o $out/firmware 2> $out/link; then
        bad "$name is not built"
        cat $out/link >&2
        return
    fi
    size -A $out/firmware | awk -v name="$name" -v limit="$limit" '
        /^\.(text|rodata|data\.rel\.ro|data|ARM)/ { n += $2 }
        END { printf "%-40s %6d bytes of at most %d\n", name, n, limit; exit n > limit }' && ok || bad "$name is larger than $limit"
}
while read -r machine forward generation cc flags; do
    command -v $cc > /dev/null || continue
    carries "$machine, bind and forward" $forward $cc $flags
    carries "$machine, with generation and a draft" $generation $cc $flags -DGENERATE
done << 'END'
x86-64 34816 40960 gcc
Cortex-M4F 27648 36864 arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16
END
done_testing size
