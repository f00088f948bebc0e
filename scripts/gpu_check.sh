#!/usr/bin/env bash
# Checks this checkout on a CUDA machine: scripts/gpu_check.sh [tests|demo|vitb16|all]. Results: ${OUT:-runs/gpu_check}/*.json and *.log.
# A bare checkout with torch, triton, timm and pytest is enough; what needs more is skipped, and the result file says so.
# This script has not run on a GPU yet: only its CPU rehearsal has (--device cpu).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" scripts/gpu_check.py "$@"
