# ramoe-megatron: `make demo` is the whole pipeline on a CPU, `make test` and `make check` are what CI runs.
#
#   make demo               data, base model, taxonomy, profile, fine-tuning, evaluation and report, in runs/demo
#   make demo SEEDS=5       the same with five seeds instead of the recipe's own
#   make test               all tests         (make test ARGS="-k taxonomy -x")
#   make test-fast          the tests that start no ranks and no jobs, in under two minutes
#   make check              ruff and mypy
#   make docs               docs/flags.md and the keys in docs/recipes.md, written from the docstrings
#   make bench              what alignment and profiling cost beside stock Megatron    (SHAPE=gpu, RANKS=2, ROUNDS=41),
#                           and rows of training data against seconds and memory of a start
#                           benchmarks/gpu.sh is the same on a GPU, and compares a converted model with the CPU first
#                           on a CPU also cached answers, beside uncached ones and transformers
#   make bench-conversion   a model of 13.8 GB to Megatron and back, beside cp
#   make install            the virtual environment .venv with the pinned versions; the targets above make it when needed
#   make install-megatrons  older versions of Megatron beside it, for the tests of `attach` (a few MB each)
#   make PYTHON=/path/to/python3.12 ...       names the interpreter instead of looking for one

SHELL := $(shell command -v bash)
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help find-python venv install install-megatrons test test-fast check demo docs bench bench-conversion clean

PYTHON ?=
SEEDS ?=
ARGS ?=
SHAPE ?= cpu
RANKS ?= 1
ROUNDS ?= 21
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
MEGATRONS := 0.17.1 0.18.2

# Each candidate is run, not only found: a pyenv shim exists for every version but fails unless its version is active, and
# a Debian python3.12 without python3.12-venv cannot make an environment.
define FIND_PYTHON
works() { "$$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }; \
shopt -s nullglob; \
if [ -n "$(PYTHON)" ]; then \
  if works "$(PYTHON)"; then found="$(PYTHON)"; else \
    echo "error: PYTHON=$(PYTHON) is not a Python 3.12 with the venv and ensurepip modules. Name another one, or leave PYTHON out to have one looked for." >&2; exit 1; fi; \
else \
  found=; refused=; \
  candidates=($$(type -aP python3.12 python3 python || true) \
    $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python3.12 \
    $$(uv python find --no-project 3.12 2>/dev/null || true) $$HOME/.local/share/uv/python/cpython-3.12*/bin/python3.12 \
    $${CONDA_PREFIX:+$$CONDA_PREFIX/bin/python3.12} $$HOME/{miniconda3,miniforge3,mambaforge,anaconda3}/{,envs/*/}bin/python3.12 \
    $$HOME/.asdf/installs/python/3.12*/bin/python3.12 $$HOME/.local/share/mise/installs/python/3.12*/bin/python3.12); \
  for candidate in "$${candidates[@]}"; do \
    if works "$$candidate"; then found="$$candidate"; break; elif [ -e "$$candidate" ]; then refused+=" $$candidate"; fi; done; \
  if [ -z "$$found" ]; then { \
    echo "error: no Python 3.12 found that runs and has the venv and ensurepip modules."; \
    echo "Looked for: python3.12, python3 and python on PATH; pyenv ($${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*); uv; conda; asdf; mise."; \
    echo "There, but not usable:$${refused:- none}"; \
    echo "Install one (Debian and Ubuntu: python3.12 and python3.12-venv; or: pyenv install 3.12; uv python install 3.12; conda create -n py312 python=3.12),"; \
    echo "or name one: make PYTHON=/path/to/python3.12"; } >&2; exit 1; fi; \
fi
endef

help:  ## the targets and what they do
	@sed -n '/^#   make/s/^#   //p' Makefile

find-python:  ## print the Python 3.12 that `make venv` would use
	@$(FIND_PYTHON); echo "$$found"

# The stamps are written last, so that an interrupted target is done again.
venv: $(VENV)/.made
$(VENV)/.made:
	@$(FIND_PYTHON); echo "making $(VENV) with $$found"; "$$found" -m venv $(VENV)
	@touch $@

install: $(VENV)/.installed
$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev,lm-eval]'
	@touch $@

install-megatrons: $(MEGATRONS:%=$(VENV)/megatron-core-%/.installed)
$(VENV)/megatron-core-%/.installed: $(VENV)/.made
	rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(@D) megatron-core==$*
	@touch $@

# A file's tests run in one process, the slowest files first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder --durations 20

test: install
	$(PYTEST) $(ARGS)

test-fast: install
	$(PYTEST) -m "not starts" $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: install  # on the CPU backend, also where there is a GPU: transformer-engine need not be installed
	CUDA_VISIBLE_DEVICES= $(BIN)/ramoe run examples/demo.yaml --out $(RUN) $(if $(SEEDS),--set seeds=$(SEEDS))

docs: install
	$(BIN)/python -m ramoe_megatron.cli.reference docs

bench-conversion: install
	$(BIN)/python -m benchmarks.conversion

bench: install
	$(BIN)/python -m benchmarks --shape $(SHAPE) --ranks $(RANKS) --rounds $(ROUNDS) --out runs/bench
	$(BIN)/python -m benchmarks.data --out runs/bench/data

clean:  ## remove the tools' caches; runs/ and the environment stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
