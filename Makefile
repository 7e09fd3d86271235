# `make demo` and `make test` do all the set-up they need. `make check` and `make test` are what CI runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# One torch thread per process: two of them on two cores fight (docs/performance.md).
export OMP_NUM_THREADS := 1

.PHONY: demo test test-gpu check fix proto clean

demo: $(VENV)/.runtime
	$(BIN)/baton demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q --durations=10

# What uses a GPU, where there is one or two, in as many processes as there are cores. Sets itself up as `test` does, unless
# told where a Python with all packages is: `make test-gpu BIN=/usr/bin` takes /usr/bin/python3 and installs nothing.
test-gpu: $(if $(filter $(VENV)/bin,$(BIN)),$(VENV)/.dev)
	$(BIN)/python3 -m tests.gpu_suite

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHON=$(abspath $(BIN))/python proto/generate.sh --check

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.dev
	PYTHON=$(abspath $(BIN))/python proto/generate.sh

PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check

$(VENV)/.runtime: requirements.lock requirements-torch.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --require-hashes --no-deps -r requirements.lock
	$(PIP_INSTALL) -r requirements-torch.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.lock
	$(PIP_INSTALL) --require-hashes --no-deps -r requirements-dev.lock
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
