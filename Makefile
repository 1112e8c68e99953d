# Two commands: `make demo` shows a search, `make test` runs the tests. Both make .venv first.
# `make test-all` adds the slow tests: clusters, browsers, object storage, training, faults.
# `make benchmarks` takes hours or a quiet machine (tests/benchmarks).
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
INPUTS := pyproject.toml setup.py constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

.PHONY: demo test test-slow test-all lint benchmarks clean

demo: $(VENV)/.installed
	$(BIN)/vitpareto demo

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

test-all: test test-slow

# mypy reads the folders under their import name
lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typing/vitpareto
	ln -sfn $(addprefix $(CURDIR)/,methods search clusters dashboards $(wildcard vitpareto/*.py)) build/typing/vitpareto/
	$(BIN)/mypy

benchmarks: $(VENV)/.installed-test
	$(BIN)/python tests/benchmarks/verify_methods.py
	$(BIN)/python tests/benchmarks/speed.py
	$(BIN)/python tests/benchmarks/log_size.py
	$(BIN)/python tests/benchmarks/sweep_timm.py
	$(BIN)/python -m tests.benchmarks.racing --pool racing.npz
	$(BIN)/python -m tests.benchmarks.efficiency --pool efficiency.npz
	$(BIN)/python tests/benchmarks/overhead.py
	$(BIN)/python -m tests.benchmarks.faults

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "vitpareto needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(INPUTS)
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
