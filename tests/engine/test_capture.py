"""Captures of the step's CUDA graphs, on the CPU: no graph is empty, torch has nothing to warn of,
and a run continues after a broken capture.

A stand-in for torch.cuda.graph runs what is captured and then takes back what it wrote; replays do
nothing.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dad_fast.config.schema import Config, LpClipConfig, OptimConfig, PrecisionConfig
from dad_fast.engine import cuda_graph
from dad_fast.engine.build import make_step
from dad_fast.engine.cuda_graph import WARM_UP, StepGraphs
from dad_fast.engine.optimizer import build_optimizer
from dad_fast.engine.update import Update
from dad_fast.models.probe import build_probe
from dad_fast.models.student import build_student
from tests.engine.test_step import CPU, LAYER_NORM, SIDE, C, LinearTeacher, batch
from tests.models.test_optimizations import timm_teacher
from tests.steps import learner_of, run

CUDA = torch.device("cuda", 0)
# Operations that launch no kernel.
HOST_ONLY = ("detach", "alias", "view", "empty", "expand", "permute", "slice", "t.default")


class Launches(TorchDispatchMode):
    """Records the operations that would launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.lstrip("_").startswith(HOST_ONLY):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def captures(monkeypatch):
    """Let steps capture on the CPU; yields the operations of each capture."""
    found = []

    @contextmanager
    def capturing(graph, pool, stream):
        update = graph_of["update"]
        held = [*update.parameters, *(p.grad for p in update.parameters), *update.buffers]
        held += [update.loss_sum, *tree_leaves(list(update.optimizer.state.values()))]
        before = [tensor.detach().clone() for tensor in held]
        try:
            with Launches() as launches:
                yield
            found.append(launches.names)
        finally:
            with torch.no_grad():
                for tensor, value in zip(held, before, strict=True):
                    tensor.copy_(value)

    graph_of = {}
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        Stream=lambda device: stream,
        graph_pool_handle=lambda: (0, 1),
        current_stream=lambda device: stream,
        stream=lambda stream: nullcontext(),
    )
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(cuda_graph, "capturing", capturing)

    def start(step):
        graph_of["update"] = learner_of(step).update
        step.graphs = StepGraphs(CUDA, step.generate, step.learn, step.learners, required=False)
        return found

    return start


def make(method="kd", **changes):
    cfg = replace(Config(method=method, student=LAYER_NORM), **changes)
    torch.manual_seed(0)
    student = build_student(cfg.student, C, SIDE)
    return make_step(cfg, student, LinearTeacher(), None, Update(student, cfg, CPU))


def test_no_capture_is_empty_with_kept_features_and_true_labels(captures):
    """torch warns of an empty graph."""
    cfg = Config(method="lp-clip", lp_clip=LpClipConfig(labels="true"))
    teacher = timm_teacher(img_size=SIDE, num_classes=C)
    teacher.image_size = SIDE
    probe = build_probe(teacher, "0" * 64, img_size=SIDE)
    step = make_step(cfg, probe, None, None, Update(probe, cfg, CPU))
    found = captures(step)
    data = replace(batch(), features=torch.randn(8, probe.spec["num_features"]))
    for number in range(WARM_UP + 1):
        step(data, number, 1e-3)
    assert step.graphs.captured and found
    assert all(found), found


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd"])
def test_optimizers_are_capturable_during_a_capture_alone(captures, opt):
    """torch warns of steps of a capturable optimizer outside a capture, and refuses others inside."""
    step = make(optim=OptimConfig(opt=opt))
    update = learner_of(step).update
    seen = []
    groups = [group for group in update.optimizer.param_groups if "capturable" in group]
    update.optimizer.register_step_pre_hook(
        lambda *_: seen.append([group["capturable"] for group in groups])
    )
    captures(step)
    for number in range(WARM_UP + 1):
        step(batch(), number, 1e-3)
    off, on = [False] * len(groups), [True] * len(groups)
    assert step.graphs.captured and seen == [off] * WARM_UP + [on]
    assert [group["capturable"] for group in groups] == off


@pytest.mark.parametrize("opt", ["nadam", "rmsprop", "adadelta", "radam", "adamax"])
def test_optimizers_that_no_graph_captures_are_not_capturable(opt):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimConfig(opt=opt), cuda=True)
    assert not any(group.get("capturable") for group in optimizer.param_groups)


@pytest.mark.parametrize("breaks_in", ["unscale_", "step", "update"])
def test_training_continues_after_a_broken_capture_of_a_scaled_update(captures, breaks_in):
    half = PrecisionConfig(amp=True, student="float16")
    graphed, plain = (make(precision=half, optim=OptimConfig(clip_grad=1.0)) for _ in range(2))
    update = learner_of(graphed).update
    captures(graphed)
    owner = update.optimizer if breaks_in == "step" else update.scaler

    def break_once(*arguments):
        delattr(owner, breaks_in)
        raise RuntimeError("operation not permitted when stream is capturing")

    for number in range(WARM_UP + 3):
        if number == WARM_UP:
            setattr(owner, breaks_in, break_once)
        scalars, expected = (run(step, batch(), number, 1e-3) for step in (graphed, plain))
        assert {name: value.item() for name, value in scalars.items()} == {
            name: value.item() for name, value in expected.items()
        }
    assert graphed.graphs.failed
    for a, b in zip(update.parameters, learner_of(plain).update.parameters, strict=True):
        assert torch.equal(a, b)
