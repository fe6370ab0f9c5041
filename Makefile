# Every target makes .venv by itself and reuses it until pyproject.toml changes.
PYTHON ?= python3.11
BIN := .venv/bin
PARTS := counterpoise tests examples benchmarks docs

.PHONY: demo test test-slow bench lint format docs clean
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	touch $@

demo: .venv/.installed ## the main job on an embedded data set, ending in a report
	$(BIN)/counterpoise-train

test: .venv/.installed ## types, layers, tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

test-slow: .venv/.installed ## the suites that take minutes: wheel in a fresh environment, several ranks, launched runs
	$(BIN)/python -m pytest -m slow

bench: .venv/.installed ## interleaved timings against torch and torchvision, as ratios
	$(BIN)/python -m benchmarks

lint: .venv/.installed
	$(BIN)/ruff check $(PARTS)
	$(BIN)/ruff format --check $(PARTS)

format: .venv/.installed
	$(BIN)/ruff check --fix $(PARTS)
	$(BIN)/ruff format $(PARTS)

docs: .venv/.installed ## HTML into site/
	$(BIN)/python -m pip install --quiet '.[docs]'
	$(BIN)/python -m sphinx -W -b html docs site

clean:
	rm -rf .venv site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
