#!/bin/sh
# Windows, by mingw: headers behind <windows.h> and the tool compile without a warning; under wine the tool generates with
# every backend, makes the folders that it is to write to, and replaces what is in them.
. tests/lib.sh
out=build/windows
rm -rf $out
mkdir -p $out
cc="x86_64-w64-mingw32-gcc -std=c99 -O2 -Wall -Wextra -Werror -I. -Iexamples"
if ! command -v x86_64-w64-mingw32-gcc > /dev/null; then
    bad "x86_64-w64-mingw32-gcc is needed (make deps)"
    done_testing windows
    exit
fi
for name in dsv3 json safetensors checkpoint svg thread_pool large_pages; do
    upper=$(echo ${name%_pool} | tr a-z A-Z | sed 's/^THREAD$/THREADS/')
    printf '#include <windows.h>\n#define DSV3_SIMD\n#define DSV3_IMPLEMENTATION\n#define %s_IMPLEMENTATION\n#include "%s.h"\n' $upper \
        $name > $out/$name.c
    later "$name.h behind windows.h" $cc -fsyntax-only $out/$name.c
done
later "the tool" $cc examples/dsv3.c -o $out/dsv3.exe -lm
run_later
wine=$(command -v wine64 || command -v wine || echo /usr/lib/wine/wine64)
if [ ! -x "$wine" ]; then
    bad "wine64 is needed (make deps)"
    done_testing windows
    exit
fi
WINEPREFIX=$(pwd)/$out/wine WINEDEBUG=-all
export WINEPREFIX WINEDEBUG
"$wine" $out/dsv3.exe --version > $out/said 2>&1 # makes that folder, and says so
dsv3() { "$wine" $out/dsv3.exe "$@" | tr -d '\r'; }
check "--version" test "$(dsv3 --version 2> /dev/null)" = "$(build/dsv3 --version)"
for backend in reference avx2 avx512 avx512_bf16; do
    build/dsv3 generate examples/models/micro -n 40 --backend $backend > $out/expected 2> $out/said || continue # not here
    dsv3 generate examples/models/micro -n 40 --backend $backend > $out/found 2> $out/said
    check "generate, $backend" cmp $out/expected $out/found
done
converts() { dsv3 convert examples/models/micro $out/new --type "$1" && test -s $out/new/config.json && ! ls $out/new | grep tmp; }
check "convert makes OUT" converts F16
check "convert replaces what is there" converts BF16
for type in F16 BF16; do check "convert here, $type" build/dsv3 convert examples/models/micro $out/here --type $type; done
check "convert: the same bytes" cmp $out/new/model.safetensors $out/here/model.safetensors
train() { dsv3 train --preset micro --text examples/text/austen.txt --out $out/run --steps 1; }
check "train makes OUT" train
check "train: a second one does not replace it" sh -c '! "$@"' - "$wine" $out/dsv3.exe train --preset micro --text \
    examples/text/austen.txt --out $out/run --steps 1
check "train --resume" sh -c '"$@" && test -s build/windows/run/train.safetensors' - "$wine" $out/dsv3.exe train --resume --out $out/run \
    --steps 2
for server in wineserver /usr/lib/wine/wineserver64 /usr/lib/wine/wineserver; do # which writes to the folder until it ends
    if command -v $server > /dev/null; then $server -w; break; fi
done
rm -rf $out
done_testing windows
