"""Options of the commands: how a command runs and what it writes. Settings of runs: see schema.

One frozen dataclass per command. A field made by `option` or `word` is the only declaration of its
flag: the parser and the help screen are generated from it. Plain fields have no flag; the command
fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass

from dad_fast.config.flags import (
    NPROC,
    at_least,
    jobs_or_auto,
    option,
    processes_or_auto,
    rate,
    share,
    whole_number,
    word,
)
from dad_fast.config.options_store import StoreLaunch as StoreLaunch
from dad_fast.config.options_store import StoreOptions as StoreOptions

JOBS_DEFAULT = "[one per GPU; on a CPU two per core]"


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Sources of settings, for every command that takes those of `dad-fast train`."""

    preset: tuple[str, ...] = option(
        (), "--preset NAME", "a named set of settings; repeatable: later ones win", repeat=True
    )
    sets: tuple[str, ...] = option(
        (),
        "--set KEY=VALUE",
        "any setting by its key, such as --set optim.opt_kwargs.eps=1e-6; repeatable",
        repeat=True,
    )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """`dad-fast train`: how a run is started. Nothing here changes a result.

    resume: "" starts; "auto" continues the run in `output` or starts; otherwise a checkpoint
        folder, or another run's folder.
    preset: the presets' names, joined by "+", for the record.
    nproc: "auto" is one process per GPU.
    arguments: the command line after the command, for the processes that nproc starts.
    command: the whole command line, for the record; "" where Python code started the run.
    jobs: 0 is one per GPU, or on a CPU two per core.
    devices: of the runs side by side, in turn; () is every GPU, or the device of the settings.
    both_batch_sizes: the command line gives the batch of a process and the global one, which then
        must agree.
    share_batches: runs that differ only in their students learn from the same batches.
    """

    nproc: str = option(
        "1",
        "--nproc N|auto",
        f"{NPROC} [1]; several machines: docs/distributed.md",
        read=processes_or_auto,
    )
    jobs: int = option(
        0,
        "--jobs N|auto",
        f"of several variants or seeds, runs side by side {JOBS_DEFAULT}",
        read=jobs_or_auto,
    )
    output: str = option(
        "",
        "-o, --output DIR",
        "the run's folder [runs/ and the name of the preset, CONFIG or method]",
    )
    resume: str = option(
        "",
        "--resume auto|RUN|PATH",
        "auto: continue the run in --output, or start it; RUN: continue that run with its own "
        "settings; PATH: from a checkpoint",
    )
    overwrite: bool = option(False, "--overwrite", "replace an existing run")
    allow_config_change: bool = option(
        False, "--allow-config-change", "resume although settings that change the result differ"
    )
    print_config: bool = option(
        False, "--print-config", "print the resolved settings as TOML and exit"
    )
    dry_run: bool = option(
        False,
        "--dry-run",
        "print the parameters, FLOP, memory and time that the run will need, and exit",
    )
    debug: bool = False
    preset: str = ""
    arguments: tuple[str, ...] = ()
    command: str = ""
    devices: tuple[str, ...] = ()
    both_batch_sizes: bool = False
    share_batches: bool = True


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """`dad-fast ablate`: what varies around the base, and how the sweep runs."""

    axes: tuple[str, ...] = option(
        (),
        "--axes AXIS ...",
        "what varies [components, or lp-clip; none with --vary or a flag of an axis]",
    )
    vary: tuple[str, ...] = option(
        (),
        "--vary KEY=V1,V2",
        "any setting as an axis, such as student.bn=split,aux; repeatable",
        repeat=True,
    )
    output: str = option(
        "runs/ablation", "-o, --output DIR", "the sweep's folder: CELL/seed-S/, table.md, plot.svg"
    )
    resume: str = option(
        "",
        "--resume auto",
        "resume the sweep in --output; cells may be added, the base must be the same",
    )
    devices: tuple[str, ...] = option(
        (), "--devices D ...", "where runs train: cuda:0 cuda:1, or cpu [every GPU, else cpu]"
    )
    jobs: int = option(
        0,
        "--jobs N|auto",
        f"runs side by side, spread over the devices {JOBS_DEFAULT}",
        read=jobs_or_auto,
    )
    share_batches: bool = option(
        True,
        "--[no-]share-batches",
        "cells that differ only in the learner train on the same batches [on]",
    )
    dry_run: bool = option(
        False, "--dry-run", "print the plan and its cost, measured on a few steps of each form"
    )
    print_config: bool = option(
        False, "--print-config", "print the sweep as TOML, every cell a variant, and exit"
    )


@dataclass(frozen=True, kw_only=True)
class AnalyzeLaunch:
    """`dad-fast analyze`: what is measured, and where it is written.

    weights: the student that DAT attacks, as a run's folder; "" is the student's weights in the
        settings.
    """

    output: str = option(
        "",
        "-o, --output DIR",
        "where to write; an earlier analysis there is replaced [RUN/analysis]",
    )
    features: str = option(
        "teacher",
        "--features SPACE",
        "feature space: of the teacher, of the student (input of its classifier), or pixels",
        choices=("teacher", "student", "pixels"),
    )
    num_images: int = option(
        1000,
        "--num-images N",
        "images of the training set, and of each test set",
        read=at_least(20),
    )
    projections: int = option(
        256, "--projections N", "directions of the sliced Wasserstein distance", read=whole_number
    )
    resamples: int = option(
        200, "--resamples N", "random halves for the intervals", read=at_least(20)
    )
    weights: str = ""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """`dad-fast doctor`. `split` None is train if there is one; `need` 0 is not given."""

    numerics: bool = option(
        False,
        "--numerics",
        "also check the arithmetic here: codebook search against float64, the attack against its "
        "closed form on a linear teacher, on a GPU every kernel against torch",
    )
    json: bool = option(False, "--json", "print the report on this machine as one JSON object")
    weights: str = option("", "--weights FILE", "describe this weights file instead")
    data: str = option(
        "",
        "--data DIR",
        "image folder, folder or pattern of WebDataset shards, csv:FILE or embedded:digits",
    )
    split: str | None = option(
        None, "--split NAME", "sub-folder or pattern in it [train if there is one]"
    )
    class_map: str = option("", "--class-map FILE", "CSV (id, folder, name) of the classes")
    loader: str = option(
        "auto",
        "--loader NAME",
        "decoders to measure: auto (all installed), dali or pil",
        choices=("auto", "dali", "pil", "torchvision"),
    )
    need: float = option(
        0.0,
        "--need N",
        "images per second that training will take; compared with the decoding speed",
        read=rate,
    )


@dataclass(frozen=True, kw_only=True)
class EvalLaunch:
    """`dad-fast eval`: what is evaluated, compared and written.

    compare: two models or files of predictions.
    id_suite: "" is the first suite.
    arguments: the command line after the command, for the processes that nproc starts.
    """

    model: str = option("", "--model MODEL", "MODEL, given by a flag")
    compare: tuple[str, ...] = option(
        (), "--compare A B", "two models, or files of --save-predictions: paired tests"
    )
    ood: tuple[str, ...] = option(
        (), "--ood NAME ...", "suites or folders of other classes, to be told from the --id-suite"
    )
    id_suite: str = option(
        "",
        "--id-suite NAME",
        "the in-distribution suite, for --ood and --baselines; empty = the first",
    )
    baselines: str = option(
        "",
        "--baselines timm|FILE",
        "effective robustness against timm's models, or those of a CSV or JSON",
    )
    like: str = option(
        "", "--like RUN", "list public models of at most RUN's size with better published results"
    )
    calibrate: str = option(
        "", "--calibrate SPLIT", "fit one temperature on SPLIT and store it with MODEL"
    )
    per_class: bool = option(
        False, "--per-class", "also print balanced accuracy and the accuracy of each class"
    )
    json: str = option(
        "", "--json FILE", "write the results as JSON; an existing .json is replaced"
    )
    csv: str = option("", "--csv FILE", "write the results as CSV; an existing .csv is replaced")
    predictions: str = option(
        "", "--save-predictions DIR", "write the predictions of each model, for --compare"
    )
    nproc: str = option("1", "--nproc N|auto", NPROC, read=processes_or_auto)
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """`dad-fast average`. weights: one for each model; () = equal."""

    models: tuple[str, ...] = word(())
    weights: tuple[str, ...] = option((), "--weights W ...", "weight of each model [equal]")
    interpolate: str = option(
        "", "--interpolate START", "mix in this model: (1 - alpha) START + alpha AVERAGE"
    )
    alpha: float = option(0.5, "--alpha A", "the alpha that is written", read=share)
    points: int = option(
        11, "--points N", "values of alpha from 0 to 1 that are evaluated", read=at_least(2)
    )
    output: str = option("", "-o, --output DIR", "the new folder")
    overwrite: bool = option(False, "--overwrite", "replace an earlier average")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """`dad-fast export`. formats: () is the model's own. weights: "" is those of evaluation."""

    checkpoint: str = word()
    output: str = option("", "-o, --output DIR", "the new folder")
    formats: tuple[str, ...] = option(
        (), "--format NAME ...", "timm, onnx, torch [timm; onnx for a linear probe]"
    )
    weights: str = option(
        "",
        "--weights ema|raw",
        "the run's EMA, or the weights without it from the latest checkpoint [those that "
        "evaluation uses]",
        choices=("ema", "raw"),
    )
    overwrite: bool = option(False, "--overwrite", "replace an earlier export")
    push: str = option(
        "",
        "--push USER/REPO",
        "upload the folder to the Hugging Face hub; without a login: show what would be uploaded",
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """`dad-fast predict`."""

    model: str = word()
    images: tuple[str, ...] = word(())
    top: int = option(5, "-k, --top K", "number of classes", read=whole_number)
    json: bool = option(
        False,
        "--json",
        "one JSON object a line: image, predictions (class, folder, name, confidence) or error",
    )
    batch_size: int = option(32, "-b, --batch-size N", "images per batch", read=whole_number)
    class_map: str = option(
        "",
        "--class-map FILE",
        "CSV (id,folder,name): the classes of a published model [ImageNet's]",
    )
    device: str = option("auto", "--device NAME", "auto, cpu or cuda[:N]")


@dataclass(frozen=True, kw_only=True)
class ProfileLaunch:
    """`dad-fast profile`."""

    kind: str = word()
    steps: int = option(0, "--steps N", "profiled steps [5; memory and ncu: 1]", read=whole_number)
    warm_up: int = option(10, "--warm-up N", "steps before them", read=at_least(0))
    kernel: str = option("", "--kernel REGEX", "ncu: kernels to profile [those of this project]")
    launches: int = option(
        20,
        "--launches N",
        "ncu: launches to profile [20]; each is replayed dozens of times",
        read=whole_number,
    )
    output: str = option(
        "",
        "-o, --output DIR",
        "folder of the results; older results there are replaced [runs/profile/KIND]",
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """`dad-fast report`."""

    runs: tuple[str, ...] = word(())
    output: str = option(
        "",
        "-o, --output FILE",
        "the page; an earlier one is replaced [of one RUN: RUN/report.html; of several: "
        "runs/report.html]",
    )
