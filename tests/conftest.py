"""Set-up of every test: no network, no file in $HOME, one thread per worker, gpu tests on CUDA."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before torch is imported: several workers would compete for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Waiting threads sleep, and leave their core to other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
# Help screens and tables follow it.
os.environ.pop("COLUMNS", None)
# One cache per process; child processes inherit it.
os.environ["DAD_FAST_CACHE"] = tempfile.mkdtemp(prefix="dad-fast-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["DAD_FAST_CACHE"], "datasets")
atexit.register(shutil.rmtree, os.environ["DAD_FAST_CACHE"], ignore_errors=True)

try:
    from hypothesis import settings
except ImportError:
    # A bare checkout: tests with hypothesis skip themselves.
    pass
else:
    settings.register_profile(
        "dad-fast", deadline=None, derandomize=True, max_examples=25, database=None
    )
    settings.load_profile("dad-fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-cycles",
        type=int,
        default=2,
        help="how often each command is killed at a random moment (tests/faults)",
    )
    parser.addoption("--fault-record", default="", help="JSON file for the results of these kills")
    parser.addoption(
        "--check-skips",
        action="store_true",
        help="table of skips; fail on a reason that is not in tests/allowed_skips.toml",
    )


def pytest_configure(config: pytest.Config) -> None:
    is_xdist_worker = hasattr(config, "workerinput")
    if config.getoption("--check-skips") and not is_xdist_worker:
        from tests.skip_report import SkipReport

        config.pluginmanager.register(SkipReport(config), "skip-report")


# Run first, so that with pytest-xdist no worker waits for another at the end.
LONGEST = (
    "test_triton_search.py",
    "test_interpreted_kernels.py",
    "test_kernel_report.py",
    "faults/",
    "test_resume.py",
    "test_ablate_command.py",
    "test_precompute.py",
    "test_train_command.py",
    "test_distributed",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))

    items.sort(key=rank)
    if os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="needs Triton's interpreter: TRITON_INTERPRET=1")
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(skip)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data, teacher.safetensors and vqgan.ckpt, as small as possible."""
    import tiny

    return tiny.write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Start the workers of sweeps as forks, which need not import torch."""
    from dad_fast.sweep import pool
    from tests import warm

    popen = warm.popen if warm.HAS_PROC else subprocess.Popen
    stand_in = SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "subprocess", stand_in)
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folder of this test alone."""
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _gpu_still_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """End this process if its GPU fails: after an illegal access, every later call fails, too."""
    yield
    is_gpu_test = request.node.get_closest_marker("gpu") is not None
    if not is_gpu_test or not sys.modules["torch"].cuda.is_available():
        return
    try:
        sys.modules["torch"].cuda.synchronize()
    except RuntimeError as error:
        print(f"the GPU no longer answers: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            # xdist starts another worker.
            os._exit(1)
        pytest.exit(f"the GPU no longer answers after {request.node.nodeid}", returncode=1)


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    """Seed all generators, so that failures are reproducible."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
