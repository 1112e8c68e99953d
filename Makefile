# Two commands: `make demo` shows a search, `make test` runs the suite. Both make .venv first.
# `make slow`: what takes hours or a quiet machine (tests/benchmarks), by hand.
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
INPUTS := pyproject.toml setup.py constraints.txt

.PHONY: demo test lint slow clean

demo: $(VENV)/.installed
	$(BIN)/vitpareto demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typing/vitpareto
	ln -sfn $(CURDIR)/methods $(CURDIR)/search $(CURDIR)/clusters $(CURDIR)/dashboards $(CURDIR)/vitpareto/*.py build/typing/vitpareto/
	$(BIN)/mypy

slow: $(VENV)/.installed-test
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
