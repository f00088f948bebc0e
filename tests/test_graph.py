"""CUDA graphs of the step: the same numbers as plain calls. All of it needs a GPU, except the choice (test_step.py)."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("open_clip")
import tests.test_step as small  # noqa: E402
from dad_fast.config.schema import AttackConfig, Config, EngineConfig  # noqa: E402
from dad_fast.engine.graph import WARM_UP  # noqa: E402
from dad_fast.engine.step import TrainStep  # noqa: E402
from dad_fast.engine.update import Update  # noqa: E402
from dad_fast.errors import EnvironmentProblem  # noqa: E402
from dad_fast.methods.objectives import TERMS  # noqa: E402
from dad_fast.models.discretizer import Jpeg  # noqa: E402
from dad_fast.models.student import build_student  # noqa: E402

pytestmark = pytest.mark.gpu
STEPS = WARM_UP + 5


def make(method, graphs, student=small.LAYER_NORM, parts=1, **changes) -> TrainStep:
    device = torch.device("cuda")
    cfg = Config(
        method=method, student=student, attack=AttackConfig(norm="l2", eps=0.5, step_size=0.4, steps=2),
        engine=EngineConfig(cuda_graphs=graphs, grad_accum_steps=parts),
        optim=replace(Config().optim, clip_grad=1.0), ema=replace(Config().ema, model_ema=True), **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_student(cfg.student, small.C, small.SIDE).to(device)
    discretizer = small.discretizer()
    discretizer.vqgan.to(device)
    return TrainStep(cfg, model, small.LinearTeacher().to(device), discretizer, Update(model, cfg, device))


def train(step: TrainStep) -> list[float]:
    torch.manual_seed(1)
    losses = []
    for number in range(STEPS):
        data = small.batch().to("cuda")
        data.images[:, :, number % 4] = number
        losses.append(step(data, number, 1e-3 / (number + 1))["loss"].item())
    return losses


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("student", [small.LAYER_NORM, replace(small.BATCH_NORM, drop_path=0.5)], ids=["ln", "bn"])
@pytest.mark.parametrize("method", TERMS)
def test_graphs_compute_what_plain_calls_compute(method, student, parts):
    plain, graphed = make(method, "off", student, parts), make(method, "on", student, parts)
    torch.testing.assert_close(train(graphed), train(plain), rtol=1e-4, atol=1e-5)
    assert graphed.graphs.captured
    for a, b in zip(graphed.student.state_dict().values(), plain.student.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(graphed.update.ema.module.parameters(), plain.update.ema.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_bad_batch_changes_nothing_under_graphs():
    step = make("ce", "on", replace(small.BATCH_NORM))
    train(step)
    before = {name: value.clone() for name, value in step.student.state_dict().items() if value.is_floating_point()}
    with torch.no_grad():
        weight = next(step.student.parameters())
        kept = weight.clone()
        weight.fill_(float("nan"))
    assert step(small.batch().to("cuda"), STEPS, 1e-3)["applied"] == 0
    assert step.update.bad_in_a_row == 1
    with torch.no_grad():
        weight.copy_(kept)
    after = step.student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_cannot_be_captured_falls_back_or_is_refused(caplog):
    step = make("dad", "auto")
    step.discretizer = Jpeg(75)  # works on the host
    with caplog.at_level(logging.WARNING):
        losses = train(step)
    assert step.graphs.failed and len(losses) == STEPS
    assert sum("CUDA graphs are off" in record.message for record in caplog.records) == 1
    asked = make("dad", "on")
    asked.discretizer = Jpeg(75)
    with pytest.raises(EnvironmentProblem, match="--cuda-graphs on"):
        train(asked)
