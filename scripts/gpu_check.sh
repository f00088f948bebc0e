#!/usr/bin/env bash
# Check this checkout on a CUDA machine: scripts/gpu_check.sh [PART ...]. -h lists the parts, the packages
# to carry, and the calls for half an hour. Not yet run on a GPU, only rehearsed with --device cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
if compgen -G ".whl/*.whl" >/dev/null; then  # carried packages, separate from the machine's own
  site=${TMPDIR:-/tmp}/dad-fast-gpu-check-site
  [ -d "$site" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" scripts/gpu_check.py "$@"
