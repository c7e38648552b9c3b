# make            the tool, the lessons and the benchmarks, in build/
# make run        writes text with the demo model
# make test       every test that a C compiler, make and a minimal system can run
# make check      also the compile matrix, sanitizers, 32-bit and whatever else needs `make deps`
# make bench      speed, beside the limits of this machine
# make install    headers, library, tool, manual page, pkg-config and CMake files; make uninstall takes them away
# make dist       release archives and packages for other build systems, in build/dist/
#
# CC, CFLAGS, LDFLAGS and LDLIBS can be set, and BUILD, the folder that is written to (tests want it to be build). The tool
# and the benchmarks have threads of their own (examples/thread_pool.h); lessons and tests use OpenMP when the compiler has
# it; OPENMP= turns it off.

CC ?= cc
CFLAGS ?= -O2
BUILD = build
WARN = -Wall -Wextra -Wpedantic
OPENMP := $(shell printf '\043include <omp.h>\nint main(void){return omp_get_max_threads()<1;}\n' | \
            $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
COMPILE = $(CC) -std=c99 $(WARN) $(CFLAGS) $(OPENMP) -I. -Iexamples -Itests -Ibench

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
BUILT = $(BUILD)/dsv3 $(BUILD)/lib/libdsv3.a $(BUILD)/dsv3.1

.PHONY: all run test check bench deps install uninstall dist clean force
all: $(BUILT) $(LESSONS) $(BENCHES)

# Changes when the compiler or its flags do: then everything is built again. But `make install` alone takes what is there.
$(BUILD)/flags: force
	@mkdir -p $(BUILD)
	@printf '%s\n' '$(COMPILE) $(LDFLAGS) $(LDLIBS)' | cmp -s - $@ || $(if $(AS_BUILT), \
	  echo 'make install: $(BUILD) was built with other flags: what is up to date is installed as it is', \
	  printf '%s\n' '$(COMPILE) $(LDFLAGS) $(LDLIBS)' > $@)

$(BUILD)/dsv3 $(BENCHES): private OPENMP =

$(BUILD)/%: examples/%.c $(HEADERS) $(BUILD)/flags
	@mkdir -p $(BUILD)
	$(COMPILE) $< -o $@ $(LDFLAGS) -lm -lpthread $(LDLIBS)

$(BUILD)/%: bench/%.c $(wildcard bench/*.h) $(HEADERS) $(BUILD)/flags
	@mkdir -p $(BUILD)
	$(COMPILE) -D_POSIX_C_SOURCE=200809L $< -o $@ $(LDFLAGS) -lm -lpthread $(LDLIBS)

# Tests that call only what is published are linked with the implementation, compiled once; the archive gives nothing
# to the others, which look inside and have their own.
build/%: tests/%.c tests/test.h tests/synthetic.h $(HEADERS) build/libdsv3.a build/flags
	@mkdir -p build
	$(COMPILE) -D_POSIX_C_SOURCE=200809L -DDSV3_SIMD $< -o $@ build/libdsv3.a $(LDFLAGS) -lm -lpthread $(LDLIBS)

build/libdsv3.a: tests/library.c dsv3.h build/flags
	$(COMPILE) -DDSV3_SIMD -c $< -o build/library.o
	@rm -f $@
	$(AR) rc $@ build/library.o

run: build/dsv3
	@build/dsv3 generate examples/models/austen -p '$(PROMPT)' --echo -n 600 --temp 0.6 --stats

test: build/dsv3 build/parity $(LESSONS) $(TESTS) $(BENCHES)
	@CC='$(CC)' sh tests/run.sh $(TESTS) tests/test_*.sh

check: test
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
	  gcc-i686-linux-gnu libc6-dev-i386-cross qemu-user \
	  pkg-config cmake meson ninja-build zip unzip libxml2-utils python3 python3-yaml python3-kconfiglib

clean:
	rm -rf $(BUILD)

# ---- packages: see examples/packages/README.md

# A library is compiled without OpenMP, as the tool is, and so that shared libraries can take it in.
$(BUILD)/lib/libdsv3.a: private OPENMP =
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

install: $(BUILT)
	@$(SETTINGS) sh examples/packages/install.sh install

uninstall:
	@$(SETTINGS) sh examples/packages/install.sh uninstall

dist:
	@$(SETTINGS) URL=$(call quoted,$(URL)) sh examples/packages/dist.sh
