"""CUDA graphs of the step equal plain calls.

Needs a GPU, except for the test of a broken capture.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import tests.engine.test_step as small
from dad_fast.config.schema import AttackConfig, Config, EngineConfig
from dad_fast.discretizers.jpeg import Jpeg
from dad_fast.engine import cuda_graph as graph_module
from dad_fast.engine.build import make_step
from dad_fast.engine.cuda_graph import WARM_UP, capturing
from dad_fast.engine.step import TrainStep
from dad_fast.engine.update import Update
from dad_fast.errors import EnvironmentProblem
from dad_fast.methods.registry import METHODS
from tests.steps import learner_of

METHOD_NAMES = [name for name in METHODS if METHODS[name].terms]
from dad_fast.models.student import build_student

STEPS = WARM_UP + 5


def make(method, graphs, student=small.LAYER_NORM, parts=1, **changes) -> TrainStep:
    device = torch.device("cuda")
    cfg = Config(
        method=method,
        student=student,
        attack=AttackConfig(norm="l2", eps=0.5, step_size=0.4, steps=2),
        engine=EngineConfig(cuda_graphs=graphs, grad_accum_steps=parts),
        optim=replace(Config().optim, clip_grad=1.0),
        ema=replace(Config().ema, model_ema=True),
        **changes,
    )
    torch.manual_seed(0)
    model = build_student(cfg.student, small.C, small.SIDE).to(device)
    discretizer = small.discretizer()
    discretizer.vqgan.to(device)
    return make_step(
        cfg, model, small.LinearTeacher().to(device), discretizer, Update(model, cfg, device)
    )


def train(step: TrainStep) -> list[float]:
    torch.manual_seed(1)
    losses = []
    for number in range(STEPS):
        data = small.batch().to("cuda")
        data.images[:, :, number % 4] = number
        losses.append(step(data, number, 1e-3 / (number + 1))[0]["loss"].item())
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "student", [small.LAYER_NORM, replace(small.BATCH_NORM, drop_path=0.5)], ids=["ln", "bn"]
)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_graphs_equal_plain_calls(method, student, parts):
    plain, graphed = make(method, "off", student, parts), make(method, "on", student, parts)
    torch.testing.assert_close(train(graphed), train(plain), rtol=1e-4, atol=1e-5)
    assert graphed.graphs.captured
    for a, b in zip(
        learner_of(graphed).student.state_dict().values(),
        learner_of(plain).student.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(
        learner_of(graphed).update.ema.module.parameters(),
        learner_of(plain).update.ema.module.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_bad_batch_changes_nothing_under_graphs():
    step = make("ce", "on", replace(small.BATCH_NORM))
    train(step)
    before = {
        name: value.clone()
        for name, value in learner_of(step).student.state_dict().items()
        if value.is_floating_point()
    }
    with torch.no_grad():
        weight = next(learner_of(step).student.parameters())
        kept = weight.clone()
        weight.fill_(float("nan"))
    assert step(small.batch().to("cuda"), STEPS, 1e-3)[0]["applied"] == 0
    assert learner_of(step).update.bad_in_a_row == 1
    with torch.no_grad():
        weight.copy_(kept)
    after = learner_of(step).student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.gpu
def test_failed_capture_falls_back_or_raises(caplog):
    step = make("dad", "auto")
    step.generator.discretizer = Jpeg(75)  # works on the host
    with caplog.at_level(logging.WARNING):
        losses = train(step)
    assert step.graphs.failed and len(losses) == STEPS
    (said,) = [
        record.message for record in caplog.records if "CUDA graphs are off" in record.message
    ]
    assert "previous error" not in said  # the reason itself, not that there was one
    # Nothing of the broken capture stays: the stream, the allocator and the random generator work
    # on, and another step is captured.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    torch.rand(8, device="cuda")
    train(good := make("dad", "on"))
    assert good.graphs.captured
    asked = make("dad", "on")
    asked.discretizer = Jpeg(75)
    with pytest.raises(EnvironmentProblem, match="--cuda-graphs on"):
        train(asked)


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
