# `make demo` and `make test` need python 3.11 or newer and a C++20 compiler; the rest is fetched.
#   PYTHON=python3.12        the interpreter .venv is made with
#   TORCH=...                which torch is installed when the environment has none

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test lint bench build clean

demo: $(VENV)/serve $(VENV)/vision
	$(BIN)/python examples/demo.py

test: $(VENV)/test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cc' '*.h' '*.cu' '*.cuh')

bench: $(VENV)/serve
	PYTHON=$(BIN)/python sh bench/run.sh

# Compiles the native ops again after a change in csrc/.
build: $(VENV)/torch
	$(BIN)/pip install --quiet --editable .

clean:
	rm -rf build demo $(VENV) *.egg-info pyruntime/_cpu*.so pyruntime/_cuda*.so pyruntime/_kernels

# torch is never a build dependency, but what is there first is what is used: a pinned one.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	@touch $@

$(VENV)/serve $(VENV)/vision $(VENV)/test $(VENV)/lint: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@
