# chaos.h is one header: nothing here needs to run before you use it. `make help` says what can be made.
# CC CFLAGS CPPFLAGS LDFLAGS LDLIBS PREFIX DESTDIR are yours; what the project itself needs stands in variables of its own.

CFLAGS ?= -O2 -g
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 60

build := build

warnings := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wundef -Wstrict-prototypes -Wmissing-prototypes
flags = -std=c99 $(warnings) -pthread $(CPPFLAGS) $(CFLAGS)
compile = $(CC) $(flags)
link = $(LDFLAGS) $(LDLIBS)
version := $(shell sed -n 's/^.define CHAOS_VERSION  *"\(.*\)"/\1/p' chaos.h)

# libcurl where pkg-config finds 7.86 or newer, for ssm: without the aws-cli; `make curl=` does without.
curl := $(shell pkg-config --exists 'libcurl >= 7.86' 2>/dev/null && echo yes)
ifneq ($(curl),)
curl_flags := -DCHAOS_WITH_CURL $(shell pkg-config --cflags libcurl)
curl_libs := $(shell pkg-config --libs libcurl)
endif

programs := $(patsubst examples/%.c,$(build)/chaos-%,$(filter-out examples/demo.c,$(wildcard examples/*.c)))
tests := $(patsubst tests/%.c,%,$(wildcard tests/unit/*.c tests/net/*.c tests/regress/*.c))
fuzzers := $(filter-out standalone,$(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/*.c)))
# Against nginx, HAProxy, curl and the like; what is not for `make test`: AWS's stand-ins and clients (`make peers`), the
# comparison of scores (CI), and what they share.
cloud := $(wildcard $(patsubst %,tests/peers/%.py,runbook ssm deploy terraform lambda ssm_tool layer agents workflows))
shared := $(patsubst %,tests/peers/%.py,common aws runtime_api containers scores)
peers := $(filter-out $(cloud) $(shared),$(wildcard tests/peers/*.py tests/peers/*.sh))
long := $(wildcard tests/peers/real.py) tests/compile/run # first, so that nothing waits for them in the end
test_needs := chaos.h $(wildcard tests/*.h tests/unit/*.h tests/net/*.h tests/fuzz/*.h)

all: $(programs)

# Those that read ssm: carry libcurl.
$(build)/chaos-proxy $(build)/chaos-ssm: extra := $(curl_flags)
$(build)/chaos-proxy $(build)/chaos-ssm: libs := $(curl_libs)
$(build)/chaos-%: examples/%.c chaos.h Makefile
	@mkdir -p $(@D)
	$(compile) $(extra) -o $@ $< $(link) $(libs)

# What the tests include is compiled at -Og, unless CFLAGS are yours: a third of the time. What they run is not.
test_level := $(if $(filter file,$(origin CFLAGS)),-Og)
$(build)/tests/%: tests/%.c $(test_needs) Makefile
	@mkdir -p $(@D)
	$(compile) $(test_level) -o $@ $< $(link)

demo: all $(build)/chaos-demo
	$(build)/chaos-demo

test: all $(build)/chaos-demo $(tests:%=$(build)/tests/%)
	@echo "not here: make peers (SSM, Lambda, containers, Terraform: 5 minutes), make asan ubsan tsan, make fuzz"
	@sh tests/run $(long) $(tests:%=$(build)/tests/%) $(filter-out $(long),$(peers) tests/lint/run)

peers: all
	@sh tests/run $(cloud)

bench: all
	@sh tests/bench/run

# The unit and net tests once more, each under a sanitizer, beside the plain ones in build/.
asan_flags := -fsanitize=address -fno-omit-frame-pointer
ubsan_flags := -fsanitize=undefined -fno-sanitize-recover=all
tsan_flags := -fsanitize=thread
define sanitizer
$(build)/$(1)/%: tests/%.c $(test_needs) Makefile
	@mkdir -p $$(@D)
	$$(compile) -O1 -g $($(1)_flags) -o $$@ $$< $$(link)

$(1): $(tests:%=$(build)/$(1)/%)
	@CHECK_UNDER="$$($(1)_under)" sh tests/run $(tests:%=$(build)/$(1)/%)
endef
# Older thread sanitizers cannot place their shadow memory where addresses are random.
tsan_under = $(shell setarch -R true 2>/dev/null && echo setarch -R)
$(foreach s,asan ubsan tsan,$(eval $(call sanitizer,$(s))))

# libFuzzer where clang brings it, else the same targets mutated by their own standalone main.
fuzz_build = $(if $(shell echo 'int LLVMFuzzerTestOneInput(void);int LLVMFuzzerTestOneInput(void){return 0;}' | \
    clang -fsanitize=fuzzer -x c - -o /dev/null 2>/dev/null && echo yes), \
    clang $(flags) -O1 -g -fsanitize=fuzzer$(comma)address$(comma)undefined -fno-sanitize-recover=all, \
    $(compile) tests/fuzz/standalone.c)
comma := ,

$(build)/fuzz/%: tests/fuzz/%.c $(test_needs) $(wildcard tests/fuzz/standalone.c) Makefile
	@mkdir -p $(@D)
	$(fuzz_build) -o $@ $< $(link)

fuzz: $(fuzzers:%=$(build)/fuzz/%)
	@FUZZ_SECONDS=$(FUZZ_SECONDS) sh tests/fuzz/run $(fuzzers:%=$(build)/fuzz/%)

lint: all
	@sh tests/lint/run

# musl where it is there, unless you chose a CC: its static programs resolve names without glibc's plug-ins.
static_cc = $(if $(filter default,$(origin CC)),$(shell command -v musl-gcc || echo $(CC)),$(CC))
static: $(build)/static/chaos-proxy $(build)/static/chaos-ssm $(build)/static/chaos-upstream $(build)/static/chaos-middleware

$(build)/static/chaos-%: examples/%.c chaos.h Makefile
	@mkdir -p $(@D)
	$(static_cc) $(flags) -static -o $@ $< $(link)

# For AWS Lambda: small static programs and their zips, one for each architecture. Debian's musl for x86-64 (musl-tools), its
# cross compiler for arm64 (gcc-aarch64-linux-gnu), where there is no musl.
small := -Os -fwhole-program -DNDEBUG -DCHAOS_NO_PROXY -fno-asynchronous-unwind-tables -ffunction-sections -fdata-sections \
    -fno-ident -static -s -Wl,--gc-sections -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,norelro
cc_x86_64 = $(shell command -v musl-gcc || command -v x86_64-linux-musl-gcc)
cc_arm64 = $(shell command -v aarch64-linux-musl-gcc || command -v aarch64-linux-gnu-gcc)

lambda: $(build)/lambda/chaos-example-x86_64.zip $(build)/lambda/chaos-example-arm64.zip
layer: $(build)/layer/chaos-layer-x86_64.zip $(build)/layer/chaos-layer-arm64.zip

# $(1) target, $(2) program in the zip, $(3) source, $(4) architecture, $(5) package to install, $(6) zip
define static_for_lambda
$(build)/$(1)/$(4)/$(2): examples/$(3).c chaos.h Makefile
	@mkdir -p $$(@D)
	@if [ -z "$$(cc_$(4))" ]; then echo "make $(1): no compiler for $(4): install $(5)" >&2; exit 1; fi
	$$(cc_$(4)) -std=c99 $(warnings) $(small) -pthread $$(CPPFLAGS) -o $$@ $$<
$(build)/$(1)/$(6)-$(4).zip: $(build)/$(1)/$(4)/$(2)
	@if ! command -v zip >/dev/null; then echo "make $(1): install zip" >&2; exit 1; fi
	@rm -f $$@
	cd $$(<D) && chmod 755 $(2) && zip -q -X ../$(6)-$(4).zip $(2)
endef
$(eval $(call static_for_lambda,lambda,bootstrap,lambda,x86_64,musl-tools,chaos-example))
$(eval $(call static_for_lambda,lambda,bootstrap,lambda,arm64,gcc-aarch64-linux-gnu libc6-dev-arm64-cross,chaos-example))
$(eval $(call static_for_lambda,layer,chaos-layer,layer,x86_64,musl-tools,chaos-layer))
$(eval $(call static_for_lambda,layer,chaos-layer,layer,arm64,gcc-aarch64-linux-gnu libc6-dev-arm64-cross,chaos-layer))

install: $(build)/chaos-proxy $(build)/chaos-ssm
	mkdir -p $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/pkgconfig
	cp chaos.h $(DESTDIR)$(PREFIX)/include/chaos.h
	cp $(build)/chaos-proxy $(build)/chaos-ssm $(DESTDIR)$(PREFIX)/bin
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: chaos.h' \
	    'Description: fault injection in one C header' 'Version: $(version)' \
	    'Cflags: -I$${includedir} -pthread' 'Libs: -pthread' > $(DESTDIR)$(PREFIX)/lib/pkgconfig/chaos.pc

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/include/chaos.h $(DESTDIR)$(PREFIX)/bin/chaos-proxy $(DESTDIR)$(PREFIX)/bin/chaos-ssm \
	    $(DESTDIR)$(PREFIX)/lib/pkgconfig/chaos.pc

clean:
	rm -rf $(build)

help:
	@echo "make              build/chaos-proxy, build/chaos-ssm and the examples; with libcurl when it is there (make curl= without)"
	@echo "make demo         see it: a service, the proxy in front, faults on and off (15 s)"
	@echo "make test         all tests that need only cc and make; the others where their tools are there"
	@echo "make peers        the control plane, Lambda and deployment against moto, aws-cli, real runtimes, containers (5 min)"
	@echo "make bench        the figures of the README, measured here"
	@echo "make asan         the unit and net tests under the address sanitizer; also: ubsan tsan"
	@echo "make fuzz         every fuzz target for FUZZ_SECONDS=$(FUZZ_SECONDS)"
	@echo "make lint         the rules of the source: sections, symbols, macros, options, README"
	@echo "make static       static programs in build/static"
	@echo "make lambda       build/lambda: a function in C for AWS Lambda, static, zipped; also: layer, for any runtime"
	@echo "make install      chaos.h, chaos-proxy, chaos-ssm and chaos.pc under PREFIX=$(PREFIX); also: uninstall; DESTDIR works"
	@echo "make clean        remove build/"

.PHONY: all demo test peers bench asan ubsan tsan fuzz lint lambda layer static install uninstall clean help
.DELETE_ON_ERROR:
