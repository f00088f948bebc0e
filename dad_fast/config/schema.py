"""Settings of a run: name, default, meaning, and the flag that sets it.

One frozen dataclass per section of the TOML file. Flags use timm's names where the meaning is the
same; a field without a flag is set by `--set section.key=value` or in the file. This file imports
nothing heavy: `dad-fast -h` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dad_fast.config.schema_data import AugmentConfig as AugmentConfig
from dad_fast.config.schema_data import DataConfig as DataConfig
from dad_fast.config.schema_method import AttackConfig as AttackConfig
from dad_fast.config.schema_method import LossConfig as LossConfig
from dad_fast.config.schema_method import LpClipConfig as LpClipConfig
from dad_fast.config.schema_optim import EmaConfig as EmaConfig
from dad_fast.config.schema_optim import OptimConfig as OptimConfig
from dad_fast.config.schema_optim import ScheduleConfig as ScheduleConfig
from dad_fast.config.setting import (
    ALL_POSITIVE,
    AT_LEAST_ONE,
    AUTO,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Switch,
    setting,
)

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    name: str = setting(
        "",
        "open_clip:ARCH/TAG, open_clip:ARCH@FILE, timm:NAME[@FILE], timm:hf-hub:REPO, hf-hub:REPO, "
        "RUN (of this project), FILE or embedded:digits; several joined by + are an ensemble",
        "--teacher",
        main=True,
    )
    head: str = setting(
        "",
        "safetensors with a linear head for the encoder, of --method lp-clip or fine-tuned; empty = "
        "the teacher's own, of CLIP zero-shot from class names; of an ensemble joined by +, in order",
        "--teacher-head",
    )
    weights: tuple[float, ...] = setting(
        (),
        "weights of an ensemble's members, in order; empty = equal",
        "--teacher-weights",
        rule=ALL_POSITIVE,
    )
    average: Literal["probabilities", "logits"] = setting(
        "probabilities",
        "what an ensemble averages: softmax outputs at the temperature of the loss, or logits",
        "--teacher-average",
    )
    img_size: int = setting(
        0,
        "input size of timm: teachers in pixels, position embeddings are resized; 0 = their own",
        "--teacher-img-size",
        rule=NOT_NEGATIVE,
    )
    templates: str | tuple[str, ...] = setting(
        "auto", "prompts: auto, imagenet, simple, a text file, or a list", "--templates"
    )


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    name: str = setting(
        "",
        "any timm model; several learn from the same batches",
        "--student",
        main=True,
    )
    weights: str = setting(
        "", "weights for the student (safetensors or a tensor-only .pth)", "--student-weights"
    )
    init_from: str = setting(
        "",
        "start from another run's weights (run, checkpoint folder or file), and nothing else of it",
        "--init-from",
    )
    pretrained: bool = setting(
        False,
        "take timm's pretrained weights (needs the network or a filled cache)",
        "--pretrained",
    )
    seed: int = setting(
        AUTO,
        "seed of its initial weights, dropout and drop path; auto: --seed, which decides the batches",
        "--student-seed",
        rule=NOT_NEGATIVE,
        auto=True,
    )
    drop_path: float = setting(0.0, "stochastic depth", "--drop-path", rule=BELOW_ONE)
    drop: float = setting(0.0, "dropout before the classifier", "--drop", rule=BELOW_ONE)
    drop_block: float = setting(
        0.0, "DropBlock, in models that have it (ResNets)", "--drop-block", rule=BELOW_ONE
    )
    grad_checkpointing: bool = setting(
        False,
        "compute activations again in the backward pass: less memory, more time; batch norm's "
        "running statistics then move twice a step",
        "--grad-checkpointing",
    )
    bn: Literal["joint", "split", "aux"] = setting(
        "joint",
        "batch norm over clean and adversarial images: one batch, two calls, or auxiliary "
        "statistics",
        "--bn",
    )
    sync_bn: bool = setting(
        False,
        "batch norm over the images of all processes (CUDA); else each process over its own",
        "--sync-bn",
    )
    model_kwargs: dict[str, Any] = setting({}, "further arguments of timm.create_model")


@dataclass(frozen=True, kw_only=True)
class DiscretizerConfig:
    name: str = setting(
        "",
        "VQGAN FILE (.ckpt, .pt, .safetensors), a diffusers folder, embedded:digits, identity, "
        "jpeg:QUALITY, webp:QUALITY or blur:FACTOR",
        "--discretizer",
        main=True,
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    amp: Switch | bool = setting(
        Switch.AUTO, "mixed precision; auto: on GPUs that have bfloat16", "--amp", main=True
    )
    student: Dtype = setting("bfloat16", "student under autocast", "--amp-dtype")
    teacher: Dtype = setting("bfloat16", "teacher under autocast")
    encoder: Dtype = setting(
        "float16", "VQGAN encoder under autocast; the codebook search is always exact"
    )
    decoder: Dtype = setting("bfloat16", "VQGAN decoder under autocast")
    tf32: bool = setting(
        True,
        "TF32 on GPUs for what stays float32; the attack, and the VQGAN encoder in float32, are "
        "IEEE in any case",
        "--tf32",
    )
    channels_last: Switch | bool = setting(
        Switch.AUTO,
        "NHWC memory format for convolutional teachers and students; auto: on GPUs",
        "--channels-last",
    )


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    dirs: tuple[str, ...] = setting(
        (),
        "stores made by dad-fast precompute: adversarial images, teacher outputs, or both",
        "--store",
    )
    make: tuple[str, ...] = setting(
        (),
        "make stores in --output first and learn from them: adversarial (the flag alone), targets, "
        "or KIND:VIEWS with the draws per image (default: 1 of adversarial, one an epoch of targets)",
        "--stores",
        bare=("adversarial",),
    )
    images: str = setting(
        "raw",
        "images in stores that --stores makes: none (decode codes), raw, webp or jpeg:Q",
        "--store-images",
    )
    mix_outputs: bool = setting(
        False,
        "stored outputs are of unmixed views: mix them as the pixels are (approximates the "
        "teacher on mixed pixels)",
        "--mix-outputs",
    )


# Exact optimizations, explained in models/optimizations.py and
# discretizers/vqgan/fused_layers.py.
MODEL_SAVINGS = (
    "class_token_only",
    "clip_attention",
    "fold_normalisation",
    "fold_quick_gelu",
    "cast_weights",
)
VQGAN_SAVINGS = ("cast", "channels_last", "upsample", "attention", "merge_1x1")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    savings: tuple[str, ...] = setting(
        ("all",),
        f"all, none, or some of {', '.join(MODEL_SAVINGS)}, "
        f"{', '.join('vqgan_' + name for name in VQGAN_SAVINGS)}",
        "--savings",
    )
    kernels: Literal["auto", "on", "off"] = setting(
        "auto",
        "the project's GPU kernels (attack, loss, VQGAN norms, codes); auto: on CUDA each that "
        "passes a self-test at start, else torch; on: an error instead; off: torch",
        "--kernels",
    )
    vqgan_micro_batch: int = setting(
        0,
        "images that the VQGAN encodes or decodes at once; 0 = as many as keep its largest map "
        "below 2^31 values and, on CUDA, 2 GiB",
        rule=NOT_NEGATIVE,
    )
    grad_accum_steps: int = setting(
        1, "batches whose gradients make one step", "--grad-accum-steps", rule=AT_LEAST_ONE
    )
    cuda_graphs: Literal["auto", "on", "off"] = setting(
        "auto",
        "capture the step in CUDA graphs; auto falls back to plain calls, and logs why",
        "--cuda-graphs",
    )
    torchcompile: Switch | str | bool = setting(
        Switch.AUTO,
        "torch.compile the student and the teacher with a backend of torch (on: inductor), which "
        "must equal eager in a trial; auto: inductor on CUDA in runs of 5,000 steps or more, if it "
        "does",
        "--torchcompile",
    )
    dist_timeout: float = setting(
        300.0,
        "seconds after which a process that does not answer counts as lost, once training runs",
        "--dist-timeout",
        rule=POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = setting(
        0,
        "steps between checkpoints; 0 = at the end of every epoch",
        "--checkpoint-every-steps",
        rule=NOT_NEGATIVE,
    )
    keep: int = setting(2, "latest checkpoints kept, besides the best", rule=AT_LEAST_ONE)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_epochs: int = setting(
        1, "epochs between validations; 0 = only at the end", "--val-every", rule=NOT_NEGATIVE
    )
    suites: tuple[str, ...] = setting(
        (),
        "evaluated at the end: splits, image folders, published test sets, corruptions; see "
        "dad-fast eval -h",
        "--suite",
    )
    batch_size: int = setting(
        0,
        "images per evaluation batch; 0 = the training batch",
        "--val-batch-size",
        rule=NOT_NEGATIVE,
    )
    allow_partial: bool = setting(
        False, "evaluate incomplete published test sets, with a warning", "--allow-partial"
    )
    c_preprocessing: Literal["none", "resize256"] = setting(
        "none",
        "imagenet-c: its 224-px images as they are, or resized to 256 and cropped",
        "--c-preprocessing",
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run, or of several: `variants` times `students` times `seeds`.

    students: label -> settings in which this student differs; all of them learn from the same
        batches. Then `student.name` is empty.
    """

    method: str = setting("dad", "training method; --help-all explains each", "--method", main=True)
    seed: int = setting(0, "seed of every random draw", "--seed", rule=NOT_NEGATIVE)
    seeds: int = setting(
        1, "number of seeds, from --seed on", "--seeds", rule=AT_LEAST_ONE, main=True
    )
    max_steps: int = setting(
        0,
        "stop after this many steps; 0 = run all epochs",
        "--max-steps",
        rule=NOT_NEGATIVE,
        main=True,
    )
    device: str = setting("auto", "auto, cpu or cuda[:N]", "--device", main=True)
    log_every: int = setting(50, "steps between log lines", "--log-every", rule=AT_LEAST_ONE)
    log_to: tuple[str, ...] = setting(
        (),
        "tensorboard, wandb, mlflow or another log sink, next to metrics.jsonl",
        "--log-to",
    )
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    discretizer: DiscretizerConfig = DiscretizerConfig()
    attack: AttackConfig = AttackConfig()
    loss: LossConfig = LossConfig()
    lp_clip: LpClipConfig = LpClipConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    precision: PrecisionConfig = PrecisionConfig()
    store: StoreConfig = StoreConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    students: dict[str, dict[str, Any]] = setting(
        {},
        "students that learn from the same batches: [[students]] with the keys of [student], and "
        "[students.optim] and others for what differs; label where two have one name",
    )
    variants: dict[str, dict[str, Any]] = setting(
        {},
        "runs to compare: [variants.NAME] with the keys that differ, such as method or "
        "schedule.epochs",
    )
