"""How a run is started, as opposed to what it computes: nothing here changes a result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    output: str  # the run's folder
    resume: str = ""  # "" = start; "auto" = continue what is in `output`, or start; otherwise a checkpoint folder
    overwrite: bool = False  # replace an existing run
    allow_config_change: bool = (
        False  # continue although a setting that changes the result is another one
    )
    debug: bool = False  # show tracebacks
    preset: str = ""  # the preset's name, for the record
    nproc: str = "1"  # processes on this machine; "auto" = one a GPU
    arguments: tuple[
        str, ...
    ] = ()  # the command line after the verb, for the processes that nproc starts
    jobs: int = 0  # runs side by side; 0 = one a GPU, or on a CPU two a core
    devices: tuple[
        str, ...
    ] = ()  # of those runs, in turn; () = every GPU, or the device of the settings
    both_batch_sizes: bool = False  # the command line gives the batch of a process and the global one, which then must agree


@dataclass(frozen=True, kw_only=True)
class StoreLaunch:
    """What `dad-fast precompute` makes of a Config: the form of the store, and how the work is done."""

    output: str  # the store's folder
    targets: bool = False  # the teacher's outputs on augmented clean images, not adversarial images
    views: int = 1  # draws per image
    outputs: str = "full"  # the teacher's outputs: full, or topk:K
    images: str = (
        "none"  # adversarial images as pixels besides the codes: none, raw, webp or jpeg:QUALITY
    )
    block_size: int = 0  # images per block, the unit of work; 0 = data.batch_size
    shard_blocks: int = 0  # blocks per shard; 0 = as many as make about 1 GB
    nproc: str = "1"  # processes on this machine; "auto" = one a GPU
    estimate: bool = False  # only measure a few blocks, and say what the whole would take
    check: float = 0.0  # recompute this share of an existing store's blocks and compare


@dataclass(frozen=True, kw_only=True)
class AnalyzeLaunch:
    """What `dad-fast analyze` measures, and where it writes."""

    output: str  # a folder; what an earlier analysis wrote there is replaced
    weights: str = ""  # the student that DAT attacks: a run's folder; "" = what the settings say of the student's weights
    features: str = (
        "teacher"  # where distances are measured: features of the teacher or the student, or pixels
    )
    num_images: int = 1000  # of the training set and of each test set, at most
    projections: int = 256  # directions of the sliced Wasserstein distance
    resamples: int = 200  # random halves that intervals are made from


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """`split` None: `train` where there is one. `need` 0: not said."""

    numerics: bool
    data: str
    split: str | None
    class_map: str
    loader: str
    need: float


@dataclass(frozen=True, kw_only=True)
class EvalLaunch:
    """What `dad-fast eval` judges, compares and writes."""

    model: str = ""
    compare: tuple[str, ...] = ()  # two models or files of predictions
    ood: tuple[str, ...] = ()
    id_suite: str = ""  # "" = the first suite
    baselines: str = ""
    json: str = ""
    csv: str = ""
    predictions: str = ""  # a folder
    nproc: str = "1"
    arguments: tuple[
        str, ...
    ] = ()  # the command line after the verb, for the processes that nproc starts


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """`formats` empty: the model's own. `weights` "": those that evaluation uses."""

    checkpoint: str
    output: str
    formats: tuple[str, ...]
    weights: str
    overwrite: bool


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    model: str
    images: tuple[str, ...]
    top: int
    json: bool
    batch_size: int
    device: str


@dataclass(frozen=True, kw_only=True)
class ProfileLaunch:
    kind: str
    output: str
    steps: int
    warm_up: int
    kernel: str
    launches: int
