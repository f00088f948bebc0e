"""Smallest real components of a run: an open_clip model, a VQGAN, a folder of JPEGs."""

import json
from pathlib import Path

SIDE = 32
TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
STUDENT = [
    "--student",
    "resnet18",
    "--set",
    "student.model_kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
    "--img-size",
    str(SIDE),
]


def train_arguments(
    parts: Path, out: Path, *more: object, discretizer: str = "jpeg:60", verb: str = "train"
) -> list[str]:
    """Return the arguments of two steps on `parts`; flags in `more` override the defaults."""
    given = [
        verb,
        "--data-dir",
        parts / "data",
        *STUDENT,
        "--teacher",
        parts / "teacher.safetensors",
        "--discretizer",
        discretizer,
        "-o",
        out,
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--max-steps",
        "2",
        "--epochs",
        "2",
        "--warmup-epochs",
        "0",
    ]
    return [str(item) for item in (*given, *more)]


def write_teacher(path: Path, seed: int = 0) -> Path:
    """Write a random CLIP with its architecture as metadata, like the embedded one."""
    import pytest
    import torch
    from safetensors.torch import save_file

    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(seed)
    described = {
        "kind": "open_clip",
        "model_cfg": TOWERS,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "templates": ["a {}"],
        "seen": "nothing",
    }
    save_file(
        open_clip.CLIP(**TOWERS).state_dict(), path, {"dad_fast.teacher": json.dumps(described)}
    )
    return path


def write_vqgan(path: Path, seed: int = 0) -> Path:
    """Write a random VQGAN of factor 4 as taming does, with its state dict under "state_dict"."""
    import torch

    from dad_fast.discretizers.vqgan.model import VQGAN, VQGANConfig

    torch.manual_seed(seed)
    vqgan = VQGAN(
        VQGANConfig(
            ch=32,
            ch_mult=(1, 1, 2),
            num_res_blocks=1,
            attn_levels=(2,),
            z_channels=4,
            embed_dim=4,
            n_embed=64,
        )
    )
    torch.save({"state_dict": vqgan.state_dict()}, path)
    return path


def write_parts(root: Path) -> Path:
    """Write `root`/data, teacher.safetensors and vqgan.ckpt."""
    write_images(root / "data")
    write_teacher(root / "teacher.safetensors")
    write_vqgan(root / "vqgan.ckpt")
    return root


def write_images(root: Path, classes=("ant", "bee", "cat"), per_class: int = 8) -> Path:
    """Write `root`/train and `root`/val with JPEGs of several sizes, in one colour per class."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = random.integers(0, 100, (40 + 7 * i, 60 - 3 * i, 3), dtype=np.uint8)
                pixels[..., number % 3] += 120
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root
