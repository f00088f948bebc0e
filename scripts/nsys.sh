#!/usr/bin/env bash
# Run a few training steps under Nsight Systems without the warm-up (dad-fast profile nsys); needs no installation.
#   scripts/nsys.sh --preset dad-vitb16 --data-dir DIR --discretizer FILE --steps 5
# The settings are those of dad-fast train; scripts/nsys.sh -h lists the rest. Not yet run on a GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m dad_fast profile nsys "$@"
