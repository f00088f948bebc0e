"""The tape of tests/graph_tape.py catches planted faults; fall-backs and streams of the real step.

test_cuda_graph.py compares captured with plain training on the same tape.
"""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from dad_fast.config.schema import LpClipConfig
from dad_fast.engine import cuda_graph
from dad_fast.engine.cuda_graph import StepGraphs, capturing
from dad_fast.engine.prefetch import _to_gpu
from dad_fast.errors import EnvironmentProblem
from tests.graph_steps import BATCH_NORM, FP16, MATRIX, STEPS, Case, differences, train
from tests.graph_tape import Dangling, NotPermitted, tape
from tests.processes import run_script
from tests.steps import learner_of
from tests.stream_races import Stream

CPU = torch.device("cpu")
SMALL = Case("ce", parts=2)


def captured(cuda, function, pool=None):
    """Capture a function of no arguments. Returns the graph and the result."""
    graph = cuda.CUDAGraph()
    with capturing(graph, pool or cuda.graph_pool_handle(), cuda.Stream()):
        result = function()
    return graph, result


# --- the tape alone ---


def test_a_capture_runs_nothing_and_a_replay_reads_the_same_addresses():
    with tape() as cuda:
        x, count = torch.ones(3), torch.zeros(())
        graph, y = captured(cuda, lambda: (count.add_(1), x * 2 + count)[1])
        assert count == 0
        for number in range(1, 4):
            x.fill_(number)
            graph.replay()
            assert torch.equal(y, torch.full((3,), 3.0 * number)) and count == number


def test_numbers_and_branches_of_python_are_frozen():
    with tape() as cuda:
        x, settings = torch.ones(()), {"factor": 2.0}
        graph, y = captured(cuda, lambda: x * settings["factor"])
        settings["factor"] = 5.0
        graph.replay()
        assert y == 2.0


def test_random_operations_draw_anew_and_a_capture_draws_nothing():
    with tape() as cuda:
        torch.manual_seed(0)
        graph, y = captured(cuda, lambda: torch.rand(4))
        found = []
        for _ in range(2):
            graph.replay()
            found.append(y.clone())
        torch.manual_seed(0)
        assert all(torch.equal(value, torch.rand(4)) for value in found)


READS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "from a list": lambda x: torch.tensor([1.0, 2.0]),
    "own generator": lambda x: torch.rand(3, generator=torch.Generator()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_on_the_host_breaks_the_capture_off(read):
    with tape() as cuda:
        x = torch.ones(3)
        with pytest.raises(NotPermitted, match="not permitted when stream is capturing"):
            captured(cuda, lambda: (x.add_(1), read(x)))
        assert torch.equal(x, torch.ones(3))  # undone
        graph, y = captured(cuda, lambda: x + 1)
        graph.replay()
        assert torch.equal(y, torch.full((3,), 2.0))


def test_a_freed_tensor_from_outside_is_caught():
    with tape() as cuda:
        inputs = {"x": torch.ones(3), "y": torch.ones(3)}
        graph, _ = captured(cuda, lambda: inputs["x"] + inputs["y"])
        graph.replay()
        inputs["x"] = torch.ones(3)
        with pytest.raises(Dangling, match="test_graph_replay.py"):
            graph.replay()


def test_freed_results_are_poisoned_and_their_memory_is_reused():
    with tape() as cuda:
        x, pool = torch.ones(3), cuda.graph_pool_handle()
        first, y = captured(cuda, lambda: [x + 1], pool)
        second, z = captured(cuda, lambda: y[0] * 2, pool)
        address = y.pop().data_ptr()
        third, w = captured(cuda, lambda: x + 10, pool)
        assert w.data_ptr() == address
        for graph in (first, second, third):
            graph.replay()
        assert torch.equal(z, torch.full((3,), 4.0)) and torch.equal(w, torch.full((3,), 11.0))
        second.replay()  # in another order than they were captured
        assert torch.equal(z, torch.full((3,), 22.0))


def test_memory_that_another_stream_may_still_use_is_a_race():
    with tape(watch=True) as cuda:
        side = cuda.Stream()
        with cuda.stream(side):
            x = torch.ones(3)
        cuda.current_stream().wait_stream(side)
        x.sum()
        assert cuda.watch.races == []
        del x
        with cuda.stream(side):
            torch.zeros(3)  # gets the memory of x, which `sum` may not have read yet
        (race,) = cuda.watch.races
        assert "may get memory that aten::sum uses" in race


def test_memory_that_nothing_has_written_is_nan():
    with tape() as cuda:
        graph, y = captured(cuda, lambda: torch.empty(3) + 1)
        graph.replay()
        assert y.isnan().all()


# --- captured training equals plain training ---


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX)
def test_replayed_training_equals_plain_training(case):
    with tape():
        plain = train(case.make(CPU, "off"), case.batches(STEPS))
        step = case.make(CPU, "on")
        replayed = train(step, case.batches(STEPS))
    assert step.graphs.captured
    assert differences(plain, replayed) == []


# --- planted faults in the step ---


def rate_as_number(step):
    update = learner_of(step).update
    update.rates = [None] * len(update.rates)


def gradients_not_static(step):
    learner_of(step).update.make_gradients_static = lambda: None


def ema_weight_made_anew(step):
    update = learner_of(step).update
    begin = update.begin

    def replaced(number, lr):
        begin(number, lr)
        update.ema_weight = torch.full((), 1.0 - update.ema.get_decay(number))

    update.begin = replaced


def generated(change):
    """Return a fault: change the generated images, with the batch at hand."""

    def plant(step):
        generator = step.generator
        mixed = generator.mixed

        def replaced(batch):
            found = mixed(batch)
            return found._replace(pixels=change(batch, found.pixels))

        generator.mixed = replaced

    return plant


FAULTS = {
    "the learning rate is a number": (rate_as_number, None),
    "gradients are made anew": (gradients_not_static, None),
    "the weight of the EMA is made anew": (ema_weight_made_anew, Dangling),
    "the step's number is in the graph": (
        generated(lambda batch, pixels: pixels * (1 + 0.1 * batch.step)),
        None,
    ),
    "a branch on a tensor": (
        generated(lambda batch, pixels: pixels if batch.mix_kind.sum() > 0 else -pixels),
        EnvironmentProblem,
    ),
    "a read of a label": (
        generated(lambda batch, pixels: pixels * batch.labels.float().mean().item()),
        EnvironmentProblem,
    ),
}


def outcome(case, plant):
    """Return what differs between plain and captured training, or the error of the captured one."""
    made = [case.make(CPU, cuda_graphs) for cuda_graphs in ("off", "on")]
    for step in made:
        plant(step)
    plain = train(made[0], case.batches(STEPS))
    try:
        return differences(plain, train(made[1], case.batches(STEPS)))
    except (Dangling, EnvironmentProblem) as error:
        return error


@pytest.mark.parametrize("plant, error", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(plant, error):
    with tape():
        found = outcome(SMALL, plant)
    assert isinstance(found, error) if error else found != []


def test_state_made_in_the_capture_is_caught(monkeypatch):
    """The optimizer's state would begin anew at every replay."""
    monkeypatch.setattr(cuda_graph, "WARM_UP", 0)
    with tape():
        assert outcome(Case("ce"), lambda step: None) != []


# --- captures that break off ---


def break_off(step, place):
    """Read on the host at a place. It does no harm to plain steps."""
    update = learner_of(step).update

    def reading(function, before=False):
        def read(*arguments):
            if before:
                update.loss_sum.tolist()
            result = function(*arguments)
            update.loss_sum.tolist()
            return result

        return read

    if place in ("generate", "learn"):
        name = f"_{place}"
        setattr(step.graphs, name, reading(getattr(step.graphs, name)))
    elif place == "apply":
        update.apply = reading(update.apply)
    else:
        update._guarded_step = reading(update._guarded_step, before=True)


@pytest.mark.parametrize(
    "place, precision",
    [
        *((place, None) for place in ("generate", "learn", "apply", "guarded step")),
        ("learn", FP16),
        ("apply", FP16),
        ("guarded step", FP16),
    ],
)
def test_training_goes_on_after_a_broken_capture(place, precision):
    sections = {"precision": precision} if precision else {}
    case = Case("kd", BATCH_NORM, parts=2, sections=sections)
    with tape():
        plain = train(case.make(CPU, "off"), case.batches(STEPS))
        step = case.make(CPU, "auto")
        break_off(step, place)
        found = train(step, case.batches(STEPS))
    assert step.graphs.failed
    assert differences(plain, found) == []


# --- skipped steps and empty graphs ---


@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
def test_sgd_trains_on_after_a_bad_first_step(cuda_graphs):
    case = Case("ce", optim={"opt": "sgd"}, bad_steps=(0,))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        with tape():
            *history, state = train(case.make(CPU, cuda_graphs), case.batches(STEPS))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [bool(scalars["applied"]) for scalars in history] == [False] + [True] * (STEPS - 1)
    assert all(value.isfinite().all() for value in state.values())


def test_no_graph_is_empty():
    case = Case("lp-clip", features=True, sections={"lp_clip": LpClipConfig(labels="true")})
    with tape(), warnings.catch_warnings():
        warnings.simplefilter("error")
        train(case.make(CPU, "on"), case.batches(STEPS))


# --- between the steps ---


def test_evaluation_between_replays_changes_nothing():
    case = Case("dat", BATCH_NORM)

    def evaluate(step, number):
        random_state = torch.get_rng_state()
        pixels = torch.rand(2, 3, 16, 16)
        for model in (learner_of(step).student, learner_of(step).update.ema.module):
            model.eval()(pixels)
        torch.set_rng_state(random_state)

    with tape():
        made = [case.make(CPU, cuda_graphs) for cuda_graphs in ("off", "on")]
        runs = [train(step, case.batches(STEPS), partial(evaluate, step)) for step in made]
    assert differences(*runs) == []


# --- streams ---


@contextmanager
def without_first_wait(self):
    with cuda_graph.torch.cuda.stream(self._stream):
        yield
    cuda_graph.torch.cuda.current_stream().wait_stream(self._stream)


@contextmanager
def without_last_wait(self):
    self._stream.wait_stream(cuda_graph.torch.cuda.current_stream())
    with cuda_graph.torch.cuda.stream(self._stream):
        yield


def races(case):
    """Train captured and watched, from prefetched batches. Returns the races."""
    with tape(watch=True) as cuda:
        train(case.make(CPU, "on"), _to_gpu(iter(case.batches(STEPS)), CPU))
    return cuda.watch.races


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        Case("kd", num_processes=2),
        pytest.param(Case("kd", BATCH_NORM), marks=pytest.mark.slow),
        pytest.param(Case("dat+dad", BATCH_NORM, parts=2), marks=pytest.mark.slow),
        pytest.param(Case("dad", sections={"precision": FP16}), marks=pytest.mark.slow),
    ],
    ids=lambda case: f"{case.method}-{case.parts}",
)
def test_operations_wait_for_other_streams(case):
    assert races(case) == []


@pytest.mark.parametrize("aside", [without_first_wait, without_last_wait])
def test_a_missing_wait_of_the_warm_up_is_a_race(monkeypatch, aside):
    monkeypatch.setattr(StepGraphs, "_aside", aside)
    assert races(SMALL)


@pytest.mark.parametrize("waits", ["side", "current"])
def test_a_missing_wait_of_the_prefetch_is_a_race(monkeypatch, waits):
    """The side stream refills a buffer that is still read; or the step reads before it is filled."""
    wait_event = Stream.wait_event

    def skipping(self, event):
        is_current = self is cuda_graph.torch.cuda.streams[0]
        if is_current != (waits == "current"):
            wait_event(self, event)

    monkeypatch.setattr(Stream, "wait_event", skipping)
    assert races(SMALL)


# --- several processes ---


@pytest.mark.slow
def test_graphs_equal_plain_calls_in_two_processes(tmp_path):
    script = Path(__file__).parents[1] / "graphs_together.py"
    (code, first, error), (_, second, _) = run_script(2, tmp_path, [str(script)])
    assert code == 0, error
    assert first == second  # both have the same weights
    results = [json.loads(line) for line in first.splitlines()]
    assert [found for found, _ in results] == [[]] * len(results) and results
