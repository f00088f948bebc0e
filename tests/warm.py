"""Real processes without the cost of importing torch: forks of a process that has imported it.

`start` and `run` stand for subprocess.Popen and subprocess.run of Python with -m, -c or a script;
`popen` for a Popen with pipes to stdin and from stdout, as sweeps start their workers.
Each fork has its own pid, files and exit code. Not for tests that read output before the process
ends, ask for its parent, or depend on the start of Python: OMP_NUM_THREADS is 1, `preload` sets
LD_PRELOAD, there is no sitecustomize, and PYTHONHASHSEED is the same for all.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# Shows the number of threads.
HAS_PROC = Path("/proc/self/task").is_dir()
MODULES = (
    "torch",
    "timm",
    "open_clip",
    "sklearn.linear_model",
    "mlxtend.data",
    "dad_fast.cli.main",
    "dad_fast.sweep.train",
    "dad_fast.precompute.run",
    "dad_fast.distributed.process_group",
    "dad_fast.report.page",
)
_servers: dict[str, socket.socket] = {}


class Process:
    """The part of subprocess.Popen that tests use.

    stdout and stderr are files, read at the end, unless `streams` are given: the handles of stdin,
    stdout, stderr, and of what else the process holds open.
    """

    stdin: IO[str] | None = None
    stdout: IO[str] | None = None

    def __init__(
        self,
        args: list[str],
        server: socket.socket,
        env: dict[str, str],
        cwd: str,
        session: bool,
        streams: Sequence[int] = (),
    ):
        self.args = args
        self.returncode: int | None = None
        self._outputs: list[IO[bytes]] = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        self._lock = threading.Lock()
        ours, theirs = os.pipe()
        self._status = open(ours, "rb", buffering=0)
        case = {"arguments": args[1:], "environment": env, "cwd": cwd, "session": session}
        data = json.dumps(case).encode()
        with open(os.devnull) as nothing:
            files = (nothing, *self._outputs)
            handles = streams or [file.fileno() for file in files]
            socket.send_fds(server, [len(data).to_bytes(8, "big")], [theirs, *handles])
            server.sendall(data)
        os.close(theirs)
        self.pid = self._number()

    def _number(self) -> int:
        text = b""
        while not text.endswith(b"\n"):
            byte = self._status.read(1)
            assert byte, "the fork server has ended"
            text += byte
        return int(text)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            # Two threads may have waited.
            with self._lock:
                if self.returncode is None:
                    self.returncode = self._number()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in self._outputs:
            file.seek(0)
        stdout, stderr = (file.read().decode() for file in self._outputs)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    command: list[str],
    env: dict[str, str] | None = None,
    cwd: Any = None,
    start_new_session: bool = False,
    preload: str = "",
) -> Any:
    """Start a Python command in a fork. Without /proc, which shows the threads, in a subprocess."""
    if not HAS_PROC:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            command, env=env, cwd=cwd, start_new_session=start_new_session, **pipes
        )
    return _fork(command, env, cwd, start_new_session, preload)


def popen(
    command: list[str],
    *,
    stdin: int,
    stdout: int,
    stderr: Any,
    text: bool,
    env: dict[str, str],
    start_new_session: bool,
    pass_fds: Sequence[int] = (),
) -> Any:
    """Stand for subprocess.Popen with pipes to stdin and from stdout, both of text."""
    assert stdin == stdout == subprocess.PIPE and text
    read_stdin, write_stdin = os.pipe()
    read_stdout, write_stdout = os.pipe()
    with open(os.devnull, "w") as nothing:
        errors = nothing if stderr == subprocess.DEVNULL else stderr
        streams = (read_stdin, write_stdout, errors.fileno(), *pass_fds)
        process = _fork(command, env, None, start_new_session, streams=streams)
    os.close(read_stdin)
    os.close(write_stdout)
    process.stdin, process.stdout = open(write_stdin, "w"), open(read_stdout)
    return process


def _fork(
    command: list[str],
    env: dict[str, str] | None,
    cwd: Any,
    session: bool,
    preload: str = "",
    streams: Sequence[int] = (),
) -> Process:
    is_python = command[1] in ("-c", "-m") or command[1].endswith(".py")
    assert command[0] == sys.executable and is_python, command
    environment = {str(k): str(v) for k, v in (os.environ if env is None else env).items()}
    environment["OMP_NUM_THREADS"] = "1"
    if preload not in _servers:
        _servers[preload] = _start_server(preload)
    server, folder = _servers[preload], str(cwd or Path.cwd())
    return Process(command, server, environment, folder, session, streams)


def run(
    command: list[str], timeout: float | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a Python command in a fork and return its outputs."""
    process = start(command, **more)
    try:
        outputs = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.wait(), *outputs)


def _start_server(preload: str) -> socket.socket:
    ours, theirs = socket.socketpair()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # pandas imports pyarrow, whose allocator would start a thread.
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    if preload:
        environment["LD_PRELOAD"] = preload
    command = [sys.executable, str(Path(__file__)), str(theirs.fileno())]
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], cwd=ROOT)
    theirs.close()
    atexit.register(process.wait)
    # Runs first, and ends the server.
    atexit.register(ours.close)
    return ours


def _serve(server: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in a child, and None in the server at the end."""
    while True:
        size, handles, _, _ = socket.recv_fds(server, 8, 8)
        if not size:
            return None
        wanted = int.from_bytes(size, "big")
        data = b""
        while len(data) < wanted:
            data += server.recv(wanted - len(data))
        if keeper := os.fork():
            for handle in handles:
                os.close(handle)
            # Reap the children that have ended.
            while keeper:
                try:
                    keeper = os.waitpid(-1, os.WNOHANG)[0]
                except ChildProcessError:
                    break
            continue
        server.close()
        # What follows them stays open.
        status, stdin, stdout, stderr = handles[:4]
        if child := os.fork():
            # The parent waits, and reports the child's pid and exit code.
            os.write(status, f"{child}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.write(status, f"{code}\n".encode())
            os._exit(0)
        os.close(status)
        for handle, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(handle, target)
            os.close(handle)
        request: dict[str, Any] = json.loads(data)
        return request


def _become(request: dict[str, Any]) -> None:
    """Run the requested command as Python would."""
    import runpy

    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    kind, *arguments = request["arguments"]
    if kind == "-m":
        sys.path[0], sys.argv = request["cwd"], ["-m", *arguments[1:]]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        main = sys.modules["__main__"]
        del main.__file__
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv = str(Path(kind).parent), [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")


def _end(code: int) -> None:
    """Exit like Python, without unloading modules, which takes half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    import gc
    import importlib
    import traceback

    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError:
            pass
    assert len(os.listdir("/proc/self/task")) == 1, "a fork needs a process of one thread"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    found = _serve(socket.socket(fileno=int(sys.argv[1])))
    if found is None:
        sys.exit()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        _become(found)
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    _end(code)
