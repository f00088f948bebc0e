"""Expansion of a Config into runs (variants times students times seeds), and the differences of two
Configs.
"""

from __future__ import annotations

from typing import Any

from dad_fast.config.fields import DECIDED_BY, coerce, flatten, get, lookup, settings, with_values
from dad_fast.config.schema import Config
from dad_fast.config.setting import AUTO
from dad_fast.errors import UsageError

# Settings that do not change what a run computes, so that they may differ between a run and its
# continuation.
RESUME_SAFE = frozenset(
    {
        # Speed and place.
        "data.workers",
        "device",
        "engine.cuda_graphs",
        "engine.kernels",
        "engine.vqgan_micro_batch",
        "engine.dist_timeout",
        # Stopping and writing. The schedule does not depend on max_steps.
        "checkpoint.every_steps",
        "checkpoint.keep",
        "data.max_bad_share",
        "log_every",
        "log_to",
        "max_steps",
        "seeds",
        # data.global_batch_size decides; checkpoint.compatibility checks students with batch norm
        # separately.
        "data.batch_size",
        "engine.grad_accum_steps",
        # Evaluation.
        "eval.allow_partial",
        "eval.batch_size",
        "eval.c_preprocessing",
        "eval.every_epochs",
        "eval.suites",
        # Sources of weights that the checkpoint contains by now.
        "student.init_from",
        "student.pretrained",
        "student.weights",
    }
)


def expand(cfg: Config) -> list[tuple[str, int, Config]]:
    """Return (name of the variant, seed, Config) for every run of `cfg`.

    Without variants the name is the method; with students it is the student's label, after the name
    of the variant if there are several. Raises UsageError for two runs of one name.
    """
    runs: dict[tuple[str, int], Config] = {}
    for variant, tables in (cfg.variants or {cfg.method: {}}).items():
        of_variant = _changes(tables, f"variants.{variant}")
        if cfg.students and "student.name" in of_variant:
            raise UsageError(
                f"variants.{variant}: student.name, and students are named for all variants; "
                "leave one out"
            )
        for label, own in (cfg.students or {"": {}}).items():
            both = f"{variant}_{label}" if len(cfg.variants) > 1 else label
            name = both if label else variant
            changes = {**of_variant, **_changes(own, f"students {label}")}
            for seed in range(cfg.seed, cfg.seed + cfg.seeds):
                if (name, seed) in runs:
                    raise UsageError(f"two runs are named {name}; give the student another label")
                one = {**changes, "students": {}, "variants": {}, "seeds": 1, "seed": seed}
                runs[name, seed] = with_values(cfg, one)
    return [(name, seed, one) for (name, seed), one in runs.items()]


def _changes(tables: dict[str, Any], where: str) -> dict[str, Any]:
    """Return path -> value, with those that others would decide in their place reset."""
    changes = {
        path: coerce(lookup(path, where), value, where) for path, value in flatten(tables, where)
    }
    decided = {by: settings()[by].default for key, by in DECIDED_BY.items() if key in changes}
    return {**decided, **changes}


def student_seed(cfg: Config) -> int:
    """Return the seed of the student's initial weights and of what it draws in training."""
    return cfg.seed if cfg.student.seed == AUTO else cfg.student.seed


def with_batch_sizes(cfg: Config, num_processes: int) -> Config:
    """Return `cfg` with the batch sizes of a process and of all `num_processes` processes.

    The global one decides if it is given. With `optim.lr_base` the learning rate follows from it.
    Raises UsageError if it cannot be divided.
    """
    cfg = _with_both_sizes(cfg, num_processes)
    return with_values(cfg, {"optim.lr": scaled_lr(cfg)}) if cfg.optim.lr_base else cfg


def scaled_lr(cfg: Config) -> float:
    """Return the learning rate of `optim.lr_base` at the global batch size, as timm's train.py does.

    lr_base times the ratio of the global batch to lr_base_size, or times its square root.
    """
    optim = cfg.optim
    ratio = cfg.data.global_batch_size / optim.lr_base_size
    is_adaptive = any(name in optim.opt.lower() for name in ("ada", "lamb"))
    scale = optim.lr_base_scale
    if scale == "auto":
        scale = "sqrt" if is_adaptive else "linear"
    return optim.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def _with_both_sizes(cfg: Config, num_processes: int) -> Config:
    at_once = num_processes * cfg.engine.grad_accum_steps
    size = cfg.data.global_batch_size
    if not size:
        return with_values(cfg, {"data.global_batch_size": cfg.data.batch_size * at_once})
    each, rest = divmod(size, at_once)
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    among = f"{processes} x --grad-accum-steps {cfg.engine.grad_accum_steps}"
    flag = f"--global-batch-size {size}"
    if rest or not each:
        raise UsageError(
            f"{flag}: cannot be divided evenly among {among}; take a multiple of {at_once}"
        )
    if (cfg.augment.mixup or cfg.augment.cutmix) and each % 2:
        odd = f"gives each of {among} {each} images, an odd number"
        raise UsageError(
            f"{flag}: {odd}, but --mixup and --cutmix mix pairs; take a multiple of {2 * at_once}"
        )
    return with_values(cfg, {"data.batch_size": each})


def differences(old: Config, new: Config) -> list[str]:
    """Return 'section.key: old → new' for every difference that changes what a run computes."""
    lines = [
        f"{path}: {get(old, path)!r} → {get(new, path)!r}"
        for path in settings()
        if path not in RESUME_SAFE and get(old, path) != get(new, path)
    ]
    tables = ("students", old.students, new.students), ("variants", old.variants, new.variants)
    for what, before, after in tables:
        names = sorted(n for n in {**before, **after} if before.get(n) != after.get(n))
        if names:
            lines.append(f"{what}: {', '.join(names)} differ")
    return lines
