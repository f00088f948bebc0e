"""Settings of data and augmentation: the sections [data] and [augment]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dad_fast.config.setting import (
    AREA,
    AT_LEAST_ONE,
    AUTO,
    BELOW_ONE,
    CROP,
    INTERVAL,
    NOT_NEGATIVE,
    PROBABILITY,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    data_dir: str = setting(
        "",
        "folder, shards, csv:FILE, hfds:NAME, parquet:PATH, embedded:digits",
        "--data-dir",
        main=True,
    )
    train_split: str = setting(
        "train",
        "folder, shards by pattern (NAME-{000..099}.tar) or split of a list to train on",
        "--train-split",
    )
    val_split: str = setting(
        "val",
        "folder, shards by pattern or embedded split to validate on; without val/ also valid, "
        "validation or test",
        "--val-split",
    )
    val_fraction: float = setting(
        0.0,
        "share of the training images of each class to validate on where there is no val split",
        "--val-fraction",
        rule=BELOW_ONE,
    )
    class_map: str = setting(
        "", "CSV (id,folder,name) that fixes the order of the classes", "--class-map"
    )
    labels: Literal["data", "teacher"] = setting(
        "data",
        "teacher: no labels; y is the teacher's prediction on the clean image, and cross-entropy is "
        "off. With --class-map the train split may be images without class folders",
        "--labels",
    )
    extra_data: str = setting(
        "",
        "folder of further images without labels, for the terms that need none",
        "--extra-data",
    )
    batch_size: int = setting(
        256,
        "clean images per batch of a process; auto: by the data's size",
        "--batch-size",
        rule=AT_LEAST_ONE,
        short="-b",
        main=True,
        auto=True,
    )
    global_batch_size: int = setting(
        0,
        "clean images per step of all processes; 0 = batch-size x processes x grad-accum-steps",
        "--global-batch-size",
        rule=NOT_NEGATIVE,
    )
    loader: Literal["auto", "dali", "pil", "torchvision"] = setting(
        "auto", "library that decodes and augments: auto, dali or pil", "--loader"
    )
    workers: int = setting(
        AUTO,
        "loader processes; auto: one per core of this process's share, at most 16; 0 loads in the "
        "training process",
        "--workers",
        rule=NOT_NEGATIVE,
        short="-j",
        auto=True,
    )
    max_bad_share: float = setting(
        0.01, "share of unreadable images above which the run stops (exit 4)", rule=PROBABILITY
    )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    img_size: int = setting(
        0,
        "side of the square images in pixels; 0 = the student's own",
        "--img-size",
        rule=NOT_NEGATIVE,
    )
    crop: Literal["random-resized", "center", "squash"] = setting(
        "random-resized", "training crop; squash: the whole image, squashed to a square"
    )
    scale: tuple[float, float] = setting(
        (0.08, 1.0), "area of the random crop", "--scale", rule=AREA
    )
    ratio: tuple[float, float] = setting(
        (0.75, 1.3333333333333333), "aspect ratio of the random crop", "--ratio", rule=INTERVAL
    )
    hflip: float = setting(0.5, "probability of a horizontal flip", "--hflip", rule=PROBABILITY)
    vflip: float = setting(0.0, "probability of a vertical flip", "--vflip", rule=PROBABILITY)
    color_jitter: float = setting(
        0.4,
        "strength of colour jitter; unused when --aa is set, as in timm",
        "--color-jitter",
        rule=NOT_NEGATIVE,
    )
    aa: str = setting(
        "",
        "policy, as timm writes it: rand-m9-mstd0.5-inc1, v0, original, 3a, augmix-m3-w3; or ta "
        "(TrivialAugment), pixmix-k4-b4, prime",
        "--aa",
    )
    pixmix_pictures: str = setting(
        "",
        "folder of pictures that --aa pixmix mixes in; empty = fractals, made here",
        "--pixmix-pictures",
    )
    train_interpolation: Literal["random", "bilinear", "bicubic"] = setting(
        "random", "resampling filter", "--train-interpolation"
    )
    reprob: float = setting(0.0, "probability of random erasing", "--reprob", rule=PROBABILITY)
    remode: Literal["const", "rand", "pixel"] = setting(
        "pixel", "content of an erased box", "--remode"
    )
    mixup: float = setting(0.0, "mixup alpha", "--mixup", rule=NOT_NEGATIVE)
    cutmix: float = setting(0.0, "cutmix alpha", "--cutmix", rule=NOT_NEGATIVE)
    mixup_prob: float = setting(
        1.0, "probability that a pair of images is mixed", "--mixup-prob", rule=PROBABILITY
    )
    mixup_switch_prob: float = setting(
        0.5, "probability of cutmix where both are on", "--mixup-switch-prob", rule=PROBABILITY
    )
    smoothing: float = setting(
        0.1, "label smoothing of the cross-entropy", "--smoothing", rule=BELOW_ONE
    )
    crop_pct: float = setting(
        0.0,
        "evaluation: crop divided by the resized image's shorter side, above 1 pads; 0 = the student's own",
        "--crop-pct",
        rule=CROP,
    )
    interpolation: str = setting(
        "", "evaluation: resampling filter; empty = the student's own", "--interpolation"
    )
