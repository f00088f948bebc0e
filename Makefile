# Each target does its own set-up: a virtual environment in .venv with what it needs. A stamp makes the next call quick.
#   make demo [ARGS="--seeds 5"]   the real trainer on the embedded digits; a second call continues, or says it is finished
#   make test [ARGS="-k name"]     ruff, mypy, pytest
#   make test-faults               what faults do: kill -9 a hundred times, full disks, damaged files (about half an hour)
#   make bench [ARGS="-k steps"]   pytest benchmarks/ --benchmark; records in runs/benchmarks
#   make overhead                  draws benchmarks/history.jsonl: DAD's overhead over plain KD, over commits
#   make csrc                      builds csrc/ into a bare checkout, without installing (needs cmake and apache-tvm-ffi)
# PYTHON=python3.12 names the interpreter for .venv; ARGS is handed on.

PYTHON ?= python3
ARGS ?=
BUILD_FILES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: help demo test test-faults lint bench overhead csrc
help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/demo.stamp
	.venv/bin/dad-fast train --preset demo -o runs/demo --resume auto $(ARGS)

test: lint
	.venv/bin/python -m pytest -n 2 --timeout 300 $(ARGS)

test-faults: .venv/dev.stamp
	.venv/bin/python -m pytest tests/faults --fault-cycles 100 --fault-record runs/faults.json --timeout 3600 -v $(ARGS)

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: .venv/dev.stamp
	.venv/bin/python -m pytest benchmarks/ --benchmark $(ARGS)

overhead: .venv/dev.stamp
	.venv/bin/python -m benchmarks.overhead $(ARGS)

csrc:
	cmake -S . -B build/csrc -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/csrc
	cmake --install build/csrc --prefix .

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "dad-fast needs Python 3.11 or newer, which $(PYTHON) is not; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/demo.stamp: .venv/python.stamp $(BUILD_FILES)
	@echo "Installing into .venv; the first time this downloads torch (about 3 GB with its CUDA libraries)"
	.venv/bin/python -m pip install -e '.[demo]'
	@touch $@

# Holds everything that the demo needs, too.
.venv/dev.stamp: .venv/python.stamp $(BUILD_FILES)
	@echo "Installing into .venv; the first time this downloads torch (about 3 GB with its CUDA libraries)"
	.venv/bin/python -m pip install -e '.[dev]'
	@touch .venv/demo.stamp $@
