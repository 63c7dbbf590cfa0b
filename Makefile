# The commands of the README. Each one prepares what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_THREADS ?= 1
TEST_PROCESSES ?= 2
PEERS ?= pfl flwr fedjax blazefl fluke
BLAZEFL_PYTHON ?= python3.13
# the tests start many processes: each would compile the sources anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-extended test-deploy test-lowest lint docs bench bench-scale bench-peers fuzz chaos soak clean

# Made again when the dependencies change. pip alone; with uv: uv venv && uv pip install -e ".[dev]" -c constraints.txt
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/flow-pl fit -c task/digits -c tuned/digits/flow
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/flow-pl test -c task/digits -c tuned/digits/flow

# the quick suite: some minutes
test: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not slow and not deploy"

# the rest: whole runs, several processes, servers, some pairs of task and method
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "slow and not deploy and not extended"

# what the slow suite leaves out: the other pairs of task and method, and more variants of long tests
test-extended: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) -m extended

# a Flower network on this machine: some minutes
test-deploy: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m pytest -m deploy

# the quick suite with the lowest version of every package that pyproject.toml allows, in an environment of its own
test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) .venv-lowest/bin/python -m pytest -n $(TEST_PROCESSES) -m "not slow and not deploy"

# uv, as pip cannot look for the lowest versions
.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site of the documentation, in site/; nothing is fetched, and a warning is an error
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/installed
	$(BIN)/python -m tools.benchmarks

bench-scale: $(VENV)/installed
	$(BIN)/python -m tools.benchmarks --scale

# The other simulators, which `make bench` then finds. Each in an environment of its own, so that none changes the
# versions of what another one or this project depends on. The versions that were measured, BlazeFL on Python 3.13 and on
# free-threaded 3.14 (BLAZEFL_PYTHON=python3.14t), the others on 3.11.
bench-peers: $(PEERS:%=.venv-peers/%/installed)

.venv-peers/pfl/installed: PACKAGES = torch==2.13.0 pfl==0.6.0
.venv-peers/flwr/installed: PACKAGES = torch==2.13.0 "flwr[simulation]==1.41.0"
.venv-peers/fedjax/installed: PACKAGES = fedjax==0.0.17 jax==0.10.2
# BlazeFL 3 needs Python 3.14, BlazeFL 2 needs 3.12; both need NumPy and tqdm, which they do not ask for
.venv-peers/blazefl/installed: PACKAGES = torch==2.13.0 numpy tqdm \
	"blazefl==3.0.0; python_version >= '3.14'" "blazefl==2.0.1; python_version < '3.14'"
.venv-peers/blazefl/installed: PYTHON = $(BLAZEFL_PYTHON)
.venv-peers/fluke/installed: PACKAGES = torch==2.13.0 fluke-fl==0.8.1
.venv-peers/%/installed:
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check $(PACKAGES)
	touch $@

# thousands of damaged files for every reader
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m tools.fuzz --cases 3000

# Kills runs and resumes them; minutes to an hour.
chaos: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m tools.chaos

# 2,000 rounds: memory, open files, size of the logs.
soak: $(VENV)/installed
	OMP_NUM_THREADS=$(TORCH_THREADS) $(BIN)/python -m tools.chaos.soak

clean:
	rm -rf $(VENV) .venv-lowest .venv-peers runs bench.json site
