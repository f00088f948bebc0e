"""CUDA graphs of the step equal plain calls: on a GPU, and on the CPU by the tape.

The same test bodies run on both, so that without a GPU only CUDA itself is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.codec import Codec
from dad_fast.engine import cuda_graph as graph_module
from dad_fast.engine.cuda_graph import capturing
from dad_fast.engine.prefetch import _to_gpu
from dad_fast.errors import EnvironmentProblem
from tests.engine.test_step import discretizer
from tests.graph_steps import (
    BATCH_NORM,
    CASES,
    STEPS,
    Case,
    differences,
    same_bytes,
    train,
)
from tests.graph_tape import tape
from tests.steps import learner_of, run


class Machine(NamedTuple):
    device: torch.device
    same: Callable[[torch.Tensor, torch.Tensor], bool]

    def feed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return _to_gpu(iter(batches), self.device)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if kernels may round so differently in two runs; Adam enlarges small gradients."""
    return torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "tape"])
def machine(request):
    if request.param == "gpu":
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            yield Machine(torch.device("cuda", 0), close)
    else:
        with tape():
            yield Machine(torch.device("cpu"), same_bytes)


# Each of the others has its kind of step in another case.
BY_DEFAULT = {
    "ce",
    "dad",
    "dat+dad",
    "fp16",
    "joint-outputs",
    "kernels",
    "lp-clip-features",
    "nan-later",
    "sgd",
    "shared-gradients",
    "stored-codes",
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in BY_DEFAULT else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_graphs_equal_plain_calls(machine, case):
    plain = train(case.make(machine.device, "off"), machine.feed(case.batches(STEPS)))
    step = case.make(machine.device, "on")
    graphed = train(step, machine.feed(case.batches(STEPS)))
    assert step.graphs.captured
    assert differences(plain, graphed, machine.same) == []
    assert plain[-2]["applied"]  # in the last step; before it stand those with NaN


def test_a_bad_batch_changes_nothing_under_graphs(machine):
    case = Case("ce", BATCH_NORM, bad_steps=(STEPS,))
    step = case.make(machine.device, "on")
    train(step, machine.feed(case.batches(STEPS)))
    learner = learner_of(step)
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    scalars = run(step, case.batch(STEPS).to(machine.device), STEPS, 1e-3)
    assert scalars["applied"] == 0 and learner.update.bad_in_a_row == 1
    for name, value in learner.student.state_dict().items():
        assert torch.equal(value, before[name]) or not value.is_floating_point(), name


def test_failed_capture_falls_back_or_raises(machine, caplog):
    """JPEG works on the host."""
    case = Case()

    def make(cuda_graphs):
        step = case.make(machine.device, cuda_graphs)
        step.generator.discretizer = Codec("JPEG", 75)
        return step

    plain = train(make("off"), machine.feed(case.batches(STEPS)))
    step = make("auto")
    with caplog.at_level(logging.WARNING):
        graphed = train(step, machine.feed(case.batches(STEPS)))
    assert step.graphs.failed and not step.graphs.captured
    assert differences(plain, graphed, machine.same) == []
    (line,) = [r.message for r in caplog.records if "CUDA graphs are off" in r.message]
    assert "previous error" not in line
    with pytest.raises(EnvironmentProblem, match="--cuda-graphs on"):
        train(make("on"), machine.feed(case.batches(STEPS)))
    # The random generator works on, and another step is captured.
    torch.rand(8, device=machine.device)
    good = case.make(machine.device, "on")
    train(good, machine.feed(case.batches(STEPS)))
    assert good.graphs.captured


@pytest.mark.gpu
def test_failed_capture_leaves_stream_and_allocator_as_they_were():
    case = Case()
    step = case.make(torch.device("cuda", 0), "auto")
    step.generator.discretizer = Codec("JPEG", 75)
    train(step, (batch.to("cuda") for batch in case.batches(STEPS)))
    assert step.graphs.failed
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()


def test_discretizer_of_these_tests_is_fused_on_its_device():
    """Fused layers are copies of the VQGAN's weights: a later move would leave them behind."""
    made = discretizer(torch.device("meta"))
    tensors = [*made.vqgan.parameters(), *made.fused.buffers()]
    assert tensors and all(tensor.device.type == "meta" for tensor in tensors)


class BrokenCapture:
    """torch.cuda.graph where CUDA broke the capture off: ending it fails too, and hides the
    reason.
    """

    def __init__(self, *_, **__): ...
    def __enter__(self): ...
    def __exit__(self, *_):
        raise RuntimeError("operation failed due to a previous error during capture")


def test_broken_capture_raises_its_first_error_and_restores_torch(monkeypatch):
    calls = []
    generator = SimpleNamespace(
        get_state=lambda: "state",
        graphsafe_set_state=lambda state: calls.append(("generator", state)),
    )
    fresh = SimpleNamespace(set_state=lambda state: None, graphsafe_get_state=lambda: "fresh")
    cuda = SimpleNamespace(
        graph=BrokenCapture,
        default_generators=[None, generator],
        current_stream=lambda index: index,
        stream=lambda _: nullcontext(),
        synchronize=lambda index: None,
    )
    allocator = SimpleNamespace(
        _cuda_endAllocateToPool=lambda *arguments: calls.append(("end", *arguments)),
        _cuda_releasePool=lambda *arguments: calls.append(("release", *arguments)),
    )
    stand_in = SimpleNamespace(
        cuda=cuda, _C=allocator, Generator=lambda device: fresh, device=torch.device
    )
    monkeypatch.setattr(graph_module, "torch", stand_in)
    for reason in (RuntimeError("synchronised"), TypeError("another")):
        calls.clear()
        with pytest.raises(type(reason), match=str(reason)):
            with capturing(None, (0, 1), SimpleNamespace(device_index=1)):
                raise reason
        assert calls == [("end", 1, (0, 1)), ("release", 1, (0, 1)), ("generator", "fresh")]
