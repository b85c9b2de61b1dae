# Two commands for newcomers: `make quickstart` and `make test`. `make help` lists the rest.

PYTHON  ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# DeepSpeed compiles nothing while it is installed; tests and runs need no compiled operator.
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# torch comes first and from the range that pyproject.toml names, so that a build chosen here (for
# example PyTorch's CPU wheels) is kept by what is installed after it.
TORCH := $(shell sed -n 's/^ *"\(torch[<>=0-9.,]*\)",$$/\1/p' pyproject.toml)

# The kernels' tests run in Triton's interpreter. Builds of torch for GPUs bring the Triton that fits
# them, so it is no requirement of the package, and is installed here where there is none.
TRITON := triton>=3.6,<3.7

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-long lint format clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and f"TreePO needs Python 3.11 or 3.12, this is {sys.version.split()[0]}: run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# The stamp is newer than pyproject.toml once everything is installed, so that installing happens
# once, and again when the requirements change.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(PIP_ARGS) '$(TRITON)'
	@touch $@

install: $(STAMP)  ## Make the virtual environment (.venv) and install everything

quickstart: $(STAMP)  ## Train a tiny model to add numbers: a real run on the CPU, some minutes
	$(BIN)/python -m treepo.train +experiment=quickstart $(ARGS)

test: $(STAMP)  ## Run the tests (some minutes)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-long: $(STAMP)  ## Run the long tests: learning, chaos, fuzz (half an hour and more)
	$(BIN)/python -m pytest -m long --timeout 1800 -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Put all files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment, caches and builds (never outputs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
