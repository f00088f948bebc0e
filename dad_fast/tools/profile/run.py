"""`dad-fast profile`: run a few training steps under Nsight Systems, Nsight Compute, torch's
profiler or the memory recorder.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from dad_fast.config import Config, to_toml
from dad_fast.config.options import ProfileLaunch
from dad_fast.errors import DadFastError, DataError, EnvironmentProblem, UsageError
from dad_fast.files import atomic_write_text
from dad_fast.loggers.run_log import print_line
from dad_fast.tools.profile.timeline import as_text, read_timeline, summarize

TOOLS = {
    "nsys": "install Nsight Systems (package nsight-systems-cli of NVIDIA's repository, or developer.nvidia.com/nsight-systems)",
    "ncu": "install Nsight Compute (it comes with the CUDA toolkit; package nsight-compute of NVIDIA's repository)",
}


def run(cfg: Config, launch: ProfileLaunch) -> int:
    """Profile one run as `cfg` describes it and return the exit code."""
    if cfg.engine.cuda_graphs == "auto":
        cfg = dataclasses.replace(cfg, engine=dataclasses.replace(cfg.engine, cuda_graphs="off"))
    output = Path(launch.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder")
    if launch.kind in TOOLS:
        return _under_nsight(cfg, launch, output)
    if launch.kind == "torch":
        return _torch(cfg, launch, output)
    if launch.kind == "memory":
        return _memory(cfg, launch, output)
    _steps(cfg, launch, output)
    return 0


# --- the profiled steps ---


def _steps(
    cfg: Config,
    launch: ProfileLaunch,
    output: Path,
    watch: AbstractContextManager[object] | None = None,
) -> str:
    """Run the warm-up, then the profiled steps inside `watch` and the CUDA profiler's range; return
    a one-line description.
    """
    import torch

    from dad_fast.engine.build import Builder
    from dad_fast.engine.choices import fast_convolutions
    from dad_fast.engine.prefetch import feed
    from dad_fast.engine.trainer import Trainer
    from dad_fast.loggers.profiling import cuda_profiler_range, name_method, naming_stages, stage

    parts = Builder().build(cfg)
    trainer = Trainer(cfg, parts, output, "profile")
    if parts.discretizer is not None:
        for owner, method, name in parts.discretizer.stages():
            name_method(owner, method, name)

    numbers = range(launch.warm_up + launch.steps)
    on_gpu = parts.device.type == "cuda"
    parts.prepare(print_line)
    batches = feed(parts.join(trainer.loader.batches(0, len(numbers)), on_gpu), parts.device)

    def step(number: int) -> None:
        with stage("step"):
            with stage("data"):
                batch = next(batches)
            trainer.step(batch, number, cfg.optim.lr)

    with fast_convolutions(parts.device):
        for number in numbers[: launch.warm_up]:
            step(number)
        if on_gpu:
            torch.cuda.synchronize(parts.device)
        with watch or nullcontext(), cuda_profiler_range(parts.device), naming_stages():
            for number in numbers[launch.warm_up :]:
                step(number)

    steps = f"{launch.steps} steps of {cfg.method} after a warm-up of {launch.warm_up}"
    images = f"{trainer.images_per_step} images each"
    return f"{steps}, {images}, on {parts.device}, graphs {cfg.engine.cuda_graphs}"


# --- Nsight ---


def _under_nsight(cfg: Config, launch: ProfileLaunch, output: Path) -> int:
    tool = shutil.which(launch.kind)
    if tool is None:
        raise EnvironmentProblem(
            f"{launch.kind} is not on the PATH: {TOOLS[launch.kind]}; or use dad-fast profile torch"
        )

    output.mkdir(parents=True, exist_ok=True)
    config, result = output / "config.toml", output / "profile"
    atomic_write_text(config, to_toml(cfg))
    target = [sys.executable, "-m", "dad_fast", "profile", "range", str(config), "-o", str(output)]
    target += ["--steps", str(launch.steps), "--warm-up", str(launch.warm_up)]
    options = nsys_options(result) if launch.kind == "nsys" else ncu_options(result, launch)
    command = [tool, *options, *target]
    print_line(f"$ {shlex.join(command)}")
    code = subprocess.run(command).returncode
    if code:
        hint = ""
        if launch.kind == "ncu":
            hint = "; without permission for GPU counters ncu needs root, or the driver's option"
        raise DadFastError(
            f"{launch.kind} failed with exit code {code}; see its output above{hint}"
        )
    if launch.kind == "nsys":
        _after_nsys(result)
    else:
        print(
            f"{result}.ncu-rep: open it in ncu-ui, or: ncu --import {result}.ncu-rep --page details"
        )
        print(
            "Look at: SpeedOfLight (memory or compute near its peak?), occupancy and its limiter, "
            "uncoalesced or bank-conflicting access,"
        )
        print(
            "local memory (register spills), and tensor-pipe use where a kernel is a matrix "
            "product."
        )
    return 0


def nsys_options(result: Path) -> list[str]:
    return [
        "profile",
        "--trace=cuda,nvtx,cudnn,cublas",
        "--sample=none",
        "--cpuctxsw=none",
        "--cuda-graph-trace=node",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--export=sqlite",
        "--force-overwrite=true",
        f"--output={result}",
    ]


def ncu_options(result: Path, launch: ProfileLaunch) -> list[str]:
    names = launch.kernel or f"^({'|'.join(own_kernels())})$"
    return [
        "--profile-from-start=off",
        "--target-processes=application-only",
        "--clock-control=none",
        "--set=full",
        f"--kernel-name=regex:{names}",
        f"--launch-count={launch.launches}",
        "--force-overwrite",
        f"--export={result}",
    ]


def own_kernels() -> list[str]:
    """Read the names of this project's Triton and CUDA kernels from their sources."""
    folder = (Path(__file__).resolve().parents[2] / "kernels").resolve()
    triton = re.compile(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
    cuda = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)")
    names = set()
    for path in folder.rglob("*.py"):
        names.update(triton.findall(path.read_text(encoding="utf-8")))
    for path in (folder.parent / "csrc").glob("*.cu"):
        names.update(cuda.findall(path.read_text(encoding="utf-8")))
    return sorted(names)


def _after_nsys(result: Path) -> None:
    export = Path(f"{result}.sqlite")
    try:
        print(as_text(summarize(read_timeline(export))))
    except DataError as error:
        print_line(f"no summary: {error}")
    print(
        f"\n{result}.nsys-rep: open it in nsys-ui; scripts/nsys_summary.py {export} prints the "
        "summary again"
    )
    print(
        "Look at: the row NVTX (the stages), gaps in the row CUDA HW (the GPU waits: for data, for "
        "launches, for a synchronization),"
    )
    print(
        "cudaStreamSynchronize or cudaMemcpy inside a step, and kernels that are not the stage's "
        "convolutions and products."
    )


# --- torch ---


def _torch(cfg: Config, launch: ProfileLaunch, output: Path) -> int:
    # Otherwise it logs each start, and a missing GPU as an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities)
    what = _steps(cfg, launch, output, profiler)
    output.mkdir(parents=True, exist_ok=True)
    trace, table = output / "trace.json.gz", output / "ops.txt"
    profiler.export_chrome_trace(str(trace))
    text = profiler.key_averages().table(
        sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total",
        row_limit=15,
        max_name_column_width=40,
    )
    atomic_write_text(table, text)
    print(f"{what}\n\n{as_text(summarize(read_timeline(trace)))}\n\n{text}")
    print(
        f"{trace}: open it at ui.perfetto.dev or chrome://tracing (nothing is uploaded); {table}: "
        "the table of operations"
    )
    print(
        "Look at: the stages with the most time, operations that copy or convert (aten::copy_, "
        "aten::to), many small ones in a row, gaps."
    )
    print(
        "The profiler slows small operations down: take times from the benchmarks, and shares from "
        "here."
    )
    return 0


# --- memory ---


def _memory(cfg: Config, launch: ProfileLaunch, output: Path) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    if torch.cuda.is_available() and cfg.device != "cpu":
        return _cuda_memory(cfg, launch, output)
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    what = _steps(cfg, launch, output, profiler)
    output.mkdir(parents=True, exist_ok=True)
    table = output / "memory.txt"
    text = profiler.key_averages().table(
        sort_by="self_cpu_memory_usage", row_limit=15, max_name_column_width=40
    )
    atomic_write_text(table, text)
    print(
        f"{what}\n\n{text}\n{table}: bytes that each operation allocates minus bytes it frees, "
        "summed over the steps, by torch's profiler."
    )
    print(
        f"Peak resident memory of the whole process, loading included: {_peak_resident_gib():.2f} "
        "GiB."
    )
    print(
        "On a GPU this command writes a snapshot with the stack of every allocation; on a CPU there "
        "is no peak by stage."
    )
    return 0


def _cuda_memory(cfg: Config, launch: ProfileLaunch, output: Path) -> int:
    import torch

    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        what = _steps(cfg, launch, output)
        output.mkdir(parents=True, exist_ok=True)
        snapshot = output / "memory.pickle"
        torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    allocated, reserved = (
        read() / 2**30 for read in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    )
    print(
        f"{what}; at most {allocated:.2f} GiB in tensors, {reserved:.2f} GiB taken from the driver "
        "(warm-up included)"
    )
    print(
        f"{snapshot}: drag it onto pytorch.org/memory_viz (it stays in the browser); it is a "
        "pickle, so open only your own"
    )
    print(
        "Look at: the plateau between steps (weights, optimizer, EMA), the blocks at the peak, and "
        "blocks that outlive their step."
    )
    return 0


def _peak_resident_gib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
