"""scripts/gpu_check and scripts/gpu_report: verdicts, limits, what a killed run leaves, and tables of
committed records.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import HANG, wait_until

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_report = script("gpu_report")
gpu_parts = script("gpu_parts")
gpu_check = script("gpu_check")
PASSES = "print('fine')"
HANGS = "import time; print('waits', flush=True); time.sleep(3600)"


@pytest.fixture(autouse=True)
def _no_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def part(name: str, *codes: str, seconds: float = HANG, side_by_side: int = 1) -> Any:
    commands = [python(code) for code in codes]
    return gpu_check.Part(name, seconds, "", lambda call: list(commands), side_by_side)


def check(out: Path, *parts: Any, seconds: float = 0.0) -> dict[str, dict[str, Any]]:
    """Run parts, which have names of real ones; return their manifest entries by name."""
    call = gpu_check.Call("cpu", "tiny", out, 0.0)
    passed = gpu_check.check(parts, call, seconds or sum(one.seconds for one in parts))
    entries = json.loads((out / "manifest.json").read_text())
    found = {one["part"]: one for one in entries}
    assert passed == all(found[one.name]["verdict"] != "failed" for one in parts)
    return found


def test_a_broken_part_does_not_stop_the_next(tmp_path: Path) -> None:
    def raises(call: Any) -> Any:
        raise OSError("no such file")

    def skips(call: Any) -> Any:
        raise gpu_check.Skipped("not installed: some_package")

    found = check(
        tmp_path,
        part("smoke", "print('what went wrong'); raise SystemExit(7)"),
        part("steps", "import os; os.abort()"),
        gpu_check.Part("stages", HANG, "", raises),
        gpu_check.Part("csrc", HANG, "", skips),
        part("tuning", "print('no GPU here'); raise SystemExit(3)"),
        part("ceilings", PASSES),
    )
    verdicts = {name: (one["verdict"], one.get("reason")) for name, one in found.items()}
    assert verdicts == {
        "ceilings": ("passed", None),
        "smoke": ("failed", "exit code 7: what went wrong"),
        "steps": ("failed", verdicts["steps"][1]),
        "stages": ("failed", "OSError: no such file"),
        "csrc": ("skipped", "not installed: some_package"),
        "tuning": ("skipped", "no GPU here"),
    }
    assert list(found)[:3] == ["ceilings", "smoke", "steps"]
    assert "what went wrong" in (tmp_path / "smoke-0.log").read_text()
    # Run again: the part's entry is replaced, the others stay.
    again = check(tmp_path, part("smoke", PASSES))
    assert again["smoke"]["verdict"] == "passed" and again.keys() == found.keys()


def test_a_part_beyond_its_limit_is_killed_and_named(tmp_path: Path) -> None:
    """With its children: surviving workers would keep the GPU's memory and time."""
    child = tmp_path / "child"
    ignores = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(3600)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", {ignores!r}])
open({str(child)!r}, "w").write(str(child.pid))
print("started", flush=True)
time.sleep(3600)
"""
    limit = 3.0
    while not child.exists():  # a busy machine takes longer to start it
        found = check(tmp_path, part("smoke", code, seconds=limit), part("steps", PASSES))
        limit *= 3
    reason = found["smoke"]["reason"]
    assert found["smoke"]["verdict"] == "failed" and "ran past its limit of " in reason
    assert found["steps"]["verdict"] == "passed"

    def ended() -> bool:
        try:
            os.kill(int(child.read_text()), 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{child.read_text()}/stat")
        # A zombie: its exit code was not collected.
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"

    wait_until(ended)


def test_commands_run_side_by_side_and_a_limit_keeps_those_that_ended(tmp_path: Path) -> None:
    meet = """
import os, sys, time
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[2]): time.sleep(0.02)
print("2 passed in 1 s")
"""
    files = [str(tmp_path / name) for name in "ab"]
    commands = [[*python(meet), *files], [*python(meet), *reversed(files)]]
    together = gpu_check.Part("tests", HANG, "", lambda call: list(commands), side_by_side=2)
    assert check(tmp_path, together)["tests"]["verdict"] == "passed"

    one_hangs = part("tests", PASSES, HANGS, PASSES, seconds=2.0, side_by_side=2)
    reason = check(tmp_path, one_hangs)["tests"]["reason"]
    assert re.fullmatch(r"ran past its limit of 2 s with [123] of 3 commands left", reason)


def test_parts_get_the_time_that_earlier_ones_left(tmp_path: Path) -> None:
    given: list[float] = []

    def commands(call: Any) -> list[list[str]]:
        given.append(call.seconds)
        return [python(PASSES)]

    parts = [gpu_check.Part(name, 100.0, "", commands) for name in ("smoke", "steps")]
    check(tmp_path, *parts, seconds=20 * HANG)
    assert given[0] <= 10 * HANG < given[1] < 20 * HANG


RUNNER = """
import sys
sys.path.insert(0, {scripts!r})
import gpu_check
from pathlib import Path

gpu_check.PACK_SECONDS = 0.1
gpu_check.machine = lambda out: {{"gpus": []}}
names = iter(["ceilings", "smoke"])
commands = iter([[[sys.executable, "-S", "-c", {passes!r}]], [[sys.executable, "-S", "-c", {hangs!r}]]])
gpu_check.PARTS = [
    gpu_check.Part(name, {limit}, "", lambda call: next(commands)) for name in names
]
gpu_check.main(["--device", "cpu", "--results", {out!r}])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_results_exist_after_a_kill_of_the_whole_run(
    tmp_path: Path, number: signal.Signals
) -> None:
    out, target = tmp_path / "results", tmp_path / "OUT"
    pid = tmp_path / "pid"
    hangs = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid())); {HANGS}"
    code = RUNNER.format(
        scripts=str(ROOT / "scripts"), passes=PASSES, hangs=hangs, limit=HANG, out=str(out)
    )
    runner = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OUT": str(target)})
    packed = target / "gpu_check.tar.gz"
    try:
        wait_until(lambda: pid.exists() and pid.read_text())
        before = packed.stat().st_mtime_ns
        wait_until(lambda: packed.stat().st_mtime_ns > before)
        before = packed.stat().st_mtime_ns
        wait_until(lambda: packed.stat().st_mtime_ns > before)
    finally:
        runner.send_signal(number)
        runner.wait(timeout=HANG)
    try:
        assert json.loads((out / "ceilings.json").read_text())["verdict"] == "passed"
        with tarfile.open(packed) as archive:
            names = set(archive.getnames())
        kept = {"ceilings.json", "manifest.json", "smoke-0.log"}
        assert {f"gpu_check/{name}" for name in kept} <= names
        text = (target / "summary.txt").read_text()
        assert text.startswith("to repeat what failed: scripts/gpu_check.sh smoke\n")
        assert re.search(r"^ceilings +passed", text, re.MULTILINE)
        assert re.search(r"^smoke +running", text, re.MULTILINE)
        if number == signal.SIGTERM:  # its commands ended with it
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid.read_text()), 0)
    finally:
        if number == signal.SIGKILL:
            os.kill(int(pid.read_text()), signal.SIGKILL)


def test_summary_is_short_and_begins_with_the_next_call(tmp_path: Path) -> None:
    code = "print(*[f'FAILED tests/test_a.py::b{i} - {500 * str(i)}' for i in range(50)], sep='\\n'); raise SystemExit(1)"
    check(tmp_path, part("smoke", code), part("tests", code))
    folder = tmp_path / "records" / "paper-some-gpu"
    folder.mkdir(parents=True)
    large = record()
    large["comparisons"] *= 100
    (folder / "stages.json").write_text(json.dumps(large))
    text = gpu_check.summary(tmp_path)
    assert text.startswith("to repeat what failed: scripts/gpu_check.sh smoke tests\n")
    assert "    and 38 more" in text and "VQGAN f8, decode" in text
    assert 5_000 < len(text) < 12_000 and text.endswith("... cut\n")


def test_parts_fit_into_one_call_and_name_benchmarks_and_tests() -> None:
    assert sum(one.seconds for one in gpu_check.PARTS) <= 9.5 * 60 - gpu_check.RESERVE_SECONDS
    call = gpu_check.Call("cuda", "paper", ROOT / "runs", 60.0)
    for one in gpu_check.PARTS:
        if one.name == "csrc":
            continue
        commands = one.commands(call)
        files = [word for command in commands for word in command if word.endswith(".py")]
        assert commands and all((ROOT / file).exists() for file in files)
        assert files or one.name == "tuning"
    assert "tests/engine/test_cuda_graph.py" in str(gpu_parts.gpu_tests(call))


def test_missing_gpu_and_unknown_parts_are_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "stepz"]
    environment = os.environ | {"PYTHON": sys.executable}
    unknown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert unknown.returncode == 2 and "unknown part stepz (parts: ceilings," in unknown.stderr
    monkeypatch.setattr(gpu_check, "machine", lambda out: {"gpus": []})
    assert gpu_check.main(["tests", "--results", str(tmp_path)]) == 3
    assert "torch sees no CUDA device here" in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_can_be_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    for package in ("torch", "timm", "open_clip", "mlxtend"):
        pytest.importorskip(package)
    arguments = ["--device", "cpu", "--minutes", "60", "--results", str(tmp_path)]
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    verdicts = {one["part"]: one["verdict"] for one in manifest}
    assert list(verdicts) == [one.name for one in gpu_check.PARTS]
    skipped = {name for name, verdict in verdicts.items() if verdict == "skipped"}
    assert skipped <= {"csrc", "tests", "tuning"}  # they need tools or a GPU
    groups = {path.stem for path in (tmp_path / "records").rglob("*.json")}
    assert groups == {"ceilings", "smoke", "steps", "stages", "end_to_end", "memory", "vqgan"}
    machine = json.loads(next((tmp_path / "records").rglob("smoke.json")).read_text())["machine"]
    assert {"commit", "packages", "device", "start", "end"} <= machine.keys()


# --- tables and targets ---


def test_targets_are_read_from_records_of_a_gpu_at_size_paper(tmp_path: Path) -> None:
    assert gpu_report.targets(tmp_path) == []
    steps = record() | {"group": "steps"}
    comparison = steps["comparisons"][0] | {"name": "batch 256, kernels and graphs"}
    row = comparison["rows"][1]
    row |= {"name": f"{gpu_report.PAPER}, kernels, graphs", "ratio": row["ratio"] | {"median": 5.1}}
    steps["comparisons"] = [comparison]
    file = tmp_path / "steps.json"
    file.write_text(json.dumps(steps | {"machine": record("cpu")["machine"]}))
    assert gpu_report.targets(tmp_path) == []
    file.write_text(json.dumps(steps))
    lines = gpu_report.targets(tmp_path)
    assert len(lines) == 1 + len(gpu_report.TARGETS)
    assert re.search(r"ViT-B/16 +<= 5.3 x +5.1 x, met$", lines[1])
    assert re.search(r">= 315 img/s +1,000 img/s, met$", lines[2]) and lines[3].endswith(" -")


def test_targets_name_rows_that_the_benchmarks_have() -> None:
    text = {
        group: (ROOT / "benchmarks" / f"test_{group}.py").read_text()
        for group in ("steps", "stages", "stored")
    }
    asked: list[tuple[str, ...]] = []

    def lookup(*words: str) -> float:
        asked.append(words)
        return 1.0

    for target in gpu_report.TARGETS:
        target.measure(lookup)
    for group, comparison, row, _key in asked:
        assert f'"{row}"' in text[group], row
        # "batch 256, FORM" or "ResNet-50, batch 256"
        first, _, form = comparison.partition(", ")
        assert not form or f'"{form}"' in text[group] or first == "ResNet-50", comparison


def record(kind: str = "cuda") -> dict[str, Any]:
    spread = {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "n": 9}
    rows = [
        {
            "name": "kd (timm)",
            "ms": spread,
            "ratio": spread | {"median": 1.0},
            "per_second": 3280.0,
            "tflops": 400.0,
            "joules": 0.5,
        },
        {
            "name": "dad",
            "ms": spread,
            "ratio": spread,
            "per_second": 1000.0,
            "tflops": 600.0,
            "predicted": 5.2,
            "peak_bytes": 2**30,
        },
    ]
    gemm = [{"name": "8192", "ms": spread, "ratio": spread, "per_second": 1.0, "tflops": 800.0}]
    device = {
        "kind": kind,
        "cpu": "Some CPU",
        "threads": 2,
        "name": "NVIDIA H200",
        "driver": "580.1",
    }
    return {
        "schema": 1,
        "group": "stages",
        "size": "paper",
        "taken": "2026-11-21T07:00:00Z",
        "seconds": 1,
        "machine": {
            "device": device,
            "start": {},
            "end": {"sm_mhz": 1755, "power_w": 512.5},
            "cpu_share_of_others": 0.25,
            "commit": "0123456789ab",
            "dirty": True,
            "packages": {"torch": "2.11.0", "timm": "1.0.31"},
        },
        "comparisons": [
            {
                "name": "batch 256",
                "unit": "img",
                "work": 256,
                "baseline": "kd (timm)",
                "rows": rows,
            },
            {
                "name": "matrix product",
                "unit": "product",
                "work": 1,
                "baseline": "8192",
                "rows": gemm,
            },
        ],
    }


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    text = gpu_report.markdown(record(), path, "stages.json")
    assert (
        "NVIDIA H200, driver 580.1, 1755 MHz and 512 W at the end; torch 2.11.0, timm 1.0.31; commit 012345678 with uncommitted"
        in text
    )
    assert (
        "| dad | 2 | 1.50–2.50 |".replace("1.50–2.50", "1.5–2.5") in text
        and "| 75% |" in text
        and "| 1024 |" in text
        and "5.20" in text
    )
    on_cpu = gpu_report.markdown(record("cpu"), path, "stages.json")
    assert (
        "Some CPU, threads: 2" in on_cpu
        and "took 25%" in on_cpu
        and "TFLOP" not in on_cpu
        and "3,280" not in on_cpu
    )


def test_documents_are_renewed_from_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages.json").write_text(json.dumps(record()))
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- records: stages.json -->\nold\n<!-- end records -->\nafter\n")
    assert gpu_report.main(["--update", str(document), "--check"]) == 1
    assert gpu_report.main(["--update", str(document)]) == 0
    text = document.read_text()
    assert (
        text.startswith("before\n<!-- records")
        and text.endswith("<!-- end records -->\nafter\n")
        and "old" not in text
        and "| dad |" in text
    )
    assert gpu_report.main(["--update", str(document), "--check"]) == 0
    (tmp_path / "stages.json").write_text("{}")
    capsys.readouterr()
    assert (
        gpu_report.main(["--update", str(document)]) == 1
        and capsys.readouterr().err.count("\n") == 1
    )
    assert document.read_text() == text


def test_committed_tables_match_committed_records() -> None:
    """Numbers in documents come from records."""
    documents = [
        path for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md") if path.exists()
    ]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        assert gpu_report.renewed(text, document) == text, (
            f"run scripts/gpu_report.py --update {document.name}"
        )


def test_committed_records_hold_no_paths() -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert not re.search(
            r'"(/|[A-Z]:\\)|/(home|root|tmp|work)/', path.read_text(encoding="utf-8")
        ), path
