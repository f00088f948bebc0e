"""Check this checkout on a CUDA machine in less than ten minutes. Not yet run on a GPU.

    scripts/gpu_check.sh                  all parts, in 9.5 minutes on one H200
    scripts/gpu_check.sh steps memory     some of them, again

{parts}

Every part runs in its own processes and has its own time limit; time that a part leaves unused goes
to the next ones. A part that fails, hangs or breaks the GPU's context does not stop the next one.

Results, written as they come: runs/gpu_check/PART.json, logs, records of the benchmarks, and
manifest.json. A summary of less than 12,000 characters comes last; its first line is the command
that repeats what failed. With OUT set, OUT/gpu_check.tar.gz and OUT/summary.txt hold all of it,
renewed during every part, so that a killed run keeps its results. scripts/gpu_report.py makes
tables of the records.

`--device cpu` rehearses every part at size tiny. In a copy without git history set the commit for
the records: DAD_FAST_COMMIT=$(git rev-parse HEAD).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_parts import PARTS, Call, Part, Skipped
from gpu_report import measured, targets

RESERVE_SECONDS = 15.0  # of --minutes, to stop the last part and to pack
STOP_SECONDS = 5.0  # for a stopped command to report
PACK_SECONDS = 15.0  # between copies to OUT
SUMMARY_CHARACTERS = 11_500
FAILURES, FAILURE_CHARACTERS = 12, 240  # of a part

Result = dict[str, Any]


class Command:
    """A running command of a part, in a process group of its own."""

    def __init__(self, words: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.words, self.log = words, log
        self.started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            print("$", *words, file=file, flush=True)
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:  # all processes have ended
            pass

    def result(self) -> Result:
        """Return the command's verdict, the last line of its log, and the lines of failures."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = self.process.poll()
        last = lines[-1].strip("= ")
        is_pytest = "pytest" in self.words
        found: Result = {
            "command": " ".join(self.words[1:]).replace(f"{ROOT}/", ""),
            "log": self.log.name,
            "seconds": round(time.monotonic() - self.started, 1),
            "code": code,
            "last": last[:FAILURE_CHARACTERS],
        }
        nothing_ran = is_pytest and code in (0, 5) and " passed" not in last
        # 3: exit code of our commands for an environment that lacks something.
        if nothing_ran or (not is_pytest and code == 3):
            return found | {"verdict": "skipped"}
        if code == 0:
            return found | {"verdict": "passed"}
        named = [line for line in lines if line.startswith(("FAILED ", "ERROR "))] or lines[-4:]
        return found | {
            "verdict": "failed",
            "failures": [line[:FAILURE_CHARACTERS] for line in named],
        }


def stop(commands: Sequence[Command]) -> None:
    """End commands with their children: SIGINT first, so that pytest still reports."""
    running = [command for command in commands if command.process.poll() is None]
    for command in running:
        command.signal(signal.SIGINT)
    until = time.monotonic() + STOP_SECONDS
    while time.monotonic() < until and any(one.process.poll() is None for one in running):
        time.sleep(0.1)
    for command in commands:  # also for children that outlive their parent
        command.signal(signal.SIGKILL)
        command.process.wait()


def run(part: Part, call: Call, deadline: float, keep: Callable[[], None]) -> Result:
    """Run a part's commands until all are done or `deadline` (time.monotonic) has passed.

    keep: called now and then meanwhile, to save what there is.
    """
    started = last_kept = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    done: list[Result] = []
    running: list[Command] = []
    result: Result = {"part": part.name, "device": call.device, "size": call.size}
    with tempfile.TemporaryDirectory(
        prefix="dad-fast-gpu-check-", ignore_cleanup_errors=True
    ) as cache:
        environment["DAD_FAST_CACHE"] = cache
        try:
            waiting = part.commands(call)
            total = len(waiting)
            while (waiting or running) and time.monotonic() < deadline:
                while waiting and len(running) < part.side_by_side:
                    number = total - len(waiting)
                    log = call.out / f"{part.name}-{number}.log"
                    running.append(Command(waiting.pop(0), log, environment))
                for command in [one for one in running if one.process.poll() is not None]:
                    stop([command])
                    running.remove(command)
                    done.append(command.result())
                if time.monotonic() - last_kept > PACK_SECONDS:
                    keep()
                    last_kept = time.monotonic()
                time.sleep(0.05)
            late = len(waiting) + len(running)
            stop(running)
            done += [command.result() | {"verdict": "stopped"} for command in running]
            running = []
            result |= verdict(done)
            if late:
                why = f"ran past its limit of {deadline - started:.0f} s"
                if total > 1:
                    why += f" with {late} of {total} commands left"
                result |= {"verdict": "failed", "reason": why}
        except Skipped as reason:
            result |= {"verdict": "skipped", "reason": str(reason)}
        # A fault of this script must not cost the next part, either.
        except Exception as error:
            result |= {"verdict": "failed", "reason": f"{type(error).__name__}: {error}"}
        finally:
            stop(running)
    return result | {"seconds": round(time.monotonic() - started, 1), "commands": done}


def verdict(done: Sequence[Result]) -> Result:
    """Return the verdict of a part from those of its commands."""
    failed = [one for one in done if one["verdict"] == "failed"]
    tests = re.findall(
        r"(\d+) (passed|failed|skipped|error)", " ".join(one["last"] for one in done)
    )
    counts: dict[str, int] = {}
    for number, word in tests:
        counts[word] = counts.get(word, 0) + int(number)
    found: Result = {"counts": counts} if counts else {}
    if named := [line for one in done for line in one.get("failures", [])]:
        more = [f"and {len(named) - FAILURES} more"] if len(named) > FAILURES else []
        found["failures"] = named[:FAILURES] + more
    if failed:
        reason = f"exit code {failed[0]['code']}: {failed[0]['last']}"
        return found | {"verdict": "failed", "reason": reason}
    if done and all(one["verdict"] == "skipped" for one in done):
        return found | {"verdict": "skipped", "reason": done[0]["last"]}
    return found | {"verdict": "passed"}


def check(parts: Sequence[Part], call: Call, seconds: float) -> bool:
    """Run `parts` within `seconds`, shared by the parts' own. Returns whether none failed."""
    scale = seconds / sum(part.seconds for part in parts)
    deadline = time.monotonic()
    results = []
    for part in parts:
        # What earlier parts left unused is this part's, too.
        deadline += scale * part.seconds
        own = max(0.0, deadline - time.monotonic())
        running = {"part": part.name, "device": call.device, "size": call.size}
        enter(call, running | {"verdict": "running"})
        pack(call.out)
        own_call = Call(call.device, call.size, call.out, own)
        result = run(part, own_call, deadline, lambda: pack(call.out))
        write(call.out / f"{part.name}.json", result)
        enter(call, {key: value for key, value in result.items() if key != "commands"})
        pack(call.out)
        results.append(result)
        why = f" ({result['reason']})" if "reason" in result else ""
        print(f"{part.name}: {result['verdict']}{why}, {result['seconds']} s", flush=True)
    return all(result["verdict"] != "failed" for result in results)


def enter(call: Call, entry: Result) -> None:
    """Replace a part's entry in the manifest; entries of another device or size go."""
    manifest = call.out / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else []
    same = [one for one in entries if (one["device"], one["size"]) == (call.device, call.size)]
    kept = [one for one in same if one["part"] != entry["part"]]
    order = [part.name for part in PARTS]
    write(manifest, sorted([*kept, entry], key=lambda one: order.index(one["part"])))


def write(file: Path, value: Any) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def pack(out: Path) -> None:
    """Copy the results so far to the folder OUT, if it is set; a failure is only printed."""
    if not os.environ.get("OUT"):
        return
    target = Path(os.environ["OUT"])
    packed = target / "gpu_check.tar.gz"
    kinds = (".json", ".log")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "summary.txt").write_text(summary(out), encoding="utf-8")
        with tarfile.open(packed.with_suffix(".tmp"), "w:gz") as archive:
            for path in sorted(path for path in out.rglob("*") if path.suffix in kinds):
                # Read first: a running part's files grow.
                content = path.read_bytes()
                entry = tarfile.TarInfo(f"gpu_check/{path.relative_to(out)}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        packed.with_suffix(".tmp").replace(packed)
    except OSError as error:
        print(f"gpu_check: results are not in {target}: {error}", flush=True)


def summary(out: Path) -> str:
    """Return what to repeat, a line per part with its failures, targets, and what was measured."""
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    again = [one["part"] for one in manifest if one["verdict"] in ("failed", "running")]
    lines = [f"to repeat what failed: scripts/gpu_check.sh {' '.join(again)}"] if again else []
    for one in manifest:
        counts = [f"{number} {word}" for word, number in one.get("counts", {}).items()]
        seconds = [f"{one['seconds']} s"] if "seconds" in one else []
        details = ", ".join([*seconds, *counts, one.get("reason", "")]).strip(", ")
        lines.append(f"{one['part']:<9} {one['verdict']:<8} {details}"[:FAILURE_CHARACTERS])
        lines += [f"    {line}" for line in one.get("failures", [])]
    lines += ["", *targets(out / "records"), "", *measured(out / "records")]
    text = "\n".join(lines) + "\n"
    if len(text) > SUMMARY_CHARACTERS:
        text = text[:SUMMARY_CHARACTERS].rpartition("\n")[0] + "\n... cut\n"
    return text


def machine(out: Path) -> Result:
    """Write machine.json, by another process: this one must outlive a broken CUDA context."""
    code = (
        "import json; from dad_fast.loggers.environment import environment; "
        "print(json.dumps(environment()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    facts = json.loads(done.stdout) if done.returncode == 0 else {"gpus": []}
    write(out / "machine.json", facts)
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    table = [f"    {part.name:<9}{part.seconds:>4.0f} s   {part.summary}" for part in PARTS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("{parts}", "\n".join(table)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run [all]")
    parser.add_argument(
        "--minutes", type=float, help="time of the whole run, shared by its parts [their sum]"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    parser.add_argument(
        "--size",
        choices=("tiny", "base", "paper"),
        help="models and inputs [paper on a GPU, tiny on a CPU]",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "gpu_check", metavar="DIR")
    options = parser.parse_args(arguments)
    names = {part.name: part for part in PARTS}
    if unknown := [name for name in options.parts if name not in names]:
        parser.error(f"unknown part {unknown[0]} (parts: {', '.join(names)})")
    parts = [part for part in PARTS if part.name in (options.parts or names)]

    started = time.monotonic()
    out = options.results.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not machine(out)["gpus"] and options.device == "cuda":
        print(
            "gpu_check: torch sees no CUDA device here; run it on a GPU machine (or rehearse with "
            "--device cpu)",
            file=sys.stderr,
        )
        return 3
    size = options.size or ("paper" if options.device == "cuda" else "tiny")
    seconds = sum(part.seconds for part in parts)
    if options.minutes is not None:
        seconds = 60 * options.minutes - (time.monotonic() - started) - RESERVE_SECONDS
    # A terminated run stops its commands.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        passed = check(parts, Call(options.device, size, out, seconds), seconds)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{summary(out)}", end="", flush=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
