"""Workload of the groups `stages` and `steps`: student, frozen teacher, VQGAN and a batch on the
device, by size.

tiny   the demo's own: embedded digits, its trained teacher and VQGAN, 28 px
base   ResNet-50 from a CLIP ViT-B/16 with VQGAN f16 (1024 codes), 224 px
paper  ViT-B/16 from a CLIP ViT-L/14 with VQGAN f8 (16384 codes), 224 px
base and paper have random weights of published architectures: only shapes matter for time, and
nothing is downloaded. Their teacher is open_clip's image tower, as the presets', or timm's where
open_clip is not installed; the record names it.

Teacher, VQGAN and student have the optimizations of a run (models/optimizations.py, FusedVQGAN).
Their plain forms are kept for the baseline and for counting FLOP.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.flops import Flops
from dad_fast.config.resolve import gather
from dad_fast.config.schema import Config, EngineConfig, PrecisionConfig
from dad_fast.data.augment.records import UNMIXED, mix_record, uses_mixing
from dad_fast.data.classes import ClassMap
from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.fused_layers import VQGANOptimizations
from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN
from dad_fast.engine.build import make_step
from dad_fast.engine.choices import DeviceFacts, choose
from dad_fast.engine.frozen import model_optimizations
from dad_fast.engine.step import TrainStep
from dad_fast.engine.update import Update
from dad_fast.methods.registry import METHODS
from dad_fast.models.load_teacher import load_teacher
from dad_fast.models.optimizations import PLAIN, Optimizations, optimize_student, optimize_teacher
from dad_fast.models.student import Student, build_student
from dad_fast.models.teacher import Teacher

SMOOTH_SIDE = 16  # random images are noise of this side, enlarged: neither flat nor white
# Preset, teacher (of TOWERS), VQGAN
MODELS = {
    "base": ("dad-rn50", "ViT-B-16", "f16-1024"),
    "paper": ("dad-vitb16", "ViT-L-14", "f8-16384"),
}


def speed(engine: EngineConfig, form: str, graphs: str) -> EngineConfig:
    """Return `engine` in a form of `Workload.with_method`.

    With `uses_kernels`, the only place here that names the settings of speed.
    """
    return dataclasses.replace(
        engine,
        savings=("none",) if form == "no savings" else ("all",),
        kernels="on" if form in ("kernels", "compiled") else "off",
        torchcompile=form == "compiled",
        cuda_graphs=graphs,  # type: ignore[arg-type]
    )


def uses_kernels(engine: EngineConfig) -> bool:
    return engine.kernels == "on"


def batch_size_for(device: torch.device, size: str, wanted: int) -> int:
    """Return `wanted` on a GPU; on a CPU at most 100 digits (the demo's batch) or 4 images."""
    if device.type == "cuda":
        return wanted
    return min(wanted, 100 if size == "tiny" else 4)


@dataclass(frozen=True)
class Tower:
    """Shape of a CLIP's image tower."""

    patch: int
    width: int
    layers: int
    heads: int
    features: int


TOWERS = {
    "ViT-L-14": Tower(14, 1024, 24, 16, 768),
    "ViT-B-16": Tower(16, 768, 12, 12, 512),
    # Twelve blocks, so that the last block has the same share as in ViT-B
    "ViT-B-16 of width 192": Tower(16, 192, 12, 3, 512),
}


@dataclass(frozen=True)
class Workload:
    """The frozen parts and the batch; `student` and `step` make new students.

    `plain_teacher` is the baseline's, too.
    """

    size: str
    cfg: Config
    teacher: Teacher
    plain_teacher: Teacher
    discretizer: VQGANDiscretizer
    batch: Batch
    num_classes: int
    device: torch.device

    def student(self, savings: Optimizations = PLAIN) -> Student:
        torch.manual_seed(0)
        student = build_student(self.cfg.student, self.num_classes, self.cfg.augment.img_size).to(
            self.device
        )
        optimize_student(student, savings)
        return (
            student.to(memory_format=torch.channels_last)
            if self.cfg.precision.channels_last
            else student
        )

    def with_method(
        self, method: str, order: str = "paper", form: str = "", graphs: str = "off"
    ) -> Config:
        """form: "" all optimizations; "no savings"; "kernels" (Triton's); "compiled" models with
        kernels, as a long run by default.
        """
        attack = dataclasses.replace(self.cfg.attack, order=order)  # type: ignore[arg-type]
        engine = speed(self.cfg.engine, form, graphs)
        return dataclasses.replace(self.cfg, method=method, attack=attack, engine=engine)

    def step(self, cfg: Config) -> TrainStep:
        """Make a training step of `cfg.method` with a new student."""
        plain = cfg.engine.savings == ("none",)
        student = self.student(model_optimizations(cfg))
        teacher = (
            (self.plain_teacher if plain else self.teacher)
            if METHODS[cfg.method].needs_teacher
            else None
        )
        discretizer = None
        if METHODS[cfg.method].needs_discretizer:
            vqgan_savings = dataclasses.replace(
                VQGANOptimizations.none() if plain else VQGANOptimizations(),
                norm_kernel=uses_kernels(cfg.engine),
            )
            discretizer = make_discretizer(self.discretizer.vqgan, cfg, vqgan_savings, self.batch)
        update = Update(student, cfg, self.device)
        return make_step(cfg, student, teacher, discretizer, update)

    @cached_property
    def flops(self) -> Flops:
        return Flops(self.student(), self.plain_teacher, self.discretizer.vqgan, self.batch)

    def describe(self) -> dict[str, Any]:
        """Return the `config` of a record."""
        cfg, vqgan = self.cfg, self.discretizer.vqgan.config
        return {
            "student": cfg.student.name,
            "teacher": self.teacher.name,
            "vqgan": {
                "ch": vqgan.ch,
                "ch_mult": list(vqgan.ch_mult),
                "n_embed": vqgan.n_embed,
                "embed_dim": vqgan.embed_dim,
            },
            "weights": "trained" if self.size == "tiny" else "random",
            "batch_size": len(self.batch.labels),
            "img_size": self.batch.images.shape[-1],
            "precision": dataclasses.asdict(cfg.precision),
            "attack": dataclasses.asdict(cfg.attack),
            "optimizer": cfg.optim.opt,
            "ema": cfg.ema.model_ema,
            "mixing": uses_mixing(cfg.augment),
        }


def make_workload(
    size: str, device: torch.device, batch_size: int = 0, preset: str = ""
) -> Workload:
    """Make the workload of a size. Skips the test if a package is missing.

    batch_size  0 = that of the preset
    preset      another preset than the size's, for another student
    """
    if size == "tiny":
        return _tiny(device, batch_size)
    return _random(size, device, batch_size, preset)


def _tiny(device: torch.device, batch_size: int) -> Workload:
    for package in ("open_clip", "mlxtend", "sklearn"):
        pytest.importorskip(package)
    from dad_fast.data.loaders.loader import TrainLoader
    from dad_fast.data.sources.registry import open_source

    cfg = gather("demo", None, [], {})
    cfg = settled(cfg, device)
    source = open_source(cfg.data.data_dir, cfg.data.train_split)
    side, size = cfg.augment.img_size, batch_size or cfg.data.batch_size
    loader = TrainLoader(source, cfg.augment, side, size, seed=0, workers=0)
    batch = next(iter(loader.batches(0, 1))).to(device)
    plain = load_teacher(cfg.teacher, source.classes, cfg.precision, device)
    discretizer = load_discretizer(cfg.discretizer.name, cfg.precision, device)
    assert isinstance(discretizer, VQGANDiscretizer)
    return Workload(
        "tiny", cfg, freed(plain, cfg), plain, discretizer, batch, len(source.classes), device
    )


def _random(size: str, device: torch.device, batch_size: int, other_preset: str) -> Workload:
    preset, tower, vqgan_name = MODELS[size]
    cfg = gather(
        other_preset or preset, None, ["student.pretrained=false", "augment.img_size=224"], {}
    )
    cfg = settled(cfg, device)
    num_classes = 1000
    teacher = random_teacher(tower, cfg.precision, device)
    if cfg.precision.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    vqgan = VQGAN(PRESETS[vqgan_name]).to(device)
    batch = random_batch(cfg, batch_size or cfg.data.batch_size, num_classes, device)
    spread_codebook(vqgan, batch.images[:8].float() / 255.0)
    discretizer = make_discretizer(vqgan, cfg, VQGANOptimizations(), batch)
    return Workload(
        size, cfg, freed(teacher, cfg), teacher, discretizer, batch, num_classes, device
    )


def random_teacher(
    tower: str, precision: PrecisionConfig, device: torch.device, library: str = ""
) -> Teacher:
    """Make a teacher of 1000 classes with random weights and OpenAI's activation.

    tower    of TOWERS
    library  "open_clip" or "timm"; "" is open_clip if it is installed
    """
    shape = TOWERS[tower]
    library = library or ("open_clip" if find_spec("open_clip") else "timm")
    torch.manual_seed(0)
    encoder: nn.Module
    head: nn.Module | tuple[Tensor, Tensor]
    if library == "open_clip":
        from open_clip.transformer import QuickGELU, VisionTransformer

        from dad_fast.models.clip_teacher import ImageTower

        encoder = ImageTower(
            VisionTransformer(
                image_size=224,
                patch_size=shape.patch,
                width=shape.width,
                layers=shape.layers,
                heads=shape.heads,
                mlp_ratio=4.0,
                output_dim=shape.features,
                act_layer=QuickGELU,
            )
        )
        prompts = nn.functional.normalize(torch.randn(1000, shape.features), dim=1)
        head = (100 * prompts, torch.zeros(1000))
        name = f"open_clip:{tower}, QuickGELU"
    else:
        import timm

        from dad_fast.models.timm_teacher import PreLogits

        head = timm.create_model(
            "vit_base_patch16_clip_quickgelu_224",
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.layers,
            num_heads=shape.heads,
            num_classes=1000,
        )
        encoder, name = PreLogits(head), f"timm:{tower}, QuickGELU"
    return Teacher(
        encoder,
        head,
        name=name,
        classes=ClassMap(tuple((i, f"class{i}", f"class {i}") for i in range(1000))),
        image_size=224,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        precision=precision,
        unit_features=library == "open_clip",
    ).to(device)


def settled(cfg: Config, device: torch.device) -> Config:
    """Return `cfg` with every "auto" decided as in a run of this student on this device."""
    student = build_student(cfg.student, 2, cfg.augment.img_size)
    return choose(DeviceFacts.of(device), student).settled(cfg)


def freed(teacher: Teacher, cfg: Config) -> Teacher:
    """Return a copy of `teacher` with its exact optimizations."""
    copied = copy.deepcopy(teacher)
    optimize_teacher(copied, model_optimizations(cfg))
    return copied


def make_discretizer(
    vqgan: VQGAN, cfg: Config, savings: VQGANOptimizations, batch: Batch
) -> VQGANDiscretizer:
    discretizer = VQGANDiscretizer(vqgan, cfg.precision, optimizations=savings)
    discretizer.fit_float16(batch.images[:8].float() / 255.0)
    return discretizer


def random_batch(cfg: Config, size: int, num_classes: int, device: torch.device) -> Batch:
    """Make smooth random images with labels and the mixing of the config."""
    generator = torch.Generator().manual_seed(0)
    side = cfg.augment.img_size
    small = torch.rand(size, 3, SMOOTH_SIDE, SMOOTH_SIDE, generator=generator)
    images = (nn.functional.interpolate(small, (side, side), mode="bilinear") * 255).to(torch.uint8)
    pairs = [UNMIXED] * (size // 2)
    if uses_mixing(cfg.augment):
        pairs = [mix_record(cfg.augment, side, 0, 0, i) for i in range(size // 2)]
    mixes = [pair for pair in pairs for _ in range(2)]
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        labels=torch.randint(num_classes, (size,), generator=generator),
        samples=torch.arange(size),
        seeds=torch.arange(size),
        mix_kind=torch.tensor([m.kind for m in mixes]),
        mix_lam=torch.tensor([m.lam for m in mixes], dtype=torch.float32),
        mix_box=torch.tensor([m.box for m in mixes]),
        epoch=0,
        step=0,
        replaced=(),
    ).to(device)


@torch.no_grad()
def spread_codebook(vqgan: VQGAN, pixels: Tensor) -> None:
    """Draw codes around the latents of `pixels`: initial codes lie in almost one point, unlike in
    practice.
    """
    latents = vqgan.encode(pixels).transpose(0, 1).flatten(1)  # [D, N]
    codebook = vqgan.quantize.embedding.weight  # [K, D]
    codebook.copy_(torch.randn_like(codebook) * latents.std(1) + latents.mean(1))
