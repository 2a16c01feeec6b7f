# Everything happens in .venv; nothing needs to be installed by hand but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: demo test lint reference bench goldens docs clean

demo: .venv/export        ## the whole way once, on the demo model
	$(BIN)/rwkv-edge demo

test: .venv/dev           ## all tests that need no torch
	$(BIN)/pytest

lint: .venv/dev           ## style, types, who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

reference: .venv/reference  ## our numbers against the rwkv package, live; adds torch
	$(BIN)/pytest -m reference

bench: .venv/dev          ## speed and memory, as ratios measured in one run
	$(BIN)/python benchmarks/speed.py

goldens: .venv/reference  ## make tests/golden anew
	$(BIN)/python tests/make_goldens.py

docs: .venv/docs          ## write docs/cli.md and docs/api.md, then the site, into build/docs
	$(BIN)/python docs/make_reference.py
	$(BIN)/mkdocs build --strict

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit("rwkv-edge needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

.venv/export: .venv/python pyproject.toml constraints.txt
	$(PIP) -e '.[export]'
	touch $@

.venv/dev: .venv/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	touch $@

.venv/docs: .venv/dev pyproject.toml constraints.txt
	$(PIP) -e '.[docs]'
	touch $@

.venv/reference: .venv/dev constraints.txt
	$(PIP) torch rwkv
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
