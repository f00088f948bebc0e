#!/usr/bin/env bash
# Check this checkout on a CUDA machine in less than ten minutes: scripts/gpu_check.sh [PART ...].
# -h lists the parts. Packages that the machine lacks may travel as wheels in .whl/ (docs/gpu.md).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
if compgen -G ".whl/*.whl" >/dev/null; then  # separate from the machine's own packages
  site=${TMPDIR:-/tmp}/dad-fast-gpu-check-site
  [ -d "$site" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" scripts/gpu_check.py "$@"
