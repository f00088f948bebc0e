#!/usr/bin/env bash
# Run a few training steps under Nsight Compute without the warm-up (dad-fast profile ncu); needs no installation.
#   scripts/ncu.sh --preset demo --method dad --kernel 'groupnorm.*'
# The settings are those of dad-fast train; scripts/ncu.sh -h lists the rest. Not yet run on a GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m dad_fast profile ncu "$@"
