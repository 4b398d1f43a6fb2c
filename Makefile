# make demo        see an OCI image run as a VM, from nothing to `demo: ok`
# make test        the whole suite
# make lint        ruff, mypy --strict, the direction of imports
# make bench       figures, as a table and in build/bench.json   (make bench AREAS="egress http" for some)
# make appliance   the bundle without Python: dist/*.tar.gz, dist/*.deb, checksums, list of contents
# make test-appliance  builds the appliance twice, compares, looks into it
# make test-metal  devices and the .deb in a virtual bare-metal host with KVM, VFIO and systemd
# make kernel      our own guest kernel (some 12 CPU minutes, once); without it Debian's is taken
# make reference   write systemd/CONFIGURATION.md from the types in hypeman/config.py
# make lock        pin the Python packages anew
# make clean       remove what was built here (the kernel cache in ~/.cache/hypeman-build stays)
#
# Each target first installs what it needs, on a fresh Debian 12 as root or through sudo; a stamp in
# build/stamps makes that quick the second time.

MAKEFLAGS += --no-builtin-rules
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

SYSTEM_PYTHON ?= /usr/bin/python3
PYTHON := .venv/bin/python
STAMPS := build/stamps
AREAS ?=
PYTEST_ARGS ?=

native_sources := setup.py $(wildcard ext/*.pyx ext/*/*.[ch] ext/guest_agent/Makefile)

.PHONY: demo test lint bench appliance test-appliance test-metal kernel reference lock clean ready

demo: ready
	@$(PYTHON) -m tests.demo

test: ready
	@echo "== tests"
	@$(PYTHON) -m pytest -q $(PYTEST_ARGS)

lint: $(STAMPS)/native
	@echo "== ruff"
	@.venv/bin/ruff check hypeman tests setup.py packaging
	@.venv/bin/ruff format --quiet --check hypeman tests setup.py packaging
	@echo "== mypy --strict"
	@.venv/bin/mypy
	@echo "== the direction of imports"
	@$(PYTHON) -m pytest -q tests/test_imports.py

bench: ready
	@$(PYTHON) -m tests.bench $(AREAS)

appliance: $(STAMPS)/native
	@packaging/appliance/build

test-appliance: $(STAMPS)/native
	@$(PYTHON) -m pytest -v tests/packaging/appliance.py

test-metal: appliance
	@$(PYTHON) -m pytest -v -m "metal or not metal" tests/metal tests/packaging/metal.py

kernel: $(STAMPS)/debian
	@echo "== guest kernel of our own"
	@packaging/kernel/build

reference: $(STAMPS)/venv
	@$(PYTHON) packaging/configuration-reference

lock: $(STAMPS)/venv
	@packaging/lock

clean:
	rm -rf build dist .mypy_cache .ruff_cache .hypothesis hypeman.egg-info
	rm -f hypeman/_native/*.so hypeman/guest/bin/hypeman-init
	find hypeman tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .venv

# --- what the targets stand on ---

ready: $(STAMPS)/native build/guest/vmlinux

$(STAMPS)/debian: packaging/debian-packages.txt
	@echo "== Debian packages"
	@packaging/install-packages $<
	@mkdir -p $(@D) && touch $@

$(STAMPS)/venv: packaging/requirements/dev.txt $(STAMPS)/debian
	@echo "== Python packages into .venv, pinned and checked by hash"
	@[ -x $(PYTHON) ] || $(SYSTEM_PYTHON) -m venv .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $<
	@touch $@

$(STAMPS)/native: $(native_sources) $(STAMPS)/venv
	@echo "== extensions and guest agent"
	@$(PYTHON) setup.py --quiet build_ext --inplace >build/native.log 2>&1 || { cat build/native.log; exit 1; }
	@touch $@

build/guest/vmlinux: packaging/kernel/config $(wildcard packaging/kernel/patches/*.patch) $(STAMPS)/native
	@echo "== guest kernel and initrd"
	@packaging/kernel/choose build/guest
