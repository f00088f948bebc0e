"""Helpers for tests of linear probes: runs on a tiny CLIP and a folder of JPEGs."""

import torch

from dad_fast.config.schema import PrecisionConfig, TeacherConfig
from dad_fast.data.sources.registry import open_source
from dad_fast.engine.build import Builder
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.trainer import Trainer
from dad_fast.methods.settings import resolve
from dad_fast.models.load_teacher import load_teacher

STRONG = [
    "augment.aa=rand-m9-n2-mstd0.5",
    "augment.reprob=0.5",
    "augment.remode=const",
    "augment.scale=[0.5,1.0]",
]
PLAIN = ["augment.crop=center", "augment.hflip=0", "augment.color_jitter=0"]


def config(parts, *more, views=STRONG):
    fixed = [
        f"data.data_dir={parts / 'data'}",
        f"teacher.name={parts / 'teacher.safetensors'}",
        "method=lp-clip",
        "data.batch_size=8",
        "data.workers=0",
        "schedule.epochs=4",
        "schedule.warmup_epochs=0",
        "optim.lr=0.05",
        "augment.smoothing=0",
        "device=cpu",
        "eval.every_epochs=0",
        "log_every=3",
    ]
    return resolve(None, None, [*fixed, *views, *more], {})


BUILDER = Builder()


def trained(cfg, folder, resume="", builder=BUILDER, change=None):
    """Train a run; `change` may modify its components first, which then come from a new builder."""
    made = (Builder() if change else builder).build(cfg)
    if change:
        change(made)
    trainer = Trainer(cfg, made, folder, "test", resume)
    trainer.start()
    Lockstep([trainer]).train()
    return trainer


def arguments(parts, out, *more):
    given = [
        "train",
        "--method",
        "lp-clip",
        "--data-dir",
        str(parts / "data"),
        "--teacher",
        str(parts / "teacher.safetensors"),
        "-o",
        str(out),
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--epochs",
        "2",
        "--warmup-epochs",
        "0",
        "--lr",
        "0.05",
        "--device",
        "cpu",
    ]
    return [*given, *map(str, more)]


def teacher_of(parts, file="teacher.safetensors", head=""):
    classes = open_source(str(parts / "data"), "train").classes
    return load_teacher(
        TeacherConfig(name=str(parts / file), head=str(head)),
        classes,
        PrecisionConfig(),
        torch.device("cpu"),
    )
