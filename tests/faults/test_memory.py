"""Out of memory in a step: one line with a suggested batch size, exit code 1."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
    pytest.importorskip(package)
from harness import HANG, ROOT

from tests import warm

SCRIPT = """
import re, resource, sys
import torch, torchvision, timm, open_clip
from dad_fast.cli.main import main
torch.nn.Conv2d(3, 8, 3)(torch.rand(1, 3, 8, 8))
held = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 2**28, held + 3 * 2**28))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_out_of_memory_suggests_a_batch_size(tmp_path: Path) -> None:
    sets = ["variants={}", "data.workers=0", "eval.suites=[]", "student.model_kwargs={}"]
    arguments = [
        *shlex.split("train --preset demo --method ce -b 3000 --device cpu -o"),
        str(tmp_path / "run"),
    ]
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        *arguments,
        *(part for item in sets for part in ("--set", item)),
    ]
    done = warm.run(command, cwd=ROOT, timeout=HANG)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "3000 images at a time; try --batch-size 1500 --grad-accum-steps 2, as" in line
