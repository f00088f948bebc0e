"""Forbidden calls: execute data, use a shell, unpack into the file system, download."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for folder in ("dad_fast", "kernels", "scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)

# Calls that execute their input, or create objects of any type from it.
RUN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.jit.load",
    "torch.hub.load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "jsonpickle.decode",
}
# Calls that write to paths given by an archive, or to names that others may have created.
WRITE = {"tarfile.open", "shutil.unpack_archive", "tempfile.mktemp", "os.tempnam"}
FETCH = ("urllib.request", "requests", "httpx", "aiohttp", "ftplib", "http.client")
ALLOWED = {
    # With weights_only=True, asserted below.
    "torch.load": {"dad_fast/models/weights/pickles.py"},
    # Of a file just written by the same code.
    "torch.export.load": {"dad_fast/tools/export/graph.py"},
    # Only to write archives.
    "tarfile.open": {"benchmarks", "scripts/gpu_check.py"},
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def test_no_call_executes_its_input() -> None:
    found = []
    for path in FILES:
        for name, call in calls(path):
            where = f"{named(path)}:{call.lineno}: {name}"
            is_allowed = any(named(path).startswith(place) for place in ALLOWED.get(name, ()))
            is_risky = name in RUN | WRITE | {"torch.load", "torch.export.load"}
            if is_risky and not is_allowed:
                found.append(where)
            if name == "torch.load" and keyword(call, "weights_only") != "True":
                found.append(f"{where} without weights_only=True")
            reads_pickles = keyword(call, "allow_pickle") not in (None, "False")
            if name in ("np.load", "numpy.load") and reads_pickles:
                found.append(f"{where} with pickles")
            if name.endswith((".extract", ".extractall")):
                found.append(where)
    assert len(FILES) > 100 and not found, found


def test_no_command_uses_a_shell() -> None:
    """Programs are started with a list of arguments."""
    found = []
    for path in FILES:
        for name, call in calls(path):
            if not name.startswith("subprocess."):
                continue
            is_text = isinstance(call.args[0], (ast.Constant, ast.JoinedStr))
            if keyword(call, "shell") is not None or is_text:
                found.append(f"{named(path)}:{call.lineno}: {name}")
    assert not found, found


def test_no_module_imports_network_or_pickle_packages() -> None:
    """Only the hub's client downloads, for names that ask for it, and the source of shards behind
    URLs. pickletools executes nothing.
    """
    found = []
    for path in FILES:
        if named(path) == "dad_fast/data/sources/http.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                package = name.split(".")[0]
                if name.startswith(FETCH) or package in ("pickle", "yaml", "shelve", "marshal"):
                    found.append(f"{named(path)}: {name}")
    assert not found, found


INSTALLED = f"""
import multiprocessing, subprocess, sys
sys.path.append({str(ROOT)!r})
if __name__ == "__main__":
    from dad_fast.cli.main import main
    from dad_fast.distributed.launch import PROGRAM

    main(["--version"])
    process = multiprocessing.get_context("forkserver").Process(target=print, args=("worker",))
    process.start()
    process.join()
    sys.exit(process.exitcode or subprocess.run([*PROGRAM, "--version"]).returncode)
"""


def test_no_module_is_imported_from_the_current_folder(tmp_path: Path) -> None:
    """Child processes (loader workers, ranks) must not import files from a data folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dad-fast").write_text(INSTALLED)
    (tmp_path / "data").mkdir()
    for name in ("selectors", "dad_fast", "socket", "sitecustomize"):
        (tmp_path / "data" / f"{name}.py").write_text(
            f"raise SystemExit('{name}.py of the data was run')"
        )
    done = subprocess.run(
        [sys.executable, tmp_path / "bin" / "dad-fast"],
        capture_output=True,
        text=True,
        cwd=tmp_path / "data",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "was run" not in done.stdout + done.stderr, done.stderr
    assert done.stdout.count("dad-fast ") == 2 and "worker" in done.stdout


NO_NETWORK = """
import socket, sys, time
def refuse(self, address, *rest):
    if self.family != socket.AF_UNIX:
        print("NETWORK", address, file=sys.stderr)
        raise OSError("no network in this test")
    return connect(self, address, *rest)
connect = socket.socket.connect
socket.socket.connect = refuse
def nobody(host, *rest, **named):
    print("NETWORK", host, file=sys.stderr)
    raise OSError("no network in this test")
socket.getaddrinfo = nobody
import json
from dad_fast.cli.main import main
code = max(main(command) for command in json.loads(sys.argv[1]))
print("DOWNLOAD", file=sys.stderr)
# The hub's client waits between its tries.
time.sleep = lambda seconds: None
try:
    import timm
    timm.create_model("resnet10t", pretrained=True)
except Exception:
    sys.exit(code)
sys.exit("downloaded without network")
"""


def test_commands_with_local_names_use_no_network(tmp_path: Path) -> None:
    """Covers train, evaluation, export and predict, with the hub's client as users have it.

    A download at the end checks that the test would notice one.
    """
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    from tests.tiny import STUDENT, write_images, write_teacher, write_vqgan

    data = write_images(tmp_path / "data")
    teacher = write_teacher(tmp_path / "t.safetensors")
    vqgan = write_vqgan(tmp_path / "q.ckpt")
    run, out = tmp_path / "run", tmp_path / "out"
    train = [*shlex.split("train --method dad --data-dir"), data, "--teacher", teacher]
    train += ["--discretizer", vqgan, *STUDENT, *shlex.split("-b 8 -j0 --device cpu --max-steps 2")]
    train += [*shlex.split("--epochs 1 --warmup-epochs 0 -o"), run]
    commands = [train, ["export", run, "-o", out], ["predict", out, data / "val"]]
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "TRANSFORMERS_"))
    }
    caches = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, json.dumps(commands, default=str)],
        capture_output=True,
        text=True,
        env=environment | caches,
        cwd=ROOT,
    )
    ours, _, download = done.stderr.partition("DOWNLOAD")
    assert done.returncode == 0 and "NETWORK" not in ours, done.stderr
    assert "NETWORK" in download
