# `make quickstart` and `make test` need Python 3.11 and nothing else: each makes .venv by itself.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast lint install clean

install: $(VENV)/.installed

# torch first and pinned: without it pip may take a build with gigabytes of GPU libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt \
		--editable ".[ray,test]"
	touch $@

quickstart: install
	$(BIN)/raylora train jobs/quickstart.yaml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -m "not gpu"

test-fast: install
	$(BIN)/pytest -m "not slow and not ray and not gpu"

clean:
	rm -rf $(VENV) build dist *.egg-info
