"""Options of `dad-fast precompute` and `dad-fast store`. See options.py."""

from __future__ import annotations

from dataclasses import dataclass

from dad_fast.config.flags import (
    NPROC,
    at_least,
    fraction,
    option,
    processes_or_auto,
    share,
    whole_number,
    word,
)


@dataclass(frozen=True, kw_only=True)
class StoreLaunch:
    """`dad-fast precompute`: the form of the store, and how it is filled.

    block_size: 0 is data.batch_size.
    shard_blocks: 0 is as many as make about 1 GB.
    check: share of the blocks of an existing store to recompute; 0 fills the store instead.
    """

    output: str = option(
        "",
        "-o, --output DIR",
        "the store's folder; an unfinished store of the same settings is completed",
    )
    targets: bool = option(
        False, "--targets", "store the teacher's outputs on augmented, mixed clean images instead"
    )
    views: int = option(
        1, "--views N", "draws per image; training cycles through them", read=whole_number
    )
    outputs: str = option(
        "full", "--outputs FORM", "the teacher's outputs: full (16-bit logits) or topk:K"
    )
    images: str = option(
        "none",
        "--images FORM",
        "adversarial images as pixels besides the codes: none, raw, webp, jpeg:Q",
    )
    block_size: int = option(
        0,
        "--block-size N",
        "images per block, the unit of work; part of the store's identity [--batch-size]",
        read=whole_number,
    )
    shard_blocks: int = option(
        0,
        "--shard-blocks N",
        "blocks per shard, which one process writes at a time [about 1 GB]",
        read=whole_number,
    )
    nproc: str = option("1", "--nproc N|auto", NPROC, read=processes_or_auto)
    estimate: bool = option(
        False, "--estimate", "measure a few blocks and estimate the whole; writes nothing"
    )
    check: float = option(
        0.0,
        "--check SHARE",
        "recompute this share of the blocks of an existing store and compare",
        read=share,
    )


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """`dad-fast store`: what to do with a store."""

    action: str = word()
    folders: tuple[str, ...] = word(())
    output: str = option(
        "", "-o, --output PATH", "sheet: the PNG [STORE-sheet.png]; merge: the store's folder"
    )
    num: int = option(24, "--num N", "sheet: number of samples", read=whole_number)
    view: int = option(0, "--view N", "sheet: the view [0]", read=at_least(0))
    data_dir: str = option(
        "", "--data-dir DIR", "sheet: show the clean images too; an image folder or embedded:digits"
    )
    split: str = option("train", "--split NAME", "sheet: the split of --data-dir")
    val_fraction: float = option(
        0.0,
        "--val-fraction F",
        "sheet: share of train that is val, where --data-dir has no val split",
        read=fraction,
    )
    discretizer: str = option(
        "", "--discretizer FILE", "sheet: decode the stored codes with the VQGAN that made them"
    )
