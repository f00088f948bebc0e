"""Short tests of Triton kernels under the interpreter, in one process.

test_triton_search.py has its own process.
"""

import pytest

pytest.importorskip("torch")
from tests.interpreter import run_interpreted


def test_kernels_under_the_interpreter():
    names = ("group_norm_silu", "distillation_loss", "pack_codes", "pgd_update")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    run_interpreted(*files, "tests/engine/test_self_test.py")
