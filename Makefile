# Every target but gpu sets itself up: the first one makes .venv and installs the pinned development tools into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# As many processes as processors, of one thread each. JOBS=0 runs the tests in one process.
JOBS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help demo test matrix lint docs bench bench-compare gpu static wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is older than either file once the dependencies change, and then the installation is redone.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY) ## train a small network with SPConv and with nn.Conv2d, and compare them
	$(BIN)/python -m spconv_triton demo

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## the documentation, in docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going --quiet docs docs/_build/html

# Kernels are built either for a device or for Triton's interpreter, once per process, hence two runs.
test: lint docs ## lint, the documentation, the suite, and the kernel tests again in Triton's interpreter
	env -u TRITON_INTERPRET $(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

matrix: $(READY) ## the suite on other versions of Python, PyTorch, Triton and NumPy; FULL=1 runs all of it
	$(BIN)/nox $(if $(FULL),-- full)

bench: $(READY) ## compare SPConv2d with its peers and write benchmarks/REPORT.md; FULL=1 takes 20 to 40 minutes, not 5
	$(BIN)/python -m benchmarks.comparison --mode $(if $(FULL),full,quick)

bench-compare: $(READY) ## time the library against revision BASE, and fail where it is slower by more than noise; LARGE=1: batches of 64
	$(BIN)/python -m benchmarks.comparison.compare $(if $(LARGE),--large) $(or $(BASE),$(error say which revision: make bench-compare BASE=REV))

# Installs nothing: it is for machines with a GPU, a PyTorch of their own and maybe no network.
gpu: ## check and time the kernels on a GPU, without installing anything; DRY=1 rehearses on a CPU
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(if $(DRY),--dry)

static: $(READY) ## compile every kernel that has changed for every GPU, and save what came out
	$(BIN)/python -m benchmarks.static

wheel: $(READY) ## build dist/*.whl and dist/*.tar.gz
	$(BIN)/python -m build

clean: ## remove build products and caches; keeps .venv
	rm -rf build dist docs/_build docs/_tables *.egg-info .benchmarks .mypy_cache .nox .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
