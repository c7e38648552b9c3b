# make            the tool and the lessons, in build/
# make run        writes text with the demo model
# make test       every test that a C compiler, make and a minimal system can run in minutes
# make check      also the compile matrix, sanitizers, 32-bit, a run of each benchmark, and whatever else needs `make deps`
# make bench      speed, beside the limits of this machine
# make install    headers, library, tool, manual page, pkg-config and CMake files; make uninstall takes them away
# make dist       release archives and packages for other build systems, in build/dist/
#
# CC, CFLAGS, LDFLAGS and LDLIBS can be set, and BUILD, the folder that is written to (tests want it to be build). The tool
# and the benchmarks have threads of their own (examples/thread_pool.h); tests use OpenMP when the compiler has it; OPENMP=
# turns it off.

CC ?= cc
CFLAGS ?= -O2
BUILD = build
WARN = -Wall -Wextra -Wpedantic
OPENMP := $(shell printf '\043include <omp.h>\nint main(void){return omp_get_max_threads()<1;}\n' | \
            $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
INCLUDE = -I. -Iexamples -Itests -Ibench
COMPILE = $(CC) -std=c99 $(WARN) $(CFLAGS) $(INCLUDE)
TEST_COMPILE = $(CC) -std=c99 $(WARN) $(CFLAGS) $(OPENMP) $(INSIDE) $(INCLUDE) -D_POSIX_C_SOURCE=200809L -DDSV3_SIMD
LIBS = $(LDFLAGS) -lm -lpthread $(LDLIBS)

HEADERS  = dsv3.h examples/json.h examples/safetensors.h examples/checkpoint.h examples/svg.h \
           examples/thread_pool.h examples/large_pages.h
LESSONS  = $(patsubst examples/%.c,$(BUILD)/%,$(wildcard examples/[0-9]*.c))
TESTS    = $(patsubst tests/%.c,build/%,$(wildcard tests/test_*.c))
BENCHES  = $(patsubst bench/%.c,$(BUILD)/%,$(wildcard bench/bench_*.c))
PROMPT   = It is a truth universally acknowledged, that

# Packages: where `make install` puts what, and what `make dist` says of where releases will be found.
PREFIX ?= /usr/local
INCLUDEDIR = $(PREFIX)/include
LIBDIR = $(PREFIX)/lib
BINDIR = $(PREFIX)/bin
DATADIR = $(PREFIX)/share
MANDIR = $(DATADIR)/man
URL = https://example.org/dsv3
VERSION = $(shell sed -n 's/^.define DSV3_VERSION_[A-Z]* \([0-9]*\).*/\1/p' dsv3.h | paste -s -d. -)
INSTALLED = $(BUILD)/dsv3 $(BUILD)/lib/libdsv3.a $(BUILD)/dsv3.1

# On every core, unless -j says otherwise.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif

.PHONY: all run test check bench deps install uninstall dist clean force
all: $(BUILD)/dsv3 $(LESSONS)

# Changes when the compiler or its flags do: then everything is built again. But `make install` alone takes what is there.
$(BUILD)/flags: force
	@mkdir -p $(BUILD)
	@printf '%s\n' '$(TEST_COMPILE) $(LIBS)' | cmp -s - $@ || $(if $(AS_BUILT), \
	  echo 'make install: $(BUILD) was built with other flags: what is up to date is installed as it is', \
	  printf '%s\n' '$(TEST_COMPILE) $(LIBS)' > $@)

# The implementation, which takes longest to compile, as a program has it that defines DSV3_SIMD. DSV3_IMPLEMENTED makes
# dsv3.h leave it out of what is linked with this. (Its warnings are those of tests/check_compile.sh.)
$(BUILD)/implementation.o: private WARN =
$(BUILD)/implementation.o: dsv3.h $(BUILD)/flags
	$(COMPILE) -DDSV3_SIMD -DDSV3_IMPLEMENTATION -x c -c $< -o $@

$(BUILD)/%.o: examples/%.c $(HEADERS) $(BUILD)/flags
	$(COMPILE) -DDSV3_IMPLEMENTED -c $< -o $@

$(BUILD)/dsv3 $(LESSONS): $(BUILD)/%: $(BUILD)/%.o $(BUILD)/implementation.o
	$(COMPILE) $^ -o $@ $(LIBS)

LINKED = -DDSV3_IMPLEMENTED $(BUILD)/implementation.o
$(BUILD)/bench_kernels: private LINKED = # looks inside and has an implementation of its own
$(BUILD)/%: bench/%.c $(wildcard bench/*.h) $(HEADERS) $(BUILD)/implementation.o
	$(COMPILE) -D_POSIX_C_SOURCE=200809L $< $(LINKED) -o $@ $(LIBS)

# And once more for the tests: with assertions, OpenMP, and private functions that can be called (tests/inside.awk).
# `cc -DDSV3_SIMD -I. -Iexamples tests/test_mla.c tests/library.c -lm` makes a test without all this.
build/inside/dsv3.h: tests/inside.awk dsv3.h
	@mkdir -p build/inside/body
	awk -v body=1 -f tests/inside.awk dsv3.h > build/inside/body/dsv3.h
	awk -f tests/inside.awk dsv3.h > $@

build/inside/library.o: private INSIDE = -Ibuild/inside/body
build/inside/library.o: tests/library.c build/inside/dsv3.h $(BUILD)/flags
	$(TEST_COMPILE) -c $< -o $@

build/inside/libdsv3.a: build/inside/library.o
	$(TEST_COMPILE) -DDSV3_IMPLEMENTATION -x c -c build/inside/dsv3.h -o build/inside/numbers.o
	@rm -f $@
	$(AR) rc $@ $< build/inside/numbers.o

INSIDE = -Ibuild/inside
build/test_gradients build/test_no_double: private INSIDE = # have an implementation of their own: in double, in float
build/%: tests/%.c tests/test.h tests/synthetic.h $(HEADERS) build/inside/libdsv3.a
	$(TEST_COMPILE) $< build/inside/libdsv3.a -o $@ $(LIBS)

run: $(BUILD)/dsv3
	@$(BUILD)/dsv3 generate examples/models/austen -p '$(PROMPT)' --echo -n 600 --temp 0.6 --stats

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
	  gcc-i686-linux-gnu libc6-dev-i386-cross gcc-s390x-linux-gnu libc6-dev-s390x-cross qemu-user \
	  gcc-mingw-w64-x86-64 wine64 \
	  pkg-config cmake meson ninja-build zip unzip libxml2-utils python3 python3-yaml python3-kconfiglib

clean:
	rm -rf $(BUILD)

# ---- packages: see examples/packages/README.md

# A library is compiled without OpenMP, as the tool is, and so that shared libraries can take it in.
$(BUILD)/lib/libdsv3.a: examples/packages/dsv3.c dsv3.h $(BUILD)/flags
	@mkdir -p $(BUILD)/lib
	$(COMPILE) -fPIC -c $< -o $(BUILD)/lib/dsv3.o
	@rm -f $@
	$(AR) rc $@ $(BUILD)/lib/dsv3.o

# RUN: what runs a program that was built for another machine, such as qemu-aarch64.
$(BUILD)/dsv3.1: examples/packages/man.sh $(BUILD)/dsv3
	sh examples/packages/man.sh $(RUN) $(BUILD)/dsv3 > $@.new
	@mv $@.new $@

AS_BUILT = $(if $(filter install,$(MAKECMDGOALS)),$(if $(filter-out install uninstall,$(MAKECMDGOALS)),,$(wildcard $(BUILD)/flags)))
quoted = '$(subst ','\'',$1)'
SETTINGS = $(foreach v,BUILD VERSION DESTDIR PREFIX INCLUDEDIR LIBDIR BINDIR DATADIR MANDIR,$v=$(call quoted,$($v)))

install: $(INSTALLED)
	@$(SETTINGS) sh examples/packages/install.sh install

uninstall:
	@$(SETTINGS) sh examples/packages/install.sh uninstall

dist:
	@$(SETTINGS) URL=$(call quoted,$(URL)) sh examples/packages/dist.sh
