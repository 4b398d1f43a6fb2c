# `make help` lists the targets; their descriptions follow `##` below.
#
# Each target first installs what it needs, on a fresh Debian 12 as root or through sudo; a stamp in
# build/stamps skips what is already installed.

MAKEFLAGS += --no-builtin-rules
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

SYSTEM_PYTHON ?= /usr/bin/python3
PYTHON := .venv/bin/python
STAMPS := build/stamps
AREAS ?=
PYTEST_ARGS ?=

native_sources := setup.py $(wildcard ext/*.pyx ext/*/*.[ch] ext/guest_agent/Makefile ext/launcher/Makefile)

ui_sources := packaging/ui tests/server/golden/openapi.json $(shell find hypeman/ui -type f)

.PHONY: control-plane test-fleet help demo ui test test-fast test-conformance test-builds test-ui lint bench appliance client test-appliance test-metal test-arm64 kernel builder-image reference lock clean ready ready-own

help:  ## list the targets; the default, so that plain `make` starts no VM
	@sed -nE 's/^([a-z0-9-]+):.*  ## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r name what; do \
	    printf '  make %-15s %s\n' "$$name" "$$what"; done

demo: ready  ## run an OCI image as a VM; ends with `demo: ok`
	@$(PYTHON) -m tests.demo

ui: $(STAMPS)/ui  ## build the web UI from hypeman/ui into build/ui/dist

test: ready-own $(STAMPS)/ui  ## run the whole test suite, on our guest kernel
	@echo "== tests"
	@$(PYTHON) -m tests.halves $(PYTEST_ARGS)

test-fast: $(STAMPS)/native  ## tests without guests, namespaces or registries: under a minute on two idle CPUs
	@echo "== fast tests"
	@$(PYTHON) -m pytest -q -m "not real and not slow and not metal" $(PYTEST_ARGS) $$($(PYTHON) -m tests.tiers fast)

test-ui: ready-own $(STAMPS)/ui  ## the web UI in a browser: on a server of fakes, then with a real guest
	@packaging/install-packages <(echo chromium)
	@$(PYTHON) -m pytest -v tests/ui/browser.py

test-conformance: ready-own test-builds  ## public conformance suites, egress proxy, registry, compose and ACME (needs Go), published SDKs
	@packaging/install-packages <(printf '%s\n' prometheus podman)
	@$(PYTHON) -m tests.ingress.pebble
	@$(PYTHON) -m tests.telemetry.collector
	@$(PYTHON) -m pytest -v tests/ingress/test_pebble.py tests/telemetry/outside.py tests/cli/compose_conformance.py tests/registry/oci_conformance.py tests/registry/clients.py tests/egress/h2spec.py tests/egress/test_paths.py tests/egress/test_head.py tests/egress/test_hostile.py tests/conformance/test_python_sdk.py tests/conformance/sdks.py tests/conformance/schema.py

test-builds: ready-own builder-image  ## images of ten kinds of Dockerfile built in real guests and by buildah; logins, keys; cancelled and killed (needs Go)
	@packaging/install-packages <(printf '%s\n' buildah dropbear-bin)
	@$(PYTHON) -m pytest -v tests/real/test_builds.py tests/builds/dockerfiles.py tests/builds/private.py

lint: $(STAMPS)/native  ## ruff, clang-format, mypy --strict on code and tests, import direction, documents
	@echo "== ruff"
	@.venv/bin/ruff check hypeman tests setup.py packaging
	@.venv/bin/ruff format --quiet --check hypeman tests setup.py packaging
	@echo "== clang-format"
	@git ls-files '*.c' '*.h' | xargs .venv/bin/clang-format --dry-run -Werror
	@echo "== mypy --strict"
	@.venv/bin/mypy
	@echo "== types of the web UI"
	@packaging/ui check
	@echo "== direction of imports, documents, test tiers"
	@$(PYTHON) -m pytest -q tests/test_imports.py tests/test_documents.py tests/test_tiers.py

bench: ready-own $(STAMPS)/ui  ## benchmarks, as a table and in build/bench.json; AREAS="egress http" selects some
	@$(PYTHON) -m tests.bench $(AREAS)

appliance: $(STAMPS)/native  ## build the self-contained bundle: dist/*.tar.gz, *.deb, *.rpm, checksums, list of contents
	@packaging/appliance/build

builder-image: $(STAMPS)/debian  ## make the image of the VMs that build images (needs Go; about 5 CPU minutes, once)
	@echo "== builder image"
	@packaging/builder/build

client: $(STAMPS)/venv  ## the command line alone as a wheel: dist/hypeman_client-*.whl
	@$(PYTHON) packaging/client/build

test-appliance: $(STAMPS)/native  ## build the appliance twice, compare, inspect it
	@packaging/install-packages <(echo lintian)
	@$(PYTHON) -m pytest -v tests/packaging/appliance.py tests/packaging/finished.py \
	    tests/packaging/packages_in_root.py tests/packaging/bundle_in_root.py tests/packaging/older_systems.py

test-metal: ready-own appliance  ## devices, limits and the .deb in a virtual bare-metal host with KVM, VFIO and systemd
	@$(PYTHON) -m pytest -v -m "metal or not metal" -o log_cli=true -o log_cli_level=INFO --durations=0 --durations-min=30 \
	    tests/metal tests/packaging/metal.py tests/packaging/older_kernel.py $(PYTEST_ARGS)

control-plane: $(STAMPS)/venv  ## build the control plane of Kubernetes for test-fleet (needs Go; about 13 CPU minutes, once)
	@echo "== control plane"
	@$(PYTHON) -m tests.fleet.build

test-fleet: ready-own control-plane  ## hosts as nodes of a real Kubernetes cluster, in namespaces (needs Go, once)
	@packaging/install-packages <(echo faketime)
	@$(PYTHON) -m pytest -v -m fleet tests/fleet $(PYTEST_ARGS)

test-arm64: $(STAMPS)/native build/guest-arm64/own  ## our kernel and agent for arm64, cross-built, and QEMU's virt machine (emulated)
	@HYPEMAN_TEST_ARCH=arm64 $(PYTHON) -m pytest -v tests/guest/test_real_guest.py tests/guest/launcher_in_guest.py \
	    tests/hypervisor/test_conformance.py \
	    tests/packaging/start_on_arm64.py -k "not systemd and not microvm and not cloud and not firecracker and not test_fake" $(PYTEST_ARGS)

kernel: $(STAMPS)/debian  ## build our guest kernel (about 12 CPU minutes, once); only `make demo` does without it
	@echo "== guest kernel of our own"
	@packaging/kernel/build

reference: $(STAMPS)/venv  ## generate systemd/CONFIGURATION.md from the types in hypeman/config.py
	@$(PYTHON) packaging/configuration-reference

lock: $(STAMPS)/venv  ## update the pinned Python packages
	@packaging/lock

clean:  ## remove build products (keeps the kernel cache in ~/.cache/hypeman-build)
	rm -rf build dist .mypy_cache .ruff_cache .hypothesis hypeman.egg-info
	rm -f hypeman/_native/*.so hypeman/guest/bin/hypeman-init hypeman/host/bin/hypeman-launch
	find hypeman tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .venv

# --- prerequisites ---

# the guest kernel's name, as in hypeman/architecture.py
KERNEL_FILE := $(if $(filter aarch64,$(shell uname -m)),Image,vmlinux)

ready: $(STAMPS)/native build/guest/$(KERNEL_FILE)

ready-own: $(STAMPS)/native build/guest/own

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

build/guest-arm64/own: packaging/kernel/config packaging/kernel/config.arm64 $(wildcard packaging/kernel/patches/*.patch ext/guest_agent/*.[ch])
	@echo "== guest kernel of our own and initrd, for arm64"
	@packaging/install-packages packaging/arm64-packages.txt
	@ARCH=arm64 packaging/kernel/choose --own $(@D)
	@touch $@

$(STAMPS)/ui: $(ui_sources) $(STAMPS)/debian
	@echo "== web UI"
	@packaging/ui
	@touch $@

build/guest/own: packaging/kernel/config $(wildcard packaging/kernel/patches/*.patch) packaging/kernel/build $(STAMPS)/native
	@echo "== guest kernel of our own and initrd"
	@packaging/kernel/choose --own build/guest
	@touch build/guest/$(KERNEL_FILE) $@

build/guest/$(KERNEL_FILE): packaging/kernel/config $(wildcard packaging/kernel/patches/*.patch) $(STAMPS)/native
	@echo "== guest kernel and initrd"
	@packaging/kernel/choose build/guest
