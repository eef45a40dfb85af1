# make demo and make test do all their own set-up: they need Python 3.10 or newer with pip, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check pytest coverage clean

demo: $(VENV)/.demo
	$(BIN)/nadhooks demo

test: check pytest

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# hours: every model of timm and torchvision that the ledger does not hold at the installed versions
coverage: $(VENV)/.test
	$(BIN)/python -m nadhooks.zoo check --all --report docs/coverage.csv
	$(BIN)/python -m nadhooks.zoo page docs/coverage.csv > docs/coverage.md

$(VENV)/.demo: EXTRAS :=
$(VENV)/.test: EXTRAS := [test]
$(VENV)/.demo $(VENV)/.test: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info
