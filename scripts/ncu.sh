#!/usr/bin/env bash
# A few training steps under Nsight Compute, warm-up skipped: dad-fast profile ncu, from a checkout that need not be installed.
#   scripts/ncu.sh --preset demo --method dad --kernel 'groupnorm.*'
# The settings are those of dad-fast train; scripts/ncu.sh -h lists the rest. Not yet run on a GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m dad_fast profile ncu "$@"
