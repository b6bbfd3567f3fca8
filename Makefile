# Installs the library for C and C++ programs; everything else is cargo's.
#
#   make install PREFIX=$HOME/.local
#   make install PREFIX=/usr DESTDIR=pkgroot LIBDIR=/usr/lib/x86_64-linux-gnu
#   make uninstall ...       with the same settings: takes away what was installed
#   make dist                a tarball of the installed tree, in target/dist

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
headers := $(wildcard include/*.h include/*.hpp)
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

.PHONY: build install install-files uninstall dist dist-files
build:
	$(if $(RUSTFLAGS),RUSTFLAGS='$(RUSTFLAGS) $(prefixes:%=--remap-path-prefix=%)') \
	  $(CARGO) build --release --lib $(remap) $(CARGO_FLAGS)

install: build install-files

# Without building first.
install-files:
	install -d $(include) $(lib)/pkgconfig $(lib)/cmake/partialfc
	install -m 644 $(headers) $(include)
	install -m 644 $(BUILD)/libpartialfc.a $(lib)
	install -m 755 $(BUILD)/libpartialfc.so $(lib)/libpartialfc.so.$(VERSION)
	ln -sf libpartialfc.so.$(VERSION) $(lib)/$(SONAME)
	ln -sf $(SONAME) $(lib)/libpartialfc.so
	$(fill) packaging/partialfc.pc.in > $(lib)/pkgconfig/partialfc.pc
	$(fill) packaging/partialfcConfig.cmake.in > $(lib)/cmake/partialfc/partialfcConfig.cmake
	$(fill) packaging/partialfcConfigVersion.cmake.in > $(lib)/cmake/partialfc/partialfcConfigVersion.cmake

# All versions of this SONAME. Folders that others may use stay.
uninstall:
	rm -f $(headers:include/%=$(include)/%) $(lib)/libpartialfc.a $(lib)/libpartialfc.so $(lib)/$(SONAME)* $(lib)/pkgconfig/partialfc.pc
	rm -rf $(lib)/cmake/partialfc

# The same bytes of the same libraries and sources, whoever packs them, where and when.
DIST    ?= $(dir $(BUILD))dist
tree    := partialfc-$(VERSION)-$(shell uname -m)-linux-gnu
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

dist: build dist-files

dist-files:
	rm -rf $(DIST)/$(tree)
	$(MAKE) -s install-files DESTDIR=$(abspath $(DIST)) PREFIX=/$(tree) LIBDIR=/$(tree)/lib INCLUDEDIR=/$(tree)/include
	install -m 644 README.md CHANGELOG.md LICENSE-* $(DIST)/$(tree)
	tar -C $(DIST) --sort=name --mtime=@$(SOURCE_DATE_EPOCH) --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX -cf - $(tree) \
	  | gzip -9n > $(DIST)/$(tree).tar.gz
	rm -r $(DIST)/$(tree)
	@echo $(DIST)/$(tree).tar.gz
