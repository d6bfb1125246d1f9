# Two commands: `make quickstart` trains and shows a recommender on the embedded sample, `make test` runs the suite.

PYTHON ?= python3
# On Linux without a GPU a smaller build of torch will do: make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := .venv/bin

export HF_HUB_OFFLINE ?= 1
# Threads that wait sleep, so that they do not take the processor from the others on a machine that does other work too.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test test-slow lint format clean

quickstart: .venv/.train
	$(BIN)/python training/pretrain.py --config sample --overwrite
	$(BIN)/python training/finetune.py --config sample --overwrite
	$(BIN)/python training/predict.py --config sample --overwrite

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache

.venv/.train: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	touch $@

.venv/.dev: .venv/.train
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
