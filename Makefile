# Needs Python >= 3.11, pip and make. Everything is installed into .venv only.
#   make quickstart ARGS="--help"     options of the quickstart
#   make test ARGS="-k maml"          options of pytest
#   make test PYTHON=python3.12       another interpreter than the one found

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2

# The newest that runs: a name on the path may be a shim with nothing behind it.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo $$name; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help quickstart test doctest lint types format check install clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/.experiments  ## five ways of transfer on embedded data (minutes)
	$(BIN)/python -m experiments.quickstart $(ARGS)

test: $(VENV)/.test  ## the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

doctest: $(VENV)/.test  ## the examples in the docstrings
	$(BIN)/python -m pytest -n $(WORKERS) --doctest-modules tests/conftest.py jaxtransfer

lint: $(VENV)/.test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## pyright
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

check: lint types doctest test  ## all of the above but the quickstart

format: $(VENV)/.test  ## let ruff put the format and the simple rules right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.test  ## only install, for everything here

clean:  ## remove .venv and all caches (results under runs/ stay)
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.experiments: pyproject.toml | $(VENV)/.python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[experiments]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[experiments,test]'
	@touch $@ $(VENV)/.experiments

# Debian and Ubuntu split ensurepip off: then the pip outside puts one inside.
$(VENV)/.python:
	@python="$(PYTHON)"; \
	if ! $${python:-false} -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "jaxtransfer needs Python 3.11 or newer; found: $${python:-none}." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "creating $(VENV) with $$python ($$($$python --version 2>&1))"; \
	rm -rf $(VENV); \
	if ! $$python -m venv $(VENV) >/dev/null 2>&1; then \
		rm -rf $(VENV); \
		if ! { $$python -m venv --without-pip $(VENV) && \
			$$python -m pip --python $(BIN)/python install --quiet pip; }; then \
			rm -rf $(VENV); \
			echo "$$python can't make a virtual environment with pip in it." >&2; \
			echo "On Debian or Ubuntu: apt-get install python3-venv" >&2; \
			exit 1; \
		fi; \
	fi; \
	touch $@
