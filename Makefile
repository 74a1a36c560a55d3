# Each target sets up what it needs. To try another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
WORKERS ?= 2

.PHONY: demo test lint bench bench-quick clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(BIN)/actdb demo

test: $(INSTALLED)
	@$(BIN)/python -m pytest -n $(WORKERS)

bench: $(PEERS)
	@$(BIN)/python -m benchmarks

bench-quick: $(PEERS)
	@$(BIN)/python -m benchmarks --size quick --out out/benchmarks

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --no-error-summary

# Changes of code need no new installation: it is editable.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "actdb needs Python 3.11 or newer: make PYTHON=python3.x")'
	@echo "installing actdb into $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[analyses,cpu,dev]"
	@touch $@

$(PEERS): $(INSTALLED)
	@echo "installing the benchmarks' peers into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[analyses,bench,cpu,dev]"
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
