#!/usr/bin/env bash
# Checks this checkout on a CUDA machine: scripts/gpu_check.sh [PART ...]; scripts/gpu_check.sh -h lists the parts, each under ten minutes.
# Results: ${OUT:-runs/gpu_check}/manifest.json, and a .json and .log per part. Tables of the benchmarks: scripts/gpu_report.py.
# A bare checkout with torch, triton, timm and pytest is enough; what needs more is skipped, and the result file says so.
# This script has not run on a GPU yet: only its CPU rehearsal has (--device cpu).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" scripts/gpu_check.py "$@"
