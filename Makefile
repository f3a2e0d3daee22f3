# make demo   set up a virtual environment and run the main job on the bundled model
# make test   set up the same environment and run the tests, but for those that cost seconds each
# make test-slow   run those
# make test-anywhere   run all of them four times, with kernels and threads of other machines; a line a run
# make lint   ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-anywhere lint format clean

demo: $(VENV)/.installed
	$(BIN)/sfc demo --out runs/demo --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-anywhere: $(VENV)/.installed
	$(BIN)/python -m tests.anywhere

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
