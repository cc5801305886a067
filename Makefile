# The commands of this project. `make demo` goes the whole way on real footage, `make test` passes the tests.

PYTHON ?= python3.11
# What pip installs where torch is missing. A machine without a GPU saves 5 GB with
#   make demo TORCH="torch==2.14.1 torchvision==0.29.1 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.14.1 torchvision==0.29.1

# An active virtual environment is used as it is; otherwise .venv is made, on top of an installed torch if there is one.
VENV   := $(or $(VIRTUAL_ENV),.venv)
BIN    := $(VENV)/bin
READY  := $(VENV)/.talking-heads-ready
DEMO   := data/demo
export OMP_NUM_THREADS ?= $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-slow test-gpu bench demo demo-footage clean

help:          ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(READY) ## make the virtual environment and install the project into it
$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv \
	  $$($(PYTHON) -c "import torch, torchvision" 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c "import torch, torchvision" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e '.[dlib,lite,dev]'
	touch $@

lint: $(READY) ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(READY) demo-footage ## the tests
	$(BIN)/pytest -q

test-slow: $(READY) demo-footage ## the tests that take longer than the suite allows
	$(BIN)/pytest -q -m slow

test-gpu: $(READY) ## the tests that need CUDA
	$(BIN)/pytest -q -m gpu
