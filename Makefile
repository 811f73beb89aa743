# make run    build, validate and measure the embedded model for all three targets
# make test   run the whole test suite
# make check  formatting, lint, floors and types
# make lower  the whole test suite on the lowest versions that setup.cfg allows
# make soak   what takes long: signals, random graphs, odd inputs, mutants (some hours on two cores)
#
# Each installs what it needs into .venv (lower: .venv-lower) when that is missing or out of date.

PYTHON ?= python3
# Another Python has an environment of its own: make test PYTHON=python3.13
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

LOWER := .venv-lower
LOWER_INSTALLED := $(LOWER)/.installed

.PHONY: run test check lower soak install clean
.DEFAULT_GOAL := run

run: $(INSTALLED)
	$(BIN)/python -m pipeline run pipeline.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Old versions warn of what later ones of others took away: that is no fault of what is tested here.
lower: $(LOWER_INSTALLED)
	$(LOWER)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -W ignore::FutureWarning -W ignore::DeprecationWarning

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak
	$(BIN)/python scripts/kill_and_continue.py --kills 20
	$(BIN)/python scripts/kill_training.py --kills 30
	$(BIN)/python scripts/kill_training.py --kills 30 --processes 2
	$(BIN)/python scripts/fleet.py
	$(BIN)/python scripts/random_graphs.py --graphs 1000
	$(BIN)/python scripts/attack.py --count 10000 --commands 200
	$(BIN)/python scripts/mutants.py

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(LOWER_INSTALLED): setup.cfg pyproject.toml scripts/lower.py
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/python scripts/lower.py > $(LOWER)/lowest.txt
	$(LOWER)/bin/python -m pip install --quiet --constraint $(LOWER)/lowest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWER) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
