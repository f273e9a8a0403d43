# `make demo` and `make test` do all the set-up themselves, from a clean clone, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread: the tests are many small problems, which more threads only slow down.
export OMP_NUM_THREADS ?= 1

.PHONY: help venv demo test test-replay test-replay-all test-long test-versions lint format types doctest docs docs-check gallery transforms mutations bench dist clean

help:
	@echo "make demo     install, then find wrong labels of a data set and draw what happened"
	@echo "make test     install, then run the tests"
	@echo "make venv     make $(VENV) with everything that developing needs"
	@echo "make lint | format | types | doctest | docs | docs-check | gallery | transforms | mutations | bench | dist | test-replay | test-replay-all | test-long | test-versions | clean"

# Torch comes first and alone, at the pinned version: a looser request may bring gigabytes of CUDA packages.
$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cli]"
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

venv: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/bilevel clean digits --output demo-output
	@echo "The pictures, the suspicious rows, the cleaned data and a JSON of everything are in demo-output/"

# One process for each core, each with one thread. Tests of one group go to one process.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist loadgroup

# The tests of layers and problems once more, with all that can be replayed replayed at once; test-replay-all: every test.
REPLAYED := tests/test_implicit.py tests/test_layers.py tests/test_problem.py tests/test_failures.py tests/test_settings.py \
	tests/test_differentiation.py tests/test_least_squares.py tests/test_goal.py tests/solvers
test-replay: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --replay $(REPLAYED)

test-replay-all: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --replay

test-long: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --long --hypothesis-profile=long --timeout=3600

# The tests beside other versions, of which gigabytes may come: make test-versions TORCH=2.9.1 PYTHON=python3.10
test-versions:
	$(PYTHON) -m venv .venv-versions
	.venv-versions/bin/python -m pip install --quiet "torch==$(TORCH)" -e ".[test]"
	.venv-versions/bin/python -m pytest -q -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy
	cd benchmarks && ../$(BIN)/mypy *.py

doctest: $(VENV)/.dev
	$(BIN)/python -m pytest -q --doctest-modules bilevel

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html
	$(BIN)/sphinx-build -q -n -W --keep-going -b doctest -d docs/_build/html/.doctrees docs docs/_build/doctest

# Opens every page of the site that `make docs` or `make gallery` built in headless Chromium, without a network, at two widths,
# light and dark. Needs Debian's packages chromium and chromium-driver, or their like.
docs-check:
	$(PYTHON) docs/check_site.py docs/_build/html

# Runs all scripts of examples/, and builds the documentation with their figures. The figures stay in docs/gallery/ for a later `make docs`.
gallery: $(VENV)/.dev
	BILEVEL_GALLERY=1 $(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html

# Runs every cell of the transform matrix and writes the documentation's table from what happened.
transforms: $(VENV)/.test
	$(BIN)/python -m tests.transforms.table

# Puts deliberate faults into copies of the package, one at a time: each has to be caught by a test. About ten minutes.
mutations: $(VENV)/.test
	$(BIN)/python -m tests.mutations

bench: $(VENV)/.dev
	for script in startup hypergradient batched_ridge vmap_or_loop fixed_point lasso imaml_speed imaml_error imaml_memory goal outer_work; do $(BIN)/python benchmarks/$$script.py; done

# A wheel and a source archive from which the tests run, both checked.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m pip install --quiet -c constraints.txt build twine
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-versions build dist *.egg-info docs/_build docs/gallery demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
