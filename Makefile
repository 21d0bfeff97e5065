.PHONY: demo test lint
PYTHON ?= python3
BIN := .venv/bin
# Installed first and pinned, so that the CPU wheel is taken where there is one and nothing pulls another build.
TORCH := torch==2.13.0

demo: .venv/demo
	$(BIN)/spf demo --output demo-output

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
