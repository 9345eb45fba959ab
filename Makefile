# Each target makes what it needs. On a fresh clone `make demo` or `make test` is enough.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
CHECKED := vidaccel tests $(wildcard benchmarks examples)
TYPED := vidaccel $(wildcard benchmarks examples)

.PHONY: help venv demo test lint types format bench clean

help:
	@echo "make venv    the environment in $(VENV), with the versions of constraints.txt"
	@echo "make demo    one clip, dense and accelerated, and a table that compares them: outputs/demo.mp4"
	@echo "make test    all tests"
	@echo "make lint    style and types (ruff, mypy); make format repairs the style"
	@echo "make bench   attention on the CPU against dense, correctness first"

venv: $(STAMP)

# torch first and pinned: without the pin pip may take a build that is gigabytes larger
$(STAMP): pyproject.toml constraints.txt
	@echo "making $(VENV) with the versions of constraints.txt (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/vidaccel demo

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS)

lint: $(STAMP)
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)
	@$(MAKE) --no-print-directory types

types: $(STAMP)
	@$(BIN)/mypy $(TYPED)

format: $(STAMP)
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.attention --device cpu

clean:
	rm -rf build dist outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
