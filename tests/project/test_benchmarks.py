"""Benchmark harness: timing in turns, records, pytest options, comparison with an earlier record,
history.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks import overhead, timing
from benchmarks.bench import Bench, Session, default_size
from benchmarks.record import as_text, make_record, number, read_record, record_path, write_record
from dad_fast.config.schema import PrecisionConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class HandSet:
    """Clock that only functions under test move."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, milliseconds: float, log: list[str], name: str = "") -> Callable[[], None]:
        """Return a function that takes this long and logs its name."""

        def run() -> None:
            log.append(name)
            self.now += milliseconds / 1e3

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandSet:
    monkeypatch.setattr(timing, "time", found := HandSet())
    return found


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)


def test_functions_take_turns_and_rotate(clock: HandSet) -> None:
    log: list[str] = []
    times = timing.interleaved(
        {name: clock.work(11, log, name) for name in "abc"}, CPU, seconds=0.0
    )
    assert all(len(values) == timing.MIN_ROUNDS for values in times.values())
    # After warm-up and two estimates of each.
    assert "".join(log[3 * (timing.WARM_UP_CALLS["cpu"] + 2) :]) == "abcbcacababcbca"
    assert all(value == pytest.approx(0.011) for values in times.values() for value in values)


def test_short_functions_are_called_many_times_a_round(clock: HandSet) -> None:
    log: list[str] = []
    (times,) = timing.interleaved({"a": clock.work(0.08, log)}, CPU, seconds=0.0).values()
    assert len(log) > timing.MIN_ROUNDS * 100 and times == pytest.approx(
        [0.08e-3] * timing.MIN_ROUNDS
    )


def test_failures_are_named_and_results_are_written_at_once(
    tmp_path: Path,
) -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel\nand a page of detail")

    def too_large() -> None:
        raise torch.OutOfMemoryError("out of memory")

    bench = Bench(Session(CPU, "tiny", tmp_path), "steps")
    good = {"plain": lambda: time.sleep(1e-3), "other": lambda: time.sleep(1e-3)}
    assert (
        bench.compare(
            "fits", good | {"huge": too_large}, baseline="plain", work=1, seconds=0.1
        ).keys()
        == good.keys()
    )
    with pytest.raises(
        RuntimeError, match="broken: not measured: bad; bad: RuntimeError: no such kernel$"
    ):
        bench.compare("broken", good | {"bad": fails}, baseline="plain", work=1, seconds=0.1)
    (path,) = tmp_path.rglob("steps.json")
    first, second = read_record(path)["comparisons"]
    assert first["left_out"].keys() == {"huge"} and second["left_out"] == {
        "bad": "RuntimeError: no such kernel"
    }
    assert [row["name"] for row in second["rows"]] == [
        "plain",
        "other",
    ] and "bad: left out (RuntimeError" in as_text(second)


def test_garbage_collection_is_back_on_after_a_failure() -> None:
    import gc

    calls = []

    def fails_late() -> None:
        calls.append(1)
        if len(calls) > timing.WARM_UP_CALLS["cpu"] + 3:
            raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        timing.interleaved({"a": fails_late}, CPU, seconds=0.0)
    assert gc.isenabled()


def test_spread() -> None:
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "min": 1.0,
        "n": 5,
    }
    assert timing.spread([2.0])["q3"] == 2.0


@pytest.fixture
def bench() -> Bench:
    return Bench(Session(CPU, "tiny"), "steps")


def test_compare_records_ratios_rates_and_predictions(bench: Bench, clock: HandSet) -> None:
    functions = {"kd": clock.work(10, []), "dad": clock.work(30, [])}
    ratios = bench.compare(
        "b",
        functions,
        baseline="kd",
        work=8,
        flops={"kd": 1e9, "dad": 4e9},
        notes={"kd": "x"},
        seconds=0,
        energy=True,
    )
    assert ratios["kd"] == 1.0 and ratios["dad"] == pytest.approx(3.0)
    record = make_record(
        "steps", "tiny", bench.session.groups["steps"], bench.session.machine.describe(), 1.0
    )
    kd, dad = record["comparisons"][0]["rows"]
    # A CPU counts neither.
    assert kd["note"] == "x" and "note" not in dad and "peak_bytes" not in kd and "joules" not in kd
    assert dad["predicted"] == 4.0 and dad["per_second"] == pytest.approx(8e3 / dad["ms"]["median"])
    assert dad["tflops"] == pytest.approx(dad["per_second"] * 4e9 / 1e12)
    text = as_text(record["comparisons"][0])
    assert "ratio to 'kd'" in text and "4.00" in text and "peak" not in text and "predicted" in text


def test_missing_baseline(bench: Bench) -> None:
    with pytest.raises(ValueError, match="baseline 'x' is none of a"):
        bench.compare("b", {"a": lambda: None}, baseline="x", work=1)


def test_record_has_all_fields_and_no_paths(bench: Bench, tmp_path: Path) -> None:
    bench.compare("b", {"kd": lambda: None}, baseline="kd", work=1, seconds=0)
    record = make_record(
        "steps", "tiny", bench.session.groups["steps"], bench.session.machine.describe(), 1.0
    )
    path = record_path(tmp_path, record, bench.session.machine.slug)
    write_record(path, record)
    assert path.parent.name.startswith("tiny-cpu-") and path.name == "steps.json"
    assert read_record(path) == json.loads(json.dumps(record))
    machine = record["machine"]
    assert (
        machine["device"]["kind"] == "cpu"
        and machine["device"]["threads"] == torch.get_num_threads()
    )
    assert (
        machine["packages"]["torch"] == torch.__version__.partition("+")[0]
        or machine["packages"]["torch"] == torch.__version__
    )
    assert "load" in machine["start"] and "commit" in machine and isinstance(machine["dirty"], bool)
    text = path.read_text()
    assert str(ROOT) not in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": 99, "comparisons": []}', '{"schema": 1}']
)
def test_invalid_records_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="r.json: not") as error:
        read_record(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_record(tmp_path / "none.json")


def steps_record(
    dad: float, *, size: str = "tiny", name: str = "dad", cpu: str = "X"
) -> dict[str, Any]:
    ratio = {"median": dad, "q1": dad - 0.1, "q3": dad + 0.1, "min": dad - 0.2, "n": 9}
    rows = [{"name": "kd", "ratio": ratio | {"median": 1.0}}, {"name": name, "ratio": ratio}]
    machine = {"device": {"kind": "cpu", "cpu": cpu}, "commit": "abc", "dirty": False}
    return {
        "size": size,
        "machine": machine,
        "taken": "now",
        "comparisons": [{"name": "batch 32", "baseline": "kd", "rows": rows}],
    }


def test_growth_beyond_the_limit_is_named() -> None:
    assert overhead.grown(steps_record(5.0), steps_record(5.2), 0.05) == []
    (line,) = overhead.grown(steps_record(5.0), steps_record(5.3), 0.05)
    assert (
        "batch 32, against kd: dad costs 5.30 (5.20–5.40) times plain KD, 6.0% more than 5.00"
        in line
    )
    assert "no step benchmark ran" in overhead.grown(steps_record(5.0), None, 0.05)[0]
    assert (
        "of size base" in overhead.grown(steps_record(5.0, size="base"), steps_record(5.0), 0.05)[0]
    )
    assert "on Y" in overhead.grown(steps_record(5.0, cpu="Y"), steps_record(5.0), 0.05)[0]
    assert (
        "in common"
        in overhead.grown(steps_record(5.0, name="dad, old"), steps_record(5.0), 0.05)[0]
    )


def test_shares() -> None:
    assert (
        overhead.parse_share("5%")
        == pytest.approx(0.05)
        == pytest.approx(overhead.parse_share("0.05"))
    )
    for text in ("five", "-1%", "", "nan", "5000%"):
        with pytest.raises(ValueError, match="--fail-over"):
            overhead.parse_share(text)


def test_history_grows_by_a_line_per_comparison(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for dad in (5.0, 4.0):
        overhead.append_history(steps_record(dad), "cpu-x", path)
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["ratios"] == {"dad": [4.9, 5.0, 5.1]} and second["ratios"]["dad"][1] == 4.0
    assert (first["commit"], first["device"], first["size"], first["comparison"]) == (
        "abc",
        "cpu-x",
        "tiny",
        "batch 32, against kd",
    )


def test_overhead_is_drawn_over_commits(tmp_path: Path) -> None:
    history, chart = tmp_path / "history.jsonl", tmp_path / "overhead.svg"
    assert (
        overhead.main(["--history", str(history), "--output", str(chart)]) == 1
        and not chart.exists()
    )
    for dad in (5.0, 4.0, 4.5):
        overhead.append_history(steps_record(dad), "cpu-x", history)
    assert overhead.main(["--history", str(history), "--output", str(chart)]) == 0
    import xml.etree.ElementTree as ET

    root = ET.parse(chart).getroot()
    text = " ".join(root.itertext())
    assert (
        root.tag.endswith("svg") and "cpu-x · tiny · batch 32, against kd" in text and "abc" in text
    )
    history.write_text(history.read_text() + '{"torn')
    assert overhead.main(["--history", str(history), "--output", str(chart)]) == 1


def test_number() -> None:
    assert [number(value) for value in (0, 0.000123, 0.0123, 1.234, 12.34, 1234.5)] == [
        "0",
        "1.2e-04",
        "0.0123",
        "1.23",
        "12.3",
        "1,234",
    ]


def test_default_size_of_a_cpu() -> None:
    assert default_size(CPU) == "tiny"


def test_baseline_has_the_same_loss() -> None:
    """timm's distillation and our plain KD agree on the first step's loss: same images, labels,
    objective.
    """
    pytest.importorskip("timm.task")
    from benchmarks.timm_kd import TimmKD
    from benchmarks.workload import make_workload

    work = make_workload("tiny", CPU, 8)
    (metrics,) = work.step(work.with_method("kd"))(work.batch, 0, 1e-3)
    ours = metrics["loss"]
    assert TimmKD(work)().item() == pytest.approx(ours.item(), rel=1e-4)


def test_flops_are_those_of_the_stages() -> None:
    pytest.importorskip("open_clip")
    from benchmarks.workload import make_workload

    work = make_workload("tiny", CPU, 8)
    flops = work.flops
    # No gradient of a weight is in it.
    assert flops.of["teacher"] < flops.of["teacher_gradient"] <= 2.05 * flops.of["teacher"]
    assert flops.of["student_gradient"] < flops.of["student"] and flops.of_step(
        "dad", "authors"
    ) > flops.of_step("dad")


@pytest.mark.slow  # builds two large towers
def test_random_teachers_of_both_libraries_cost_the_same() -> None:
    pytest.importorskip("open_clip")
    from benchmarks.flops import count
    from benchmarks.workload import TOWERS, random_teacher

    meta, precision = torch.device("meta"), PrecisionConfig()
    for tower in TOWERS:
        flops = {}
        for library in ("open_clip", "timm"):
            with meta:
                teacher = random_teacher(tower, precision, meta, library)
                pixels = torch.empty(1, 3, 224, 224)
            assert teacher.name.startswith(f"{library}:{tower}")
            encoder = teacher.encoder
            flops[library] = count(lambda encoder=encoder, pixels=pixels: encoder(pixels))
        # Only open_clip's encoder ends in a projection.
        assert flops["open_clip"] == pytest.approx(flops["timm"], rel=0.001), tower
    default = random_teacher("ViT-B-16 of width 192", precision, CPU)
    assert default.name.startswith("open_clip:")
    assert default(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


def test_flops_of_published_shapes() -> None:
    """Compare with counts by hand: VQGAN f8 at 224 px 172.0 and 360.1 GFLOP, ViT-B/16 35.1
    (multiply-add = 2).
    """
    timm = pytest.importorskip("timm")
    from benchmarks.flops import count
    from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN

    with torch.device("meta"):
        vqgan, vit, pixels = (
            VQGAN(PRESETS["f8-16384"]),
            timm.create_model("vit_base_patch16_224"),
            torch.empty(1, 3, 224, 224),
        )
        codes = torch.zeros(1, 28, 28, dtype=torch.int64)
    assert count(lambda: vqgan.encode(pixels)) / 1e9 == pytest.approx(172.0, rel=0.002)
    assert count(lambda: vqgan.decode(codes)) / 1e9 == pytest.approx(360.1, rel=0.002)
    assert count(lambda: vit(pixels)) / 1e9 == pytest.approx(35.1, rel=0.002)
