"""Let code run on where it depends on values: on the pretended GPU kernels compute nothing.

`python -m tests.pretended_gpu.values MODULE ARGUMENT...` runs a module, pytest's `-p
tests.pretended_gpu.values` a test session, with checks of values switched off. There, a failed
assertion is an expected failure, so that only tests that crash before it fail.
"""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

from dad_fast.engine.trainer import Trainer
from dad_fast.kernels.nearest_code import triton_common


def ignore() -> None:
    torch.testing.assert_close = lambda *_, **__: None
    torch.equal = torch.allclose = lambda *_, **__: True
    triton_common.can_win = lambda codebook: torch.ones_like(codebook[:, 0], dtype=torch.bool)
    Trainer.is_finite = lambda trainer: trainer.worst_streak.item() >= 0 or True


VALUES = (AssertionError, torch.linalg.LinAlgError)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(VALUES):
        report.outcome, report.wasxfail = "skipped", "depends on values"
    return report


ignore()
if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
