# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types docs clean

demo: $(VENV)/.demo
	$(BIN)/codeword demo --out demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

docs: $(VENV)/.test
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/draw_file.py
	$(BIN)/python docs/draw_methods.py
	$(BIN)/python docs/draw_fronts.py
	$(BIN)/python docs/draw_pruning.py
	$(BIN)/python docs/generate_results.py

clean:
	rm -rf $(VENV) demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Each step up installs what the step below has and a little more.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable ".[all]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable ".[dev]"
	touch $@
