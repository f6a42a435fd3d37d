# `make train` and `make test` work from a bare clone with Python 3.11+, pip and make alone.
# The first of them sets up .venv; later ones use it until pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
CONFIG ?= examples/tiny_lm.yaml
# pytest's processes. Tests with several ranks have processes of their own, so two keep two cores busy.
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
CODE = $(wildcard lightning_fastmoe tests examples benchmarks docs)
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq -c constraints.txt

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup train test quick oldest nightly lint types unit docs figures format clean distclean

help:
	@echo 'make train      train the tiny language model of examples/ (CONFIG=$(CONFIG))'
	@echo 'make test       lint, types and unit'
	@echo 'make quick      one minute: operators, layers, the file format, one topology per ZeRO stage'
	@echo 'make oldest     pytest with the oldest torch of pyproject.toml, in $(OLDEST): 3 GB, a CUDA build'
	@echo 'make nightly    make test with all combinations of parameters: half an hour more'
	@echo 'make lint       ruff check, ruff format --check'
	@echo 'make types      mypy'
	@echo 'make unit       pytest (PYTEST_ARGS="-k router" picks tests, WORKERS=0 is one process)'
	@echo 'make docs       build the site into build/docs/html; warnings are errors'
	@echo 'make figures    draw the pictures of README.md and docs/ again'
	@echo 'make format     let ruff mend what it can'
	@echo 'make clean      remove caches and build products; distclean also removes what was set up'
	@echo 'PYTHON=python3.12 picks the interpreter of a new $(VENV).'

setup: $(STAMP)

# torch comes first and on its own: deepspeed is a source distribution whose setup.py looks for it, so
# what follows is built outside of pip's isolation and finds torch, setuptools and wheel in place.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or \
	    sys.exit("lightning-fastmoe needs Python 3.11 or newer; PYTHON=$(PYTHON) is %d.%d" % v[:2])'
	@echo 'Setting up $(VENV); this happens once and takes a minute or two.'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# $(BIN) goes on PATH for ninja, which torch and deepspeed call by name.
train: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lightning-fastmoe fit --config $(CONFIG) $(TRAIN_ARGS)

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q --durations=10 \
	    -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Not part of `dev`: whoever never builds the site need not install Sphinx.
$(DOCS_STAMP): $(STAMP)
	@$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

# One topology for each ZeRO stage, and everything that needs one process and seconds.
QUICK = tests/ops tests/nn tests/distributed tests/checkpoint/format/test_round_trip.py \
    tests/test_architecture.py tests/test_argument_types.py \
    tests/strategy/test_exactness.py::test_epoch_that_is_no_multiple_of_the_accumulation

quick: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(QUICK)

# Compilers change most from one torch to the next: 2.11 lost gradients that 2.13 doesn't.
oldest:
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@version=$$(sed -n 's/^    "torch>=\(.*\)",$$/\1.0/p' pyproject.toml) && \
	    sed "s/^torch==.*/torch==$$version/" constraints.txt > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install -qq -c $(OLDEST)/constraints.txt torch setuptools wheel
	@$(OLDEST)/bin/python -m pip install -qq -c $(OLDEST)/constraints.txt --no-build-isolation -e '.[test]'
	PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" $(OLDEST)/bin/python -m pytest -q \
	    -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

nightly: override PYTEST_ARGS += --all-combinations
nightly: test

docs: $(DOCS_STAMP)
	PYTHONPATH="$(CURDIR)/docs" $(BIN)/python -m website.build build/docs
	@echo 'The site is in build/docs/html/index.html.'

figures: $(STAMP)
	PYTHONPATH="$(CURDIR)/docs" $(BIN)/python -m figures

format: $(STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(OLDEST)
