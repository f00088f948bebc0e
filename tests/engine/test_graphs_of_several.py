"""CUDA graphs of several learners equal each learner alone and plain, random draws included."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from dad_fast.engine.own_random import OwnRandom
from dad_fast.engine.prefetch import _to_gpu
from dad_fast.engine.step import TrainStep
from tests.engine.test_cuda_graph import machine  # noqa: F401
from tests.engine.test_graph_replay import CPU
from tests.graph_steps import BATCH_NORM, BF16, FP16, STEPS, Case, differences, state_of
from tests.graph_tape import tape
from tests.steps import learner_of, run


def rate(number, index):
    return 1e-3 * (index + 1) / (number + 1)


def alone(case, index, device):
    """Train a learner plainly. Returns its scalars of each step, then its state."""
    step = case.make(device, "off")
    torch.manual_seed(index)
    history = []
    for number, batch in enumerate(case.batches(STEPS)):
        scalars = run(step, batch.to(device), number, rate(number, index))
        history.append({name: value.clone() for name, value in scalars.items()})
    return [*history, state_of(step)]


class Together:
    """One step of several learners."""

    def __init__(self, cases, device, cuda_graphs="on"):
        self.cases, self.device = cases, device
        self.singles = [case.make(device, "off") for case in cases]
        learners = [learner_of(step) for step in self.singles]
        for index, learner in enumerate(learners):
            torch.manual_seed(index)
            learner.random = OwnRandom(device)
        self.step = TrainStep(
            self.singles[0].generator,
            learners,
            num_micro_batches=cases[0].parts,
            tf32=True,
            cuda_graphs=cuda_graphs,
        )

    def train(self, batches):
        histories = [[] for _ in self.cases]
        for number, batch in enumerate(batches):
            rates = [rate(number, index) for index in range(len(self.cases))]
            for history, scalars in zip(histories, self.step(batch, number, rates), strict=True):
                history.append({name: value.clone() for name, value in scalars.items()})
        for history, single in zip(histories, self.singles, strict=True):
            with learner_of(single).own_random():
                history.append(state_of(single))
        return histories


def both(case):
    """A case with two students, whose losses are weighted differently."""
    return case, replace(case, student=BATCH_NORM, optim={"lr": 0.1, "weight_decay": 0.2})


CASES = {
    "kd": Case("kd", parts=2, bad_steps=(4,)),
    "dad": Case("dad"),
    "dat+dad": Case("dat+dad", parts=2, bad_steps=(4,)),
    "kd, fp16": Case("kd", sections={"precision": FP16}, bad_steps=(1, 4)),
    "dad, bf16": Case("dad", sections={"precision": BF16}, timm_teacher=True),
    "kd, shared gradients": Case("kd", num_processes=2),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name == "kd" else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_graphs_of_several_learners_equal_each_alone(machine, case):  # noqa: F811
    cases = both(case)
    expected = [alone(one, index, machine.device) for index, one in enumerate(cases)]
    group = Together(cases, machine.device)
    found = group.train(machine.feed(case.batches(STEPS)))
    assert group.step.graphs.captured
    for one, other in zip(expected, found, strict=True):
        assert differences(one, other, machine.same) == []


def test_a_broken_capture_of_the_second_learner_falls_back_to_plain_calls():
    case = Case("kd", parts=2)
    with tape():
        expected = [alone(one, index, CPU) for index, one in enumerate(both(case))]
        group = Together(both(case), CPU, "auto")
        update = learner_of(group.singles[1]).update
        apply = update.apply

        def reading():
            update.loss_sum.tolist()
            return apply()

        update.apply = reading
        found = group.train(case.batches(STEPS))
    assert group.step.graphs.failed
    assert [differences(*pair) for pair in zip(expected, found, strict=True)] == [[], []]


@pytest.mark.slow
def test_graphs_of_several_learners_wait_for_other_streams():
    case = Case("dat+dad", parts=2)
    with tape(watch=True) as cuda:
        Together(both(case), CPU).train(_to_gpu(iter(case.batches(STEPS)), CPU))
    assert cuda.watch.races == []
