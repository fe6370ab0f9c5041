# Every target makes .venv by itself and reuses it until pyproject.toml changes.
PYTHON ?= python3.11
BIN := .venv/bin
PARTS := counterpoise tests examples benchmarks docs tools setup.py build_backend.py

.PHONY: demo test test-slow bench lint format docs cuda-check wheel clean
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	COUNTERPOISE_BUILD=0 $(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	touch $@

# Compiled kernels, where there is a C++ compiler; without one this says so and everything runs on plain PyTorch.
.venv/.kernels: .venv/.installed setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: .venv/.kernels ## the main job on an embedded data set, ending in a report
	$(BIN)/counterpoise-train

test: .venv/.kernels ## types, layers, tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

test-slow: .venv/.kernels ## the suites that take minutes: wheel in a fresh environment, several ranks, launched runs
	$(BIN)/python -m pytest -m slow
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -m hypothesis

bench: .venv/.kernels ## interleaved timings against torch, torchvision, timm's form and lightly, as ratios
	$(BIN)/python -m benchmarks.kernels
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

cuda-check: .venv/.installed ## compiles the CUDA kernels for sm_80 and sm_90: no warning, no spill; needs nvcc, no GPU
	$(BIN)/python -m tools.check_cuda

wheel: .venv/.kernels ## a wheel with CPU kernels into dist/, audited
	$(BIN)/python -m tools.build_wheel

clean:
	rm -rf .venv site build dist *.egg-info counterpoise/kernels/*.so .mypy_cache .ruff_cache .pytest_cache
