# The commands of the README. Each one prepares what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_THREADS ?= 1

.PHONY: demo test lint bench clean

# Made again when the dependencies change. pip alone; with uv: uv venv && uv pip install -e ".[dev]" -c constraints.txt
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/flow-pl fit --config configs/digits/flow.yaml
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/flow-pl test --config configs/digits/flow.yaml --ckpt_path runs/digits/flow/checkpoints/best.ckpt

test: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) runs bench.json
