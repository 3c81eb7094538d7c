# make demo: everything, from a bare clone to a trained and used model.   make test: lint, types, tests.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
export PROMPT
define PROMPT
class Reader:
    def __init__(self, path):
endef

.PHONY: help env demo test lint types tests long format bench clean

help:
	@echo "make demo   train a small model on 4 local ranks, export it, check it, let it write, serve it"
	@echo "make test   lint, types and tests"
	@echo "make long   the tests that take their time, and both fault suites"
	@echo "make bench  every benchmark, with the ratios it prints"
	@echo "make env    only the environment, into .venv"

env: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=...'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: env
	rm -rf $(DEMO)
	$(BIN)/python -m launch train tiny --layout.pp 2 --layout.dp 2 --batch.microbatches 4 --out $(DEMO)
	$(BIN)/python -m launch export $(DEMO) $(DEMO)/model
	$(BIN)/python examples/same_logits.py $(DEMO)/model
	$(BIN)/python -m launch generate $(DEMO)/model --layout.tp 2 --max-tokens 96 --prompt "$$PROMPT"
	$(BIN)/python -m launch generate $(DEMO)/model --layout.tp 2 --layout.pp 2 --max-tokens 48 --prompts examples/prompts.txt
	$(BIN)/python examples/talk_to_server.py $(DEMO)/model "import "
	$(BIN)/python examples/plot_loss.py $(DEMO)

test: lint types tests

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: env
	$(BIN)/basedpyright

tests: env
	$(BIN)/python -m pytest

long: env
	$(BIN)/python -m pytest -m long
	$(BIN)/python tests/faults.py
	$(BIN)/python tests/serve_faults.py

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env
	$(BIN)/python benchmarks/all.py

clean:
	rm -rf .venv runs
