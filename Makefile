# `make demo` runs the main job, `make test` every check. Both make .venv/ on first use and reuse it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-slow test-all test-chaos chaos check docs gpu clean

demo: .venv/ready
	$(BIN)/graft run examples/digits.yaml

# A process of tests a core; all tests of a file are run by one, and files in the order of tests/conftest.py.
SIDE_BY_SIDE := -n logical --dist loadfile --no-loadscope-reorder

test: check test-fast

test-fast: .venv/ready
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not slow and not chaos"

test-slow: .venv/ready
	$(BIN)/pytest $(SIDE_BY_SIDE) -m slow

# Both in one go, so that no core waits for the last slow test before the fast ones begin.
test-all: .venv/ready .venv/kernels
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not chaos"

test-chaos: .venv/ready
	$(BIN)/pytest -m chaos -s

# Kill a job's processes at random, KILLS times; a SEED repeats the same choices.
chaos: .venv/ready
	GRAFT_CHAOS_KILLS=$(or $(KILLS),10) $(if $(SEED),GRAFT_CHAOS_SEED=$(SEED)) $(BIN)/pytest -m chaos -s

# On a machine with a GPU, in minutes: kernels against their definitions, then DiT-XL/2 against the public way. It needs
# torch in the Python that runs it, and none of the environment below.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m benchmarks.gpu --json gpu.json

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs

docs: .venv/ready
	$(BIN)/mkdocs build --strict --quiet

# One environment for everything, with the exact versions that were tested.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The fused scan of Mamba-2 is Triton alone: without its package's CUDA extensions it installs anywhere, in seconds.
.venv/kernels: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt wheel packaging ninja
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/pip install --quiet --constraint constraints.txt \
		--no-build-isolation --no-deps mamba-ssm
	touch $@

# Another environment, for GPUs: an older torch, for which there is a wheel of causal-conv1d, and the scan as above.
.venv-gpu/ready: pyproject.toml constraints-gpu.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --upgrade pip
	.venv-gpu/bin/pip install --quiet --constraint constraints-gpu.txt --editable '.[dev]' wheel packaging ninja
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv-gpu/bin/pip install --quiet \
		--constraint constraints-gpu.txt --no-build-isolation --no-deps mamba-ssm
	.venv-gpu/bin/pip install --quiet --constraint constraints-gpu.txt --no-build-isolation --no-deps causal-conv1d
	touch $@

clean:
	rm -rf .venv .venv-gpu .graftwork
