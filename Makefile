# jaximm: `make demo` and `make test` need nothing but Python >= 3.11 and make.
#
# PYTHON=python3.12 make test   picks another interpreter; `make clean` removes what was made.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TESTS ?= not slow
FILES ?=

# LAPACK's own threads spin against XLA's and the second test worker's: one thread is faster here.
export OPENBLAS_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg
# Workers and the processes that tests start would each compile every module and test again.
unexport PYTHONDONTWRITEBYTECODE
# Compiled programs are kept between runs and shared by the test workers.
CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0

.PHONY: help demo demo-lm suite test test-newest test-slow lint types pytest bench data clean

help:
	@echo "make demo         the main job on real data: immunise, attack, compare, report"
	@echo "make demo-lm      a tiny language model: trained, conditioned, attacked with swept rates"
	@echo "make suite        the linear cases, every method against every attacker; pages at the end"
	@echo "make test         lint, types, doctests and tests, with $(PYTHON)"
	@echo "make test-newest  the same with the newest Python found (3.12 or later)"
	@echo "make test-slow    the tests that take minutes"
	@echo "make lint         ruff, floors        make bench  the benchmarks"
	@echo "make data         fetch full MNIST, Fashion-MNIST, CIFAR-10 and texts"
	@echo "make clean        remove environments and caches"

demo: $(VENV)/.installed
	$(BIN)/jaximm demo

demo-lm: $(VENV)/.installed
	$(BIN)/jaximm fetch mails speeches
	$(CACHE) $(BIN)/python experiments/lm_tiny/run.py runs/demo_lm --demo

suite: $(VENV)/.installed
	$(CACHE) $(BIN)/jaximm suite

test: lint types pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/pyrefly check --summary=none --python-interpreter-path $(BIN)/python

pytest: $(VENV)/.installed
	$(CACHE) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(TESTS)" $(FILES)

test-slow: $(VENV)/.installed
	XLA_FLAGS= $(CACHE) $(BIN)/python -m pytest -q -n $(WORKERS) -m slow

test-newest:
	@newest="$$($(PYTHON) .ci/newest_python.py)" || { echo "no Python 3.12 or later found" >&2; exit 1; }; \
	echo "testing with $$newest"; \
	$(MAKE) test VENV=.venv-newest PYTHON="$$newest"

bench: $(VENV)/.installed
	for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

data: $(VENV)/.installed
	$(BIN)/jaximm fetch full

# The stamp names everything that decides what is installed, so a second run installs nothing.
# The pins are complete, so pip need not look for what they ask for.
# Python compiles what is imported when it is imported; pip would compile all there is, which is
# half of the time it takes.
$(VENV)/.installed: pyproject.toml $(wildcard constraints/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jaximm needs Python >= 3.11; '$(PYTHON)' is missing or older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks venv or ensurepip; install them (Debian: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@pins=constraints/py312.txt; \
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then pins=constraints/py311.txt; fi; \
	pip="$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --no-deps"; \
	set -x; \
	$$pip -r $$pins -r constraints/data.txt; \
	$$pip --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv .venv-newest .jax_cache .hypothesis .ruff_cache .pytest_cache build dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
