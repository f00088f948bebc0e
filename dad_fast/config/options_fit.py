"""Options of `dad-fast fit-discretizer`; options.py has those of the other commands."""

from __future__ import annotations

from dataclasses import dataclass

from dad_fast.config.flags import (
    at_least,
    fraction,
    level_list,
    option,
    positive,
    whole_number,
)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """`dad-fast fit-discretizer`."""

    data_dir: str = option("", "--data-dir DIR", "images in class folders, shards, embedded:digits")
    train_split: str = option("train", "--train-split NAME", "the split to train on")
    val_split: str = option(
        "val", "--val-split NAME", 'for the final figures; "" = training images'
    )
    val_fraction: float = option(
        0.0,
        "--val-fraction F",
        "share of the training images of each class held out, without a val split",
        read=fraction,
    )
    output: str = option("", "-o, --output FILE", "the weights, FILE.safetensors")
    img_size: int = option(
        0,
        "--img-size N",
        "side in pixels [the data's median shorter side, at most 128]",
        read=whole_number,
    )
    factor: str = option(
        "4", "--factor F", "side of a code in pixels", choices=("2", "4", "8", "16")
    )
    width: int = option(32, "--width C", "channels at full resolution", read=whole_number)
    codes: int = option(1024, "--codes K", "size of the codebook", read=at_least(2))
    dim: int = option(
        4, "--dim D", "dimensions of a code; up to 4 search fastest", read=whole_number
    )
    levels: str = option(
        "",
        "--levels L,L,...",
        "finite scalar quantization instead of a codebook, such as 8,5,5,5",
        read=level_list,
    )
    commitment: float = option(0.25, "--commitment W", "weight of the commitment", read=positive)
    perceptual: str = option(
        "",
        "--perceptual NAME[@FILE]",
        "add a distance of a timm model's features, such as resnet18",
    )
    perceptual_weight: float = option(
        0.1, "--perceptual-weight W", "weight of that distance", read=positive
    )
    decay: float = option(0.99, "--decay X", "of the codebook's moving averages", read=fraction)
    epochs: int = option(20, "--epochs N", "length of the training", read=whole_number)
    max_steps: int = option(0, "--max-steps N", "stop after N steps [0: none]", read=at_least(0))
    batch_size: int = option(64, "-b, --batch-size N", "images per step", read=whole_number)
    lr: float = option(2e-3, "--lr X", "peak learning rate", read=positive)
    hflip: float = option(0.5, "--hflip P", "probability of a horizontal flip", read=fraction)
    seed: int = option(0, "--seed N", "of weights, crops, order and restarts", read=at_least(0))
    workers: int = option(4, "--workers N", "processes that load images", read=at_least(0))
    device: str = option("auto", "--device NAME", "auto, cpu or cuda[:N]")
    log_every: int = option(50, "--log-every N", "steps between log lines", read=whole_number)
    every_steps: int = option(
        0, "--checkpoint-every-steps N", "steps between checkpoints [an epoch]", read=whole_number
    )
    resume: str = option("", "--resume auto", "continue the training of --output, or start it")
    overwrite: bool = option(False, "--overwrite", "replace an existing FILE and its folder")
