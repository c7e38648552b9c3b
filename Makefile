# make            the tool and the lessons, in build/
# make run        writes text with the demo model
# make test       every test that a C compiler, make and a minimal system can run in minutes
# make check      also the compile matrix, sanitizers, 32-bit, a run of each benchmark, and whatever else needs `make deps`
# make bench      speed, beside the limits of this machine
# make install    dsv3.h, the pkg-config file and the tool; PREFIX and DESTDIR are respected
#
# CC, CFLAGS, LDFLAGS, LDLIBS, PREFIX and DESTDIR can be set. The tool and the benchmarks have threads of their own
# (examples/thread_pool.h); tests use OpenMP when the compiler has it; OPENMP= turns it off.

CC ?= cc
CFLAGS ?= -O2
PREFIX ?= /usr/local
WARN = -Wall -Wextra -Wpedantic
OPENMP := $(shell mkdir -p build && printf '\043include <omp.h>\nint main(void){return omp_get_max_threads()<1;}\n' \
            > build/openmp.c && $(CC) -fopenmp build/openmp.c -o build/openmp 2>/dev/null && echo -fopenmp)
INCLUDE = -I. -Iexamples -Itests -Ibench
BUILD = $(CC) -std=c99 $(WARN) $(CFLAGS) $(INCLUDE)
TEST_BUILD = $(CC) -std=c99 $(WARN) $(CFLAGS) $(OPENMP) $(INSIDE) $(INCLUDE) -D_POSIX_C_SOURCE=200809L -DDSV3_SIMD
LIBS = $(LDFLAGS) -lm -lpthread $(LDLIBS)

HEADERS  = dsv3.h examples/json.h examples/safetensors.h examples/checkpoint.h examples/svg.h \
           examples/thread_pool.h examples/large_pages.h
LESSONS  = $(patsubst examples/%.c,build/%,$(wildcard examples/[0-9]*.c))
TESTS    = $(patsubst tests/%.c,build/%,$(wildcard tests/test_*.c))
BENCHES  = $(patsubst bench/%.c,build/%,$(wildcard bench/bench_*.c))
PROMPT   = It is a truth universally acknowledged, that

# On every core, unless -j says otherwise.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif

.PHONY: all run test check bench deps install uninstall clean force
all: build/dsv3 $(LESSONS)

# Changes when the compiler or its flags do: then everything is built again.
build/flags: force
	@mkdir -p build
	@printf '%s\n' '$(TEST_BUILD) $(LIBS)' | cmp -s - $@ || printf '%s\n' '$(TEST_BUILD) $(LIBS)' > $@

# The implementation, which takes longest to compile, as a program has it that defines DSV3_SIMD. DSV3_IMPLEMENTED makes
# dsv3.h leave it out of what is linked with this.
build/implementation.o: dsv3.h build/flags
	$(BUILD) -DDSV3_SIMD -DDSV3_IMPLEMENTATION -x c -c $< -o $@

build/%.o: examples/%.c $(HEADERS) build/flags
	$(BUILD) -DDSV3_IMPLEMENTED -c $< -o $@

build/dsv3 $(LESSONS): build/%: build/%.o build/implementation.o
	$(BUILD) $^ -o $@ $(LIBS)

LINKED = -DDSV3_IMPLEMENTED build/implementation.o
build/bench_kernels: private LINKED = # looks inside and has an implementation of its own
build/%: bench/%.c $(wildcard bench/*.h) $(HEADERS) build/implementation.o
	$(BUILD) -D_POSIX_C_SOURCE=200809L $< $(LINKED) -o $@ $(LIBS)

# And once more for the tests: with assertions, OpenMP, and private functions that can be called (tests/inside.awk).
# `cc -DDSV3_SIMD -I. -Iexamples tests/test_mla.c tests/library.c -lm` makes a test without all this.
build/inside/dsv3.h: tests/inside.awk dsv3.h
	@mkdir -p build/inside/body
	awk -v body=1 -f tests/inside.awk dsv3.h > build/inside/body/dsv3.h
	awk -f tests/inside.awk dsv3.h > $@

build/inside/library.o: private INSIDE = -Ibuild/inside/body
build/inside/library.o: tests/library.c build/inside/dsv3.h build/flags
	$(TEST_BUILD) -c $< -o $@

build/inside/libdsv3.a: build/inside/library.o
	$(TEST_BUILD) -DDSV3_IMPLEMENTATION -x c -c build/inside/dsv3.h -o build/inside/numbers.o
	@rm -f $@
	$(AR) rc $@ $< build/inside/numbers.o

INSIDE = -Ibuild/inside
build/test_gradients: private INSIDE = # has an implementation of its own, in double
build/%: tests/%.c tests/test.h tests/synthetic.h $(HEADERS) build/inside/libdsv3.a
	$(TEST_BUILD) $< build/inside/libdsv3.a -o $@ $(LIBS)

run: build/dsv3
	@build/dsv3 generate examples/models/austen -p '$(PROMPT)' --echo -n 600 --temp 0.6 --stats

test: build/dsv3 build/parity $(LESSONS) $(TESTS)
	@CC='$(CC)' sh tests/run.sh tests/test_*.sh $(TESTS)

check: test
	+@$(MAKE) -s $(BENCHES)
	@CC='$(CC)' sh tests/run.sh tests/check_*.sh

# Under ten minutes on two cores. bench_layer wants 13 GB of memory, and makes do with less.
bench: $(BENCHES)
	@build/bench_kernels --backend auto --threads 2 --pack 1 --rows 1,4,512 --ms 2 && echo
	@build/bench_model --shape bench-1b --sweep --repeat 1 --svg build/roofline.svg && echo
	@build/bench_model --shape bench-1b --pack 1 --threads 2 --decode 16 --repeat 2 --depths 0,2048,8192,32768 && echo
	@build/bench_layer --threads 2 --tokens 8 --repeat 2 || build/bench_layer --experts 64 --threads 2 --tokens 8; echo
	@for n in 1 2; do build/bench_scenarios --threads $$n --repeat 2 && echo || exit 1; done
	@build/bench_modes && echo
	@build/bench_mtp --threads 1 --prompts 2 --tokens 150 && echo
	@build/bench_mtp --shape bench-1b --backend auto --threads 1 --tokens 4 && echo
	@for p in micro austen; do build/bench_train --preset $$p --batch 4 --repeat 3 && echo || exit 1; done

# Debian and its relatives; what `make check` uses beyond a compiler.
deps:
	apt-get update -q
	apt-get install -y -q --no-install-recommends gcc g++ clang libc6-dev libomp-dev valgrind \
	  gcc-i686-linux-gnu libc6-dev-i386-cross qemu-user

install: build/dsv3
	mkdir -p '$(DESTDIR)$(PREFIX)/include' '$(DESTDIR)$(PREFIX)/share/pkgconfig' '$(DESTDIR)$(PREFIX)/bin'
	cp dsv3.h '$(DESTDIR)$(PREFIX)/include/dsv3.h'
	cp build/dsv3 '$(DESTDIR)$(PREFIX)/bin/dsv3'
	printf 'prefix=%s\nincludedir=$${prefix}/include\n\nName: dsv3\nDescription: DeepSeek-V3 in one C header\nVersion: %s\nCflags: -I$${includedir}\nLibs: -lm\n' \
	  '$(PREFIX)' "$$(build/dsv3 --version | cut -d' ' -f2)" > '$(DESTDIR)$(PREFIX)/share/pkgconfig/dsv3.pc'

uninstall:
	rm -f '$(DESTDIR)$(PREFIX)/include/dsv3.h' '$(DESTDIR)$(PREFIX)/bin/dsv3' '$(DESTDIR)$(PREFIX)/share/pkgconfig/dsv3.pc'

clean:
	rm -rf build
