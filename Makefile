# Each target sets up what it needs: a virtual environment in .venv and, as root on Debian, the packages that tests use.

PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := .venv/.ready
# What the tests start. Without one of them its tests are skipped, and the end of the run says so.
PACKAGES := acl attr btrfs-progs bubblewrap busybox-static containerd docker.io e2fsprogs gcc libbtrfsutil-dev libc6-dev libelf1 python3-dev rsync util-linux xfsprogs

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-windows test-zfs wheel-test check docs soak bench bench-docs packages clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 16

demo: $(READY) ## build this project's wheel in cached steps: cold, cached, and after a change
	PATH="$(CURDIR)/$(BIN):$$PATH" docs/examples/demo.sh

test: $(READY) packages ## every test this machine can run; ends with what was skipped, and why
	@.ci/test

test-windows: $(READY) ## the tests on Windows CPython on Wine, which is not Windows, but near
	.ci/windows

test-zfs: $(READY) packages ## the tests of the backend zfs on real OpenZFS: here, or in a machine made for them
	.ci/zfs/test

wheel-test: $(READY) packages ## the tests against the built wheel, away from the source; for root, as nobody
	.ci/wheel-test

check: $(READY) ## style, types for Linux, macOS and Windows, and the quick tests that need no root
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --platform linux --cache-dir .mypy_cache/linux
	for platform in darwin win32; do \
	    $(BIN)/mypy --platform $$platform --cache-dir .mypy_cache/$$platform storebackends plugins || exit 1; \
	done
	$(BIN)/pytest -m "not root and not slow and not soak"

docs: $(READY) ## the examples of the documentation
	$(BIN)/pytest -m docs

soak: $(READY) packages ## the long tests
	ZFS_TIMEOUT=3h .ci/zfs/test -m soak --timeout 7200
	$(BIN)/pytest -m soak --timeout 3600

bench: $(READY) packages ## measure, compare and hold to the ratios promised
	.ci/bench dist/benchmarks

bench-docs: $(READY) ## write the figures of the last `make bench` into the documentation
	$(BIN)/python -m pip install -qq --disable-pip-version-check --group report
	$(BIN)/python -m tests.benchmarks.report dist/benchmarks/*.json

packages: $(READY)
	@.ci/debian $(PACKAGES)
	@.ci/btrfsutil .venv/bin/python --editable '.[btrfs]'

$(READY): pyproject.toml .ci/setup
	PYTHON="$(PYTHON)" .ci/setup
	@touch $@

clean: ## remove what the targets made here
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* dist build htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
