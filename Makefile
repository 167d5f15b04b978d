# Each target does all its own set-up: on a fresh machine with Python 3.11 or newer, `make demo` is the only command.
# The virtual environment follows pyproject.toml and constraints.txt; `make clean` starts it anew.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Two cores run the tests in about half the time; `make test JOBS=0` runs them in one process, for a debugger.
JOBS   ?= auto

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test mutants fuzz lint format bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train a small network, kill it, resume it, and see its best epoch (ARGS="--epochs 10" for options)
	$(BIN)/highcamp demo $(ARGS)

test: $(VENV)/.test  ## Run every test (ARGS="tests/policy -x" for some of them)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

mutants: $(VENV)/.test  ## Break a copy of the code on purpose, in about 100 ways: tests must notice each (ARGS="--only retention" for some)
	$(BIN)/python tests/mutants --out docs/mutants.md $(ARGS)

# atheris, the fuzzer that is guided by what it reaches, has builds for few versions of Python and for Linux, so it is no extra.
fuzz: $(VENV)/.test  ## Feed hostile bytes to the parsers for a minute (ARGS="--seconds 600" for longer)
	$(BIN)/python -m pip install --quiet --only-binary atheris 'atheris>=3'
	$(BIN)/python tests/attacks/fuzz.py $(ARGS)

lint: $(VENV)/.test  ## Check style, types and import layers; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test  ## Put the code into its standard form
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## Measure against the bounds, beside peers and limits: docs/benchmarks.md (ARGS="--quick --out build/benchmarks" to try)
	$(BIN)/python -m benchmarks --out docs $(ARGS)

clean:  ## Remove everything that make has made
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find benchmarks highcamp tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An empty file in the environment says which extras are in it. The build tools come from constraints.txt too, and are
# used as they are installed (--no-build-isolation), so that nothing unpinned is fetched.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := test
$(VENV)/.bench: EXTRAS := bench
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/.python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("highcamp needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
