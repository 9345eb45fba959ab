# Each target makes what it needs. On a fresh clone `make demo` or `make test` is enough.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
CHECKED := vidaccel tests $(wildcard benchmarks examples)
TYPED := vidaccel $(wildcard benchmarks examples)
# the oldest supported Triton and the newest
TRITONS := 3.6.0 3.9.0
FUZZ_CASES ?= 10000
FUZZ_SEED ?= $(shell date +%Y%m%d)
# the oldest supported diffusers, and what it needs beyond constraints.txt
OLD_DIFFUSERS := 0.36.0
OLD_NEEDS := httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 certifi==2026.10.18 idna==3.20 sniffio==1.3.1

# libraries that quantise Linears: beside the environment, because diffusers imports torchao, which takes seconds
QUANTISERS := torchao bitsandbytes gguf

.PHONY: help venv demo check test test-all test-most test-python test-settings test-kernels test-kernels-most \
	test-diffusers test-linear fuzz package lint style types format bench clean

help:
	@echo "make venv      the environment in $(VENV), with the versions of constraints.txt"
	@echo "make demo      one clip, dense and accelerated, and a table that compares them: outputs/demo.mp4"
	@echo "make check     style, types and the core tests, for each change (3 minutes on 2 cores)"
	@echo "make test      what a user needs to trust the package: more tests, and the kernels on Triton's interpreter,"
	@echo "               as machine code for GPUs that are not here, and executed as PTX (10 minutes)"
	@echo "make test-all  every test in every environment, which are: test-python, test-kernels (on the oldest Triton and"
	@echo "               the newest), test-diffusers (the families on the oldest diffusers), test-linear (with the"
	@echo "               libraries that quantise Linears)"
	@echo "make test-settings  make test's Python tests under other vector units, libraries and numbers of threads: for"
	@echo "               the night; writes docs/SETTINGS.md"
	@echo "make fuzz      10,000 random attention calls against float64 (20 minutes; FUZZ_SEED=7 for other ones): for the night"
	@echo "make package   builds wheel and sdist, installs each in a clean environment and uses it (minutes, downloads)"
	@echo "make lint      style and types (ruff, mypy); make format repairs the style"
	@echo "make bench     attention on the CPU against dense, correctness first"

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

# Three tiers, by the marks of the tests: no mark, @pytest.mark.full and @pytest.mark.slow. The kernels' tests have
# their own: those marked representative reach every kernel and precision.
check: lint
	@$(BIN)/python -m pytest -n $(JOBS) -m "not full and not slow"

test: test-most test-kernels-most

test-all: test-python test-kernels test-diffusers test-linear

test-most: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

# the tests under each setting of the CPU's arithmetic, half an hour; the page names the last run
test-settings: $(STAMP)
	@$(BIN)/python -m tests.settings --jobs $(JOBS) --write docs/SETTINGS.md

test-python: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS)

# Triton beside the environment, not in it: the other tests prove that everything works without
.venv-triton-%/.installed: $(STAMP)
	@echo "installing Triton $* in $(@D)"
	@$(PIP) install --no-deps --target $(@D) triton==$*
	@touch $@

# a process each for results on the interpreter, for machine code and for the execution of PTX: Triton reads
# TRITON_INTERPRET once
KERNELS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
RESULTS := tests/kernels/triton/interpreter
CODE := tests/kernels/triton/gate
EXECUTED := tests/kernels/triton/ptx
# what each run reached, for the table of docs/KERNELS.md
PROOFS := outputs/proofs

test-kernels: $(TRITONS:%=test-results-%) $(TRITONS:%=test-code-%) $(TRITONS:%=test-executed-most-%)

test-results-%: .venv-triton-%/.installed
	@echo "kernels on the interpreter of Triton $*"
	@PYTHONPATH=.venv-triton-$* TRITON_INTERPRET=1 $(KERNELS) --proof $(PROOFS) $(RESULTS)

test-code-%: .venv-triton-%/.installed
	@echo "machine code by Triton $*"
	@PYTHONPATH=.venv-triton-$* $(KERNELS) --proof $(PROOFS) $(CODE)

# all of them takes about 10 minutes for each Triton: for a change of a kernel, and for the night
test-executed-most-%: .venv-triton-%/.installed
	@echo "representative kernels executed as PTX of Triton $*"
	@PYTHONPATH=.venv-triton-$* $(KERNELS) --proof $(PROOFS) -m representative $(EXECUTED)

test-executed-%: .venv-triton-%/.installed
	@echo "kernels executed as PTX of Triton $*"
	@PYTHONPATH=.venv-triton-$* $(KERNELS) --proof $(PROOFS) $(EXECUTED)

test-kernels-most: .venv-triton-$(firstword $(TRITONS))/.installed
	@echo "kernels on the interpreter of Triton $(firstword $(TRITONS)), their machine code, and their PTX executed"
	@PYTHONPATH=$(<D) TRITON_INTERPRET=1 $(KERNELS) -m representative $(RESULTS)
	@PYTHONPATH=$(<D) $(KERNELS) -m representative $(CODE)
	@PYTHONPATH=$(<D) $(KERNELS) -m representative $(EXECUTED)

.venv-diffusers-%/.installed: $(STAMP)
	@echo "installing diffusers $* in $(@D)"
	@$(PIP) install --no-deps --target $(@D) diffusers==$* $(OLD_NEEDS)
	@touch $@

test-diffusers: .venv-diffusers-$(OLD_DIFFUSERS)/.installed
	@echo "families on diffusers $(OLD_DIFFUSERS)"
	@PYTHONPATH=.venv-diffusers-$(OLD_DIFFUSERS) $(BIN)/python -m pytest -n $(JOBS) tests/patchers

.venv-quantisers/.installed: $(STAMP)
	@echo "installing $(QUANTISERS) in $(@D)"
	@$(PIP) install --no-deps --target $(@D) -c constraints.txt $(QUANTISERS)
	@touch $@

test-linear: .venv-quantisers/.installed
	@echo "with $(QUANTISERS)"
	@PYTHONPATH=.venv-quantisers $(BIN)/python -m pytest -n $(JOBS) tests/linear tests/reliability/test_quantised_linears.py

# make test-all runs the first 500 cases of seed 0; the night takes others each time and prints its seed
fuzz: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.fuzz --cases $(FUZZ_CASES) --seed $(FUZZ_SEED)

# not in make test-all: it downloads every dependency into two clean environments
package: $(STAMP)
	@$(BIN)/python -m tests.reliability.package

lint: style types

style: $(STAMP)
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)

types: $(STAMP)
	@$(BIN)/mypy $(TYPED)

format: $(STAMP)
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.attention --device cpu

# make would delete them as intermediate files
.PRECIOUS: .venv-triton-%/.installed .venv-diffusers-%/.installed

clean:
	rm -rf build dist outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
