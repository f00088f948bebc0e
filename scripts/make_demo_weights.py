#!/usr/bin/env python
"""Make the demo's teacher and discretizer from the embedded digits:
dad_fast/assets/digits-{clip,vqgan}.safetensors.

    OMP_NUM_THREADS=1 python scripts/make_demo_weights.py   # both, as committed: 6 minutes of one core
    python scripts/make_demo_weights.py --seed 1 -o other   # a second teacher and discretizer
    # A teacher that is not trained on optdigits:
    python scripts/make_demo_weights.py --see mnist,corruptions -o blind

Use others with `dad-fast train --preset demo --teacher other/digits-clip.safetensors --discretizer
other/digits-vqgan.safetensors`.

The teacher is an open_clip model: an image tower (timm's test_resnet, 0.4 M parameters), a small
text tower, and CLIP's loss where the texts of a batch are prompts of all ten class names, so each
image is classified among ten. It is used zero-shot, like any CLIP. The discretizer is this
project's VQGAN (4x4 pixels a code), trained as a VQ-VAE (arXiv 1711.00937) with the losses and
restarts of `dad-fast fit-discretizer`: no discriminator, no perceptual loss. Unlike there the
codebook is trained by gradient, and images are augmented as for the teacher.

Neither is trained on the splits val, test and optdigits. The corruptions of `--see` are implemented
here, independent of those of dad_fast.evaluation, with a random strength for each image. The teacher
still knows the families (noise, blur, contrast, inversion): the metadata `seen` names them, and the
demo prints them under its table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a bare checkout too

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.sources.embedded import NAMES, EmbeddedSource
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.model import VQGAN, VQGANConfig
from dad_fast.discretizers.vqgan.training import DeadCodes, training_pass
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.weights.declared import TEACHER
from dad_fast.models.weights.files import write_safetensors

ASSETS = Path(__file__).resolve().parent.parent / "dad_fast" / "assets"
SPLITS = {"mnist": "train", "optdigits": "optdigits-train"}
SIGHTS = (*SPLITS, "corruptions")

# CLIP's own prompt for MNIST first (arXiv 2103.00020).
TEMPLATES = ('a photo of the number: "{}".', "a handwritten digit {}.", "the number {}.")
MEAN, STD = (0.15, 0.15, 0.15), (0.3, 0.3, 0.3)
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 28,
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
# A sharper softmax adds nothing with ten classes and leaves a student less to learn from.
MAX_LOGIT_SCALE = math.log(20.0)
VQGAN_CONFIG = VQGANConfig(
    ch=8,
    ch_mult=(1, 2, 4),
    num_res_blocks=1,
    attn_levels=(),
    z_channels=4,
    embed_dim=4,
    n_embed=256,
    norm_groups=4,
)
COMMITMENT = 0.25
BATCH = 128


def load(split: str) -> tuple[Tensor, Tensor]:
    """Load pixels float32 [N, 3, 28, 28] in [0, 1] and labels [N]."""
    source = EmbeddedSource(split)
    encoded = [bytearray(source.read(i).tobytes()) for i in range(len(source))]
    images = torch.stack([torch.frombuffer(content, dtype=torch.uint8) for content in encoded])
    pixels = images.view(-1, 28, 28, 3).permute(0, 3, 1, 2).float().div(255.0)
    return pixels, torch.from_numpy(source.labels)


# --- augmentation of the training images -------------------------------------------------------


def uniform(count: int, low: float, high: float) -> Tensor:
    """Draw one number for each image, [count, 1, 1, 1]."""
    return torch.empty(count, 1, 1, 1).uniform_(low, high)


def sometimes(x: Tensor, changed: Tensor, probability: float) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < probability, changed, x)


def move(x: Tensor) -> Tensor:
    """Rotate by up to 20 degrees, scale by 0.8 to 1.33 (and the height a little by itself), shear,
    shift by up to 3 pixels.
    """
    count = len(x)
    angle = uniform(count, -20, 20).flatten().deg2rad()
    scale = uniform(count, 0.75, 1.25).flatten()
    stretch, shear = uniform(count, 0.85, 1.18).flatten(), uniform(count, -0.25, 0.25).flatten()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    dx, dy = uniform(count, -0.22, 0.22).flatten(), uniform(count, -0.22, 0.22).flatten()
    matrix = torch.stack((cos, shear - sin, dx, sin, cos * stretch, dy), dim=1).view(count, 2, 3)
    return F.grid_sample(
        x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False
    )


def blur(x: Tensor) -> Tensor:
    """Blur each image with a Gaussian of 0.4 to 2.2 pixels."""
    offsets = torch.arange(-4.0, 5.0)
    sigma = uniform(len(x), 0.4, 2.2).view(-1, 1)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1)  # [B, 9]
    x = x.transpose(0, 1)  # images as channels: a grouped convolution has a kernel for each image
    x = F.conv2d(
        F.pad(x, (4, 4, 0, 0), mode="replicate"), kernel[:, None, None, :], groups=x.shape[1]
    )
    x = F.conv2d(
        F.pad(x, (0, 0, 4, 4), mode="replicate"), kernel[:, None, :, None], groups=x.shape[1]
    )
    return x.transpose(0, 1)


def corrupt(x: Tensor) -> Tensor:
    """Apply blur, less contrast, inversion and Gaussian noise, each to some of the images."""
    count = len(x)
    x = sometimes(x, blur(x), 0.35)
    middle = sometimes(x.mean(dim=(1, 2, 3), keepdim=True), uniform(count, 0.0, 1.0), 0.5)
    x = sometimes(x, middle + (x - middle) * uniform(count, 0.15, 1.0), 0.4)
    x = sometimes(x, 1.0 - x, 0.25)
    x = sometimes(x, x + uniform(count, 0.0, 0.35) * torch.randn_like(x), 0.4)
    return x.clamp(0.0, 1.0)


# --- training ----------------------------------------------------------------------------------


def fit(
    name: str,
    model: nn.Module,
    sets: list[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor, float], Tensor],
    epochs: int,
    lr: float,
) -> None:
    """Train with AdamW and a one-cycle schedule over all sets together.

    `loss` gets images, labels and the finished share of the training.
    """
    pixels, labels = (torch.cat(parts) for parts in zip(*sets, strict=True))
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embedding" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=lr
    )
    steps = len(pixels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    start = time.monotonic()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for i, rows in enumerate(torch.randperm(len(pixels))[: steps * BATCH].view(steps, BATCH)):
            value = loss(pixels[rows], labels[rows], (epoch + i / steps) / epochs)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += value.item()
        mean, seconds = total / steps, time.monotonic() - start
        print(
            f"{name}: epoch {epoch + 1:3d}/{epochs}  loss {mean:.4f}  {seconds:5.0f} s", flush=True
        )
    model.eval()


def train_teacher(
    sets: list[tuple[Tensor, Tensor]], augment: Callable[[Tensor], Tensor], epochs: int
) -> nn.Module:
    clip = open_clip.CLIP(**CLIP_CONFIG)
    tokenizer = open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["text_cfg"]["context_length"])
    texts = [[template.format(name) for name in NAMES] for template in TEMPLATES]
    prompts = torch.stack([tokenizer(batch) for batch in texts])  # [templates, 10, 20]
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)

    def loss(pixels: Tensor, labels: Tensor, done: float) -> Tensor:
        with torch.no_grad():
            clip.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        text = clip.encode_text(prompts[torch.randint(len(prompts), ())], normalize=True)  # [10, F]
        image = clip.encode_image((augment(pixels) - mean) / std, normalize=True)  # [B, F]
        return F.cross_entropy(clip.logit_scale.exp() * image @ text.T, labels)

    fit("teacher", clip, sets, loss, epochs, lr=4e-3)
    # Embeddings of tokens without a prompt are still initial noise; zeros compress better.
    with torch.no_grad():
        unused = torch.ones(len(clip.token_embedding.weight), dtype=torch.bool)
        unused[prompts.unique()] = False
        clip.token_embedding.weight[unused] = 0.0
    return clip


def train_discretizer(
    sets: list[tuple[Tensor, Tensor]], augment: Callable[[Tensor], Tensor], epochs: int
) -> VQGAN:
    vqgan = VQGAN(VQGAN_CONFIG)
    dead = DeadCodes(vqgan)

    def loss(pixels: Tensor, labels: Tensor, done: float) -> Tensor:
        x = augment(pixels)
        z = vqgan.encode(x)  # [B, D, h, w]
        if done < 0.7:
            dead.restart(z)
        found = training_pass(vqgan, x, z)
        dead.count(found.codes)
        return found.l1 + found.l2 + found.codebook + COMMITMENT * found.commitment

    fit("discretizer", vqgan, sets, loss, epochs, lr=4e-3)
    return vqgan


# --- files -------------------------------------------------------------------------------------


def make_teacher(
    path: Path,
    sets: list[tuple[Tensor, Tensor]],
    augment: Callable[[Tensor], Tensor],
    epochs: int,
    seen: str,
) -> None:
    clip = train_teacher(sets, augment, epochs).half()
    described = {
        "kind": "open_clip",
        "model_cfg": CLIP_CONFIG,
        "mean": MEAN,
        "std": STD,
        "templates": TEMPLATES,
        "seen": seen,
    }
    write_safetensors(path, clip.state_dict(), {TEACHER: json.dumps(described)})
    # Evaluate the teacher as a run loads it, on splits that it was not trained on.
    teacher = load_teacher(
        TeacherConfig(name=str(path)),
        EmbeddedSource("val").classes,
        PrecisionConfig(),
        torch.device("cpu"),
    )
    for split in ("val", "test", "optdigits"):
        pixels, labels = load(split)
        clean = accuracy(teacher, pixels, labels)
        corrupted = accuracy(teacher, corrupt(pixels), labels)
        print(f"teacher: {split:10s} {clean:5.1f} %   corrupted {corrupted:5.1f} %")


def make_discretizer(
    path: Path,
    sets: list[tuple[Tensor, Tensor]],
    augment: Callable[[Tensor], Tensor],
    epochs: int,
    seen: str,
) -> None:
    train_discretizer(sets, augment, epochs).half().save(path, seen)
    discretizer = load_discretizer(str(path), PrecisionConfig(), torch.device("cpu"))
    for split in ("val", "optdigits"):
        pixels, _ = load(split)
        images, codes = discretizer(pixels)
        assert codes is not None, "a VQGAN has codes"
        error = (images - pixels).square().mean().sqrt()
        print(
            f"discretizer: {split:10s} rms error {error:.4f}   {len(codes.unique())} of "
            f"{VQGAN_CONFIG.n_embed} codes in use"
        )


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([model(part).argmax(dim=1) for part in pixels.split(250)])
    return 100.0 * predicted.eq(labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order and augmentation"
    )
    parser.add_argument(
        "--see", default=",".join(SIGHTS), help="training data of both (default: %(default)s)"
    )
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--discretizer-epochs", type=int, default=14)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--teacher-only", action="store_true")
    only.add_argument("--discretizer-only", action="store_true")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=ASSETS,
        help="folder for the files (default: dad_fast/assets)",
    )
    args = parser.parse_args()
    see = args.see.split(",")
    if unknown := set(see) - set(SIGHTS):
        parser.error(f"--see: {sorted(unknown)[0]!r} is none of {', '.join(SIGHTS)}")
    if not set(see) & set(SPLITS):
        parser.error(f"--see: name at least one of {', '.join(SPLITS)}")
    args.output.mkdir(parents=True, exist_ok=True)

    sets = [load(split) for name, split in SPLITS.items() if name in see]
    wording = {
        "mnist": "digits of MNIST's training split",
        "optdigits": "digits of optdigits that are in no judged split",
    }
    seen = ", ".join(
        f"{len(load(SPLITS[name])[1]):,} {wording[name]}" for name in SPLITS if name in see
    )
    seen += "; rotated, scaled, sheared, shifted"
    seen += (
        "; blur, contrast, inversion, Gaussian noise"
        if "corruptions" in see
        else "; no corruptions"
    )
    augment = (lambda x: corrupt(move(x))) if "corruptions" in see else move
    if not args.discretizer_only:
        torch.manual_seed(args.seed)
        make_teacher(
            args.output / "digits-clip.safetensors", sets, augment, args.teacher_epochs, seen
        )
    if not args.teacher_only:
        # Again, so that each file is the same with and without the other.
        torch.manual_seed(args.seed)
        make_discretizer(
            args.output / "digits-vqgan.safetensors", sets, augment, args.discretizer_epochs, seen
        )


if __name__ == "__main__":
    main()
