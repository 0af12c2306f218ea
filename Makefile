# Each target does its own set-up in .venv, once; a second run starts at once.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLIENTS := $(VENV)/clients/.ready

export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Whatever is set: each server that the tests start would compile all of it anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: serve test check bench bench-gpu soak clean

serve: $(READY)  ## the embedded demo on http://127.0.0.1:8000 (PORT= changes it)
	$(BIN)/adapter-server demo --port $(PORT)

test: $(READY)  ## every test but the long runs
	$(BIN)/python -m pytest -m "not soak" -q -n 2 --dist loadfile --no-loadscope-reorder

soak: $(READY) $(CLIENTS)  ## the long runs
	$(BIN)/python -m pytest -m soak -q

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check server tests examples benchmarks
	$(BIN)/ruff format --check server tests examples benchmarks
	$(BIN)/mypy

bench: $(READY)  ## a selection of about five minutes, into benchmarks/results, and the tables that show it
	$(BIN)/adapter-server bench latency --size demo --out benchmarks/results
	$(BIN)/adapter-server bench memory --size 35m --out benchmarks/results
	$(BIN)/adapter-server bench popularity --size 35m --rounds 2 --out benchmarks/results
	$(BIN)/adapter-server bench prefill --size 35m --rounds 2 --out benchmarks/results
	$(BIN)/adapter-server bench fairness --size 35m --rounds 1 --out benchmarks/results
	$(BIN)/adapter-server bench trace --size 35m --rounds 1 --out benchmarks/results
	$(BIN)/adapter-server bench hotload --size 35m --out benchmarks/results
	$(BIN)/python benchmarks/rivals.py --size 35m --rounds 2 --out benchmarks/results
	$(BIN)/python benchmarks/table.py

bench-gpu: $(READY)  ## everything on a CUDA device in under ten minutes, one JSON; refused where there is none
	$(BIN)/python benchmarks/gpu.py --out benchmarks/results

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(CLIENTS): $(READY) tests/clients/outside.txt
	$(BIN)/python -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install -q -r tests/clients/outside.txt
	touch $@
