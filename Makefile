# Each target does its own set-up: a virtual environment in .venv. A stamp makes the next call quick.
#   make demo [ARGS="--seeds 5"]   train on the embedded digits; a second call resumes the run
#   make test [ARGS="-k name"]     ruff, mypy and pytest, with a table of skips; fails on a reason
#                                  for a skip that is not in tests/allowed_skips.toml
#   make test-versions             run the tests with the oldest and the newest releases that
#                                  pyproject.toml allows (slow)
#   make test-pretended-gpu        capture presets at real size on a pretended GPU: torch's CUDA
#                                  build without a device (needs g++; several minutes)
#   make test-faults               test faults: kill -9 a hundred times, full disks, damaged files
#                                  (about half an hour)
#   make bench [ARGS="-k steps"]   pytest benchmarks/ --benchmark; records in runs/benchmarks
#   make overhead                  plot benchmarks/history.jsonl: DAD's overhead over KD by commit
#   make constraints               update constraints.txt to the newest releases that
#                                  pyproject.toml allows
#   make wheel                     build dist/*.whl, check it with twine, install it into a fresh
#                                  environment and train the demo for a few steps (downloads torch)
#   make csrc                      build csrc/ in a bare checkout, without installing (needs cmake
#                                  and apache-tvm-ffi)
# PYTHON=python3.12 names the interpreter for .venv; ARGS is passed on.
#
# constraints.txt pins the tested releases on every platform. `make demo` and `make test` install
# them, so that every machine runs what was tested. If the package index lacks one of them, they
# install from the ranges in pyproject.toml and print a line about it. pip reads the pins from
# PIP_CONSTRAINT, which (unlike -c) also applies to the build of our own package; pip 25.3 and newer
# take those from PIP_BUILD_CONSTRAINT.

PYTHON ?= python3
ARGS ?=
BUILD_FILES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)
PYTEST := -m pytest -n 2 --dist worksteal --timeout 1200 --check-skips
CONSTRAINED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
MISSING_PIN := No matching distribution found|ResolutionImpossible

# $(call install,EXTRAS): pip's log distinguishes a missing release from a failed build, which fails
# the target.
define install
	@echo "Installing into .venv; the first time this downloads torch (about 3 GB with its CUDA libraries)"
	@rm -f .venv/pip.log
	@$(CONSTRAINED) .venv/bin/python -m pip install --log .venv/pip.log -e '.[$(1)]' || { \
	  grep -qE '$(MISSING_PIN)' .venv/pip.log || exit 1; \
	  echo "constraints.txt pins releases that this package index lacks: installing from the ranges in pyproject.toml instead, untested" >&2; \
	  .venv/bin/python -m pip install -e '.[$(1)]'; }
endef

.PHONY: help demo test test-versions test-pretended-gpu test-faults lint bench overhead constraints wheel csrc
help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/demo.stamp
	.venv/bin/dad-fast train --preset demo -o runs/demo --resume auto $(ARGS)

test: lint
	.venv/bin/python $(PYTEST) $(ARGS)

test-versions: .venv-oldest/dev.stamp .venv-newest/dev.stamp
	@for venv in .venv-oldest .venv-newest; do \
	  echo "== $$venv: $$($$venv/bin/python -c 'import numpy, torch; print("torch", torch.__version__, "numpy", numpy.__version__)')"; \
	  $$venv/bin/python $(PYTEST) $(ARGS) || failed=1; \
	done; exit $${failed:-0}

test-pretended-gpu: .venv/dev.stamp
	.venv/bin/python -m pytest tests/pretended_gpu -m pretended_gpu --check-skips -v $(ARGS)

test-faults: .venv/dev.stamp
	.venv/bin/python -m pytest tests/faults --fault-cycles 100 --fault-record runs/faults.json --timeout 3600 -v $(ARGS)

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/dev.stamp
	.venv/bin/python -m pytest benchmarks/ --benchmark $(ARGS)

overhead: .venv/dev.stamp
	.venv/bin/python -m benchmarks.overhead $(ARGS)

constraints: .venv/uv.stamp
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], "cmake", "ninja", sep="\n")' \
	  | .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --prerelease disallow --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command "make constraints" --extra dev pyproject.toml - -o constraints.txt

wheel: .venv/wheel.stamp
	rm -rf dist build/wheel
	$(CONSTRAINED) .venv/bin/python -m build --wheel --outdir dist
	.venv/bin/python -m twine check --strict dist/*.whl
	$(PYTHON) -m venv build/wheel/venv
	$(CONSTRAINED) build/wheel/venv/bin/python -m pip install "$$(echo dist/*.whl)[demo]"
	build/wheel/venv/bin/dad-fast doctor
	build/wheel/venv/bin/dad-fast train --preset demo --set variants={} --method dad --max-steps 5 -o build/wheel/run
	@echo "dist/: $$(cd dist && echo *.whl) is sound"

csrc:
	cmake -S . -B build/csrc -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/csrc
	cmake --install build/csrc --prefix .

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "dad-fast needs Python 3.11 or newer, which $(PYTHON) is not; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/demo.stamp: .venv/python.stamp $(BUILD_FILES) constraints.txt
	$(call install,demo)
	@touch $@

# Includes everything that the demo needs.
.venv/dev.stamp: .venv/python.stamp $(BUILD_FILES) constraints.txt
	$(call install,dev)
	@touch .venv/demo.stamp $@

.venv/uv.stamp: .venv/python.stamp
	.venv/bin/python -m pip install uv
	@touch $@

.venv/wheel.stamp: .venv/python.stamp
	.venv/bin/python -m pip install build twine
	@touch $@

.venv-oldest/dev.stamp: RESOLUTION := lowest-direct
.venv-newest/dev.stamp: RESOLUTION := highest
.venv-oldest/dev.stamp .venv-newest/dev.stamp: .venv/uv.stamp $(BUILD_FILES)
	.venv/bin/uv venv --quiet --clear --python .venv/bin/python $(@D)
	.venv/bin/uv pip install --python $(@D)/bin/python --upgrade --prerelease disallow --resolution $(RESOLUTION) -e '.[dev]'
	@touch $@
