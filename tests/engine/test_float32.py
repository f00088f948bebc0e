"""float32 is IEEE where the attack depends on it, and TF32 elsewhere if the run allows it.

torch's flags are read at dispatch on any machine; only CUDA acts on them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from torch.utils._python_dispatch import TorchDispatchMode

from dad_fast.config.resolve import gather
from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.engine import notices
from dad_fast.engine.build import make_step
from dad_fast.engine.update import Update
from dad_fast.kernels.nearest_code.torch_search import search_torch
from dad_fast.loggers import profiling
from dad_fast.models.float32 import float32_math
from dad_fast.models.student import build_student
from tests.engine.test_step import (
    BATCH_NORM,
    CPU,
    SIDE,
    B,
    C,
    batch,
    discretizer,
    make_config,
)
from tests.models.test_optimizations import timm_teacher

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "scaled_dot_product")
SENSITIVE = {"attack", "encode", "lookup"}


def flags():
    """Return what CUDA kernels would use: (matrix products, convolutions)."""
    return (
        torch.backends.cuda.matmul.fp32_precision == "tf32",
        torch.backends.cudnn.conv.fp32_precision == "tf32",
    )


class Flags(TorchDispatchMode):
    """Records (stage, products in TF32, convolutions in TF32) of every product."""

    def __init__(self):
        super().__init__()
        self.stages = ["outside"]
        self.seen = set()

    @contextmanager
    def range(self, name):
        self.stages.append(name)
        yield
        self.stages.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.").lstrip("_")
        if name.startswith(PRODUCTS):
            self.seen.add((self.stages[-1], *flags()))
            # What compilers and torch itself ask: raises for a mix of both ways to set it.
            _ = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded():
    def run(method, precision, teacher=True):
        cfg = make_config(method, BATCH_NORM, precision=precision)
        torch.manual_seed(0)
        student = build_student(cfg.student, C, SIDE, 3)
        asked = timm_teacher(img_size=SIDE, num_classes=C)
        asked.image_size = SIDE
        quantizer = VQGANDiscretizer(discretizer().vqgan, precision)
        for owner, name, stage in quantizer.stages():
            profiling.name_method(owner, name, stage)
        step = make_step(cfg, student, asked, quantizer, Update(student, cfg, CPU))
        found = Flags()
        with profiling.naming_stages(found.range), found:
            step(batch(), 0, 1e-3)
        return found.seen

    return run


def ambient(name):
    """Set torch's flags as a user or a library may have."""
    if name == "products":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif name == "new names":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    elif name == "everything":
        torch.backends.fp32_precision = "tf32"


@pytest.fixture(autouse=True)
def torch_as_before():
    generic = torch.backends.fp32_precision
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    values = [backend.fp32_precision for backend in backends]
    yield
    torch.backends.fp32_precision = generic
    torch.backends.cuda.matmul.allow_tf32 = values[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = values[1] == "tf32"
    for backend, value in zip(backends, values, strict=True):
        backend.fp32_precision = value


@pytest.mark.parametrize("name", ["torch's own", "products", "new names", "everything"])
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("method", ["dad", "dat"])
def test_float32_is_ieee_under_the_attack_and_as_set_elsewhere(recorded, method, tf32, name):
    ambient(name)
    before = flags()
    seen = recorded(method, PrecisionConfig(amp=False, tf32=tf32))
    assert flags() == before
    teacher = {"teacher"} if method == "dad" else set()
    assert {stage for stage, *_ in seen} >= {"attack", "encode", "decode", "student", "backward"}
    assert seen == {
        (stage, *((tf32 and stage not in SENSITIVE,) * 2))
        for stage in {"attack", "encode", "decode", "student", "backward"} | teacher
    }


def test_encoder_in_float32_is_ieee_under_mixed_precision(recorded):
    seen = recorded("dad", PrecisionConfig(amp=True, encoder="float32"))
    assert {found for found in seen if found[0] in SENSITIVE} == {
        ("attack", False, False),
        ("encode", False, False),
    }


def test_stages_outside_a_run_are_ieee_too():
    """`df.discretize` and `df.PGD` in a notebook."""
    quantizer = discretizer()
    with Flags() as found:
        quantizer.encode(torch.rand(B, 3, SIDE, SIDE))
    assert found.seen == {("outside", False, False)}


@pytest.mark.parametrize("dim", [4, 20])
def test_codebook_search_has_no_product_in_float32(dim):
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func).removeprefix("aten.").startswith(PRODUCTS):
                assert all(arg.dtype == torch.float64 for arg in args if torch.is_tensor(arg))
            return func(*args, **(kwargs or {}))

    with Products():
        search_torch(torch.randn(50, dim), torch.randn(300, dim))


@pytest.mark.parametrize("name", ["torch's own", "products", "new names", "everything"])
def test_flags_are_restored_after_an_error(name):
    ambient(name)
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [backend.fp32_precision for backend in backends]
    for outer, inner in ((True, False), (False, True)):
        with pytest.raises(RuntimeError), float32_math(tf32=outer):
            assert flags() == (outer, outer)
            with float32_math(tf32=inner):
                assert flags() == (inner, inner)
                assert torch.backends.cudnn.allow_tf32 == inner
                assert torch.backends.cuda.matmul.allow_tf32 == inner
            assert flags() == (outer, outer)
            raise RuntimeError
        assert [backend.fp32_precision for backend in backends] == before


def test_authors_preset_is_ieee_float32():
    assert not gather("dad-authors-online", None, (), None).precision.tf32


@pytest.mark.parametrize(
    "precision, advice",
    [
        (PrecisionConfig(amp=True), "raise --attack-eps, or set precision.encoder=float32"),
        (PrecisionConfig(amp=True, encoder="float32"), "raise --attack-eps"),
        (PrecisionConfig(amp=False), "raise --attack-eps"),
    ],
)
def test_advice_on_rounding_names_what_would_help(precision, advice):
    lines = []
    cfg = replace(make_config("dad"), precision=precision)
    notices.Advice(cfg, None, "pil").on_attack(0.5, lines.append)
    (line,) = lines
    assert line.endswith(advice)
