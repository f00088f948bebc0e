#!/usr/bin/env bash
# Checks this checkout on a CUDA machine: scripts/gpu_check.sh [PART ...]; -h lists the parts, what to carry, and the calls for half an hour.
# This script has not run on a GPU yet: only its CPU rehearsal has (--device cpu).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
if compgen -G ".whl/*.whl" >/dev/null; then  # carried packages, aside from the machine's own
  site=${TMPDIR:-/tmp}/dad-fast-gpu-check-site
  [ -d "$site" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" scripts/gpu_check.py "$@"
