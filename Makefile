# make setup   create .venv with everything (the other targets do it for you)
# make test    run the tests
# make demo    render a video on the model that ships, dense and with a feature cache
# make lint    ruff and mypy
# make clean   remove the environment, caches, builds and demo/
#
# Choose another interpreter or torch build:
#   make setup PYTHON=python3.12
#   make setup TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"   (small, no CUDA libraries)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Only used where torch brings no triton of its own (CPU builds); the kernels are then tested by its interpreter.
TRITON ?= triton==3.6.0
EXTRAS ?= triton,dev
PROMPT ?= a red circle moving right on a gray background
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Nothing that runs here may reach for the network: the model is in the package.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup test demo lint format clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: no interpreter called '$(PYTHON)'. Install Python 3.10 or newer, or pass PYTHON=/path/to/python3." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but 3.10 or newer is needed. Pass PYTHON=/path/to/python3." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "make: $(PYTHON) cannot create environments. On Debian and Ubuntu: apt install python3-venv." >&2; exit 2; }
	$(PIP) install --quiet $(TORCH) --constraint constraints.txt
	@if [ "$$(uname -s)" = Linux ] && ! $(PIP) show --quiet triton >/dev/null 2>&1; then \
		echo "$(PIP) install --quiet $(TRITON)"; $(PIP) install --quiet $(TRITON); fi
	$(PIP) install --quiet --editable ".[$(EXTRAS)]" --constraint constraints.txt
	@touch $@

# A worker for each core, with one thread each; a file stays with one worker, which shares what its tests prepare.
test: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

demo: $(STAMP)
	@mkdir -p demo
	$(OFFLINE) $(BIN)/dit-accel render "$(PROMPT)" -o demo/red_circle.mp4 --cache snr_gap --steps 50 --compare --seed 7 --force
	@echo "The video, the comparison and the settings are in $(CURDIR)/demo:"
	@ls -l demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build dist htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +
