# Installs the library for C and C++ programs; everything else is cargo's.
#
#   make install PREFIX=$HOME/.local
#   make install PREFIX=/usr DESTDIR=pkgroot LIBDIR=/usr/lib/x86_64-linux-gnu

PREFIX     ?= /usr/local
LIBDIR     ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DESTDIR    ?=
CARGO      ?= cargo
# Where cargo leaves libpartialfc.so and libpartialfc.a.
BUILD      ?= $(or $(CARGO_TARGET_DIR),target)/release

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# As build.rs has it.
SONAME  := libpartialfc.so.0

lib     := $(DESTDIR)$(LIBDIR)
include := $(DESTDIR)$(INCLUDEDIR)
# What pkg-config and CMake read names folders relative to itself, so that the installed tree may be moved.
relative = $(shell realpath -m --relative-to=$(1) $(2))
fill = sed -e 's|@PREFIX_FROM_PC@|$(call relative,$(LIBDIR)/pkgconfig,$(PREFIX))|' \
           -e 's|@INCLUDE_FROM_LIB@|$(call relative,$(LIBDIR),$(INCLUDEDIR))|' \
           -e 's|@VERSION@|$(VERSION)|' -e 's|@SONAME@|$(SONAME)|'

# More for cargo build.
CARGO_FLAGS ?=
CARGO_HOME  ?= $(HOME)/.cargo
# Panics and backtraces name files: without the folders of the machine that built them. The last that fits counts.
prefixes := $(CURDIR)=partialfc $(CARGO_HOME)=cargo $(abspath $(dir $(BUILD)))=target
comma    := ,
# RUSTFLAGS hides what cargo's configuration has; without it the two are joined.
listed   := $(patsubst %,"--remap-path-prefix=%"$(comma),$(prefixes))
remap     = $(if $(RUSTFLAGS),,--config 'build.rustflags=[$(listed)]')

.PHONY: build install install-files
build:
	$(if $(RUSTFLAGS),RUSTFLAGS='$(RUSTFLAGS) $(prefixes:%=--remap-path-prefix=%)') \
	  $(CARGO) build --release --lib $(remap) $(CARGO_FLAGS)

install: build install-files

# Without building first.
install-files:
	install -d $(include) $(lib)/pkgconfig $(lib)/cmake/partialfc
	install -m 644 include/*.h include/*.hpp $(include)
	install -m 644 $(BUILD)/libpartialfc.a $(lib)
	install -m 755 $(BUILD)/libpartialfc.so $(lib)/libpartialfc.so.$(VERSION)
	ln -sf libpartialfc.so.$(VERSION) $(lib)/$(SONAME)
	ln -sf $(SONAME) $(lib)/libpartialfc.so
	$(fill) packaging/partialfc.pc.in > $(lib)/pkgconfig/partialfc.pc
	$(fill) packaging/partialfcConfig.cmake.in > $(lib)/cmake/partialfc/partialfcConfig.cmake
	$(fill) packaging/partialfcConfigVersion.cmake.in > $(lib)/cmake/partialfc/partialfcConfigVersion.cmake
