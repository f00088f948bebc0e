"""Checks of settings that do not fit together. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dad_fast.config.fields import coerce, get, nearest, settings, with_values
from dad_fast.config.resolve import gather, is_fixed
from dad_fast.config.schema import MODEL_SAVINGS, VQGAN_SAVINGS, Config
from dad_fast.config.setting import AUTO
from dad_fast.config.students import NAME
from dad_fast.config.variants import expand
from dad_fast.data.augment.names import check_policy, dali_lacks
from dad_fast.data.sources.registry import SOURCES
from dad_fast.discretizers.registry import DISCRETIZERS, check_argument
from dad_fast.errors import UsageError
from dad_fast.loggers.sinks import SINKS
from dad_fast.methods.batches import batch_settings
from dad_fast.methods.registry import DISTANCES, JOINT_TERMS, METHODS, Images, Target
from dad_fast.methods.stores import check_stores, usable_kinds
from dad_fast.models.registry import MODULE, TEACHERS, members


def resolve(
    preset: str | Sequence[str] | None = None,
    file: Path | Sequence[Path] | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Return the checked Config of a command line.

    `flags` maps paths such as "optim.lr" to what was typed (text, a list of texts, or a bool).
    Raises UsageError for an unknown preset, key or choice, a value of the wrong type or out of
    range, and settings that do not fit together.
    """
    cfg = gather(preset, file, sets, flags)
    check(cfg)
    return cfg


def check(cfg: Config) -> None:
    """Check that settings fit together, for every variant.

    Raises UsageError, which names the flag to change.
    """
    for path, setting in settings().items():
        coerce(setting, get(cfg, path), "settings")
    runs = expand(cfg)
    for name, _, run in runs:
        try:
            check_run(run)
        except UsageError as error:
            one = f"variant {name}: " if cfg.variants else f"student {name}: "
            raise UsageError(f"{one * bool(cfg.variants or cfg.students)}{error}") from None
    if cfg.students:
        _check_students(cfg)
    asking = [run for _, _, run in runs if run.store.make]
    if asking and not any(map(usable_kinds, asking)):
        kinds, method = " ".join(asking[0].store.make), asking[0].method
        raise UsageError(
            f"--stores {kinds}: --method {method} learns from no such store; leave it out"
        )


def check_run(cfg: Config) -> None:
    """Check that the settings of one run fit together, as part of several that may share stores.

    Raises UsageError, which names the flag to change.
    """
    if not cfg.data.data_dir:
        raise UsageError(
            "no data: add --data-dir (a folder with train/ and val/, or embedded:digits), or try "
            "--preset demo"
        )
    method = METHODS[cfg.method]
    if method.linear_probe:
        _check_linear_probe(cfg)
    elif not cfg.student.name:
        raise UsageError(
            "no student: add --student, for instance --student resnet50 (any timm model)"
        )
    if cfg.store.dirs and not method.store_kinds:
        raise UsageError(
            f"--store: --method {cfg.method} learns from no stored images or outputs; leave it out"
        )
    _check_labels(cfg)
    for name in cfg.log_to:
        _ = SINKS[name]  # an unknown name is an error before anything is written
    if cfg.augment.aa:
        check_policy(cfg.augment.aa)
        if cfg.data.loader == "dali" and (lack := dali_lacks(cfg.augment.aa)):
            raise UsageError(f"--loader dali: {lack} (--aa {cfg.augment.aa}); use --loader pil")
    distance = DISTANCES[cfg.loss.distance]
    if cfg.store.mix_outputs and method.takes_distance and not distance.uses_temperature:
        raise UsageError(
            f"--mix-outputs mixes softmax outputs, and --distance {cfg.loss.distance} compares "
            "logits: leave one out"
        )
    check_stores(cfg)
    _check_stored_forms(cfg)
    if method.needs_teacher and not cfg.teacher.name and not cfg.store.dirs:
        raise UsageError(
            f"--method {cfg.method} needs a teacher: add --teacher, for instance --teacher "
            "open_clip:ViT-L-14/openai"
        )
    if method.needs_discretizer and not cfg.discretizer.name and not cfg.store.dirs:
        raise UsageError(
            f"--method {cfg.method} needs a discretizer: add --discretizer (a VQGAN's file, "
            "identity or jpeg:75)"
        )
    _check_scheme(cfg.data.data_dir, "--data-dir", SOURCES.names())
    for member in members(cfg.teacher):
        _check_scheme(member.name, "--teacher", TEACHERS.names())
    _check_scheme(cfg.discretizer.name, "--discretizer", DISCRETIZERS.names())
    check_argument(*DISCRETIZERS.split(cfg.discretizer.name), cfg.discretizer.name)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device):
        raise UsageError(f"--device {cfg.device}: must be auto, cpu, cuda or cuda:N")
    odd = cfg.data.batch_size != AUTO and cfg.data.batch_size % 2
    if (cfg.augment.mixup or cfg.augment.cutmix) and odd:
        raise UsageError(
            f"--batch-size {cfg.data.batch_size}: must be even with --mixup or --cutmix, which "
            "mix pairs of images"
        )
    known = ("all", "none", *MODEL_SAVINGS, *(f"vqgan_{name}" for name in VQGAN_SAVINGS))
    if unknown := [name for name in cfg.engine.savings if name not in known]:
        raise UsageError(
            f"--savings {unknown[0]}: no such optimization{nearest(unknown[0], known)} (known: "
            f"{', '.join(known)})"
        )
    if cfg.student.weights and cfg.student.init_from:
        raise UsageError(
            "--student-weights and --init-from both give the student's weights: leave one out"
        )
    if cfg.schedule.epochs != AUTO and cfg.schedule.warmup_epochs > cfg.schedule.epochs:
        raise UsageError(
            f"--warmup-epochs {cfg.schedule.warmup_epochs:g} is more than --epochs "
            f"{cfg.schedule.epochs}, of which it is the first part: "
            "write --warmup-epochs auto (a tenth of them) or 0, or raise --epochs"
        )


def _check_students(cfg: Config) -> None:
    """Check that several students can learn from the same batches."""
    names = {label: changes[NAME] for label, changes in cfg.students.items()}
    for path in ("student.weights", "student.init_from"):
        heirs = {names[label] for label, own in cfg.students.items() if path not in own}
        if get(cfg, path) and len(heirs) > 1:
            raise UsageError(
                f"{settings()[path].flag} {get(cfg, path)}: weights of one architecture, and the "
                f"students are {', '.join(sorted(heirs))}; give each its own in [[students]]"
            )
    for variant, tables in (cfg.variants or {"": {}}).items():
        of_variant = {variant: tables} if variant else {}
        students = expand(with_values(cfg, {"variants": of_variant, "seeds": 1}))
        (_, _, first), *others = students
        if METHODS[first.method].linear_probe:
            raise UsageError(
                f"--student: --method {first.method} trains a linear layer on the teacher's "
                "encoder and takes no students"
            )
        expected = batch_settings(first, any_size=True)
        for label, (_, _, other) in zip([*cfg.students][1:], others, strict=True):
            found = batch_settings(other, any_size=True)
            differing = [path for path in expected if found.get(path) != expected[path]]
            if differing:
                raise UsageError(
                    f"[[students]] {label}: {differing[0]} decides the batches, which all students "
                    "share; set it for all of them"
                )


def _check_labels(cfg: Config) -> None:
    """Check that the method can learn from images without labels, where there are any."""
    method, without = METHODS[cfg.method], cfg.data.labels == "teacher"
    if not without and not cfg.data.extra_data:
        return
    flag = "--labels teacher" if without else f"--extra-data {cfg.data.extra_data}"
    if not method.learns_from_teacher:
        able = ", ".join(name for name in METHODS.own_names() if METHODS[name].learns_from_teacher)
        raise UsageError(
            f"{flag}: --method {cfg.method} learns from labels alone; use one of {able}"
        )
    on_attacked = any(
        term.target == Target.LABELS and term.images != Images.CLEAN for term in method.terms
    )
    if without and on_attacked:
        raise UsageError(
            f"--labels teacher: --method {cfg.method} learns from labels on attacked images; use dad"
        )
    if method.linear_probe and cfg.lp_clip.labels == "true":
        raise UsageError(f"{flag}: images without labels, and --lp-labels true needs them")
    if cfg.loss.form == "joint":
        raise UsageError(f"{flag}: --loss-form joint needs labels; leave one out")


def _check_stored_forms(cfg: Config) -> None:
    kinds = usable_kinds(cfg)
    if cfg.store.mix_outputs and not cfg.store.dirs and "targets" not in kinds:
        raise UsageError(
            "--mix-outputs mixes stored outputs: add --store (made by dad-fast precompute "
            "--targets) or --stores targets"
        )
    if cfg.loss.form == "paper":
        return
    if METHODS[cfg.method].terms != JOINT_TERMS:
        raise UsageError(
            f"--loss-form joint is a form of --method dad, not of {cfg.method}; leave it out"
        )
    if not cfg.store.dirs and "adversarial" not in kinds:
        raise UsageError(
            "--loss-form joint learns from stored adversarial images: add --store (made by "
            "dad-fast precompute) or --stores"
        )
    if cfg.student.bn != "joint":
        raise UsageError(
            f"--loss-form joint: every image is of both kinds, and --bn {cfg.student.bn} needs "
            "them apart; use --bn joint"
        )


def _check_linear_probe(cfg: Config) -> None:
    """Check settings that a linear probe has no use for."""
    if cfg.teacher.name.startswith(MODULE):
        raise UsageError(
            f"--teacher {cfg.teacher.name}: --method {cfg.method} needs an encoder's features, and a "
            "module of your own gives logits; name an open_clip or timm model"
        )
    if cfg.store.dirs:
        raise UsageError(
            "--store: --method lp-clip keeps the teacher's predictions in the cache; leave it out"
        )
    if cfg.optim.layer_decay or cfg.student.grad_checkpointing:
        flag = "--layer-decay" if cfg.optim.layer_decay else "--grad-checkpointing"
        raise UsageError(f"{flag}: --method lp-clip trains one linear layer; leave it out")
    if cfg.augment.mixup or cfg.augment.cutmix:
        raise UsageError(
            "--method lp-clip: a pseudo-label belongs to one image, and --mixup and --cutmix "
            "blend two; leave them out"
        )
    if cfg.lp_clip.labels == "true" and cfg.lp_clip.threshold:
        raise UsageError(
            "--lp-threshold: with --lp-labels true there are no pseudo-labels; leave one out"
        )
    if cfg.lp_clip.init == "zero-shot" and cfg.student.init_from:
        raise UsageError(
            "--lp-init zero-shot and --init-from both give the first weights: leave one out"
        )
    if cfg.data.loader == "dali" and (cfg.lp_clip.views or is_fixed(cfg.augment)):
        raise UsageError(
            "--loader dali: kept features are of images that PIL decodes; leave it out, or train "
            "on new views"
        )


def _check_scheme(name: str, flag: str, schemes: tuple[str, ...]) -> None:
    """Check a name that may be a path: a word before a colon must be a known scheme."""
    scheme, colon, rest = name.partition(":")
    if not colon or "/" in scheme or len(scheme) == 1 or Path(name).exists():
        return
    if scheme == "python":
        return
    if scheme not in schemes:
        raise UsageError(
            f"{flag} {name}: unknown kind {scheme}:{nearest(scheme, schemes)} (known: "
            f"{', '.join(s + ':' for s in schemes)})"
        )
    if scheme == "embedded" and rest != "digits":
        raise UsageError(f"{flag} {name}: nothing of that name is embedded; use embedded:digits")
    if not rest:
        raise UsageError(f"{flag} {name}: a name is missing after the colon")
