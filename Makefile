# Two commands: `make quickstart` trains and shows a recommender on the embedded sample, `make test` runs the suite.

PYTHON ?= python3
# On Linux without a GPU a smaller build of torch will do: make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := .venv/bin

export HF_HUB_OFFLINE ?= 1
# Threads that wait sleep, so that they do not take the processor from the others on a machine that does other work too.
export OMP_WAIT_POLICY ?= PASSIVE

# The folder that `make space` shows.
MODEL ?= runs/sample/model

.PHONY: quickstart space test test-slow bench lint format clean

quickstart: .venv/.train
	$(BIN)/python training/pretrain.py --config sample --overwrite
	$(BIN)/python training/finetune.py --config sample --overwrite
	$(BIN)/python training/predict.py --config sample --overwrite

space: .venv/.space
	@test -f $(MODEL)/config.json || { echo "There is no model in $(MODEL): run make quickstart first, or name another folder: make space MODEL=…" >&2; exit 2; }
	CLLM4REC_MODEL=$(MODEL) $(BIN)/python space/app.py

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-slow: .venv/.dev .venv/.browser
	$(BIN)/python -m pytest -m slow

# Ratios against the published recipe, the limit of the backbone and a small catalogue, in their short forms.
bench: .venv/.bench
	$(BIN)/python benchmarks/all.py

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

.venv/.bench: .venv/.train
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

.venv/.space: .venv/.train
	$(BIN)/python -m pip install --quiet --editable ".[space]"
	touch $@

# Debian's Chromium is installed where there is none, if this is root on a system with apt; elsewhere the tests say how to.
.venv/.browser: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable ".[browser]"
	command -v chromium >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null \
		|| { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
		|| echo "Chromium could not be installed, so the tests of the demo's page will be skipped."
	! command -v chromium >/dev/null || touch $@
