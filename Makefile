# `make bench` and `make test` set up everything they need in .venv, from a fresh clone on.
#
#   make bench          measure LSTMs and GAN blocks against PyTorch and ONNX Runtime; writes out/benchmark.{json,html}
#   make test           build, run the tests
#   make test-slow      the long sweeps: sanitizers, every configuration, mutants
#   make gpu            on a machine with an NVIDIA GPU: build, tests, sanitizers, benchmarks, tuning; in stages, resumable
#   make example        the examples: forecasts with LSTMs, digits with a DCGAN
#   make lint           ruff and mypy
#   make check-torch    import, opcheck and parity on the oldest supported torch, in a virtual environment of its own

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
OUT ?= out
WORKERS ?= 2

PY := $(abspath $(VENV))/bin/python
READY := $(VENV)/.ready

.PHONY: help bench bench-full test test-slow gpu example lint format check-torch build clean

help:
	@sed -n 's/^#   make/make/p' Makefile

bench: build
	$(PY) -m benchmarks --quick --json $(OUT)/benchmark.json --html $(OUT)/benchmark.html

bench-full: build
	$(PY) -m benchmarks --full --json $(OUT)/benchmark.json --html $(OUT)/benchmark.html

test: build
	$(PY) -m pytest -n $(WORKERS) -m "not slow"

test-slow: build
	$(PY) -m pytest -n $(WORKERS) -m slow

gpu:
	sh tools/gpu.sh $(OUT)/gpu

example: build
	$(PY) examples/forecast.py --plot $(OUT)/forecast.png
	$(PY) examples/dcgan.py --out $(OUT)/dcgan --overwrite

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Leaves a library in the tree that was made with that torch; every torch since can load it.
check-torch:
	$(MAKE) build VENV=$(VENV)-torch211 TORCH=torch==2.11.0
	$(abspath $(VENV)-torch211)/bin/python -m pytest -n $(WORKERS) -m "not slow" -k "not triton and not cuda" \
		tests/ops tests/nn tests/test_transforms.py

# The compiled library follows its sources; nothing is compiled when they are unchanged.
build: $(READY)
	$(PY) setup.py -q build_ext --inplace

# Constraints keep pip from replacing this torch by another build of it.
$(READY): pyproject.toml Makefile
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	echo "$(TORCH)" > $(VENV)/constraints.txt
	$(PY) -m pip install -q "$(TORCH)" numpy "setuptools>=77" wheel
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install -q "$(TRITON)"
	$(PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[test,bench,dev,examples]"
	touch $@

clean:
	rm -rf build $(OUT) python/fuseblock/*.so python/fuseblock/_build.json
