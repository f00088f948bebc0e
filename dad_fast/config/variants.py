"""Several runs from one Config (variants times seeds), and what differs between two Configs."""

from __future__ import annotations

from dad_fast.config.fields import coerce, flatten, get, lookup, settings, with_values
from dad_fast.config.schema import Config
from dad_fast.errors import UsageError

# Settings that may differ between a run and its continuation without changing what it computes, so that `--resume` lets
# them differ: how fast images are loaded and whether they are counted as bad too late (data.workers, data.max_bad_share),
# how often something is written (log_every, checkpoint.*), what is judged afterwards and in what portions (eval.*), where
# a run stops (max_steps: the schedule does not depend on it), where it runs (device), how many runs there are (seeds), in what
# portions a step is computed (data.batch_size, engine.grad_accum_steps: data.global_batch_size decides, and students with batch
# norm are looked at on their own), how long processes wait for one another (engine.dist_timeout), and where weights came from that
# are in the checkpoint by now (student.weights, student.init_from, student.pretrained).
RESUME_SAFE = frozenset(
    {
        *("data.workers", "data.max_bad_share", "log_every", "max_steps", "device", "seeds"),
        *("checkpoint.every_steps", "checkpoint.keep", "engine.cuda_graphs"),
        *("data.batch_size", "engine.grad_accum_steps", "engine.dist_timeout"),
        *(
            "eval.every_epochs",
            "eval.suites",
            "eval.batch_size",
            "eval.allow_partial",
            "eval.c_preprocessing",
        ),
        *("student.weights", "student.init_from", "student.pretrained"),
    }
)


def expand(cfg: Config) -> list[tuple[str, int, Config]]:
    """The runs of `cfg`: (variant's name, seed, Config of that one run). Without variants there is one, named by its method."""
    runs = []
    for name, tables in (cfg.variants or {cfg.method: {}}).items():
        where = f"variants.{name}"
        changes = {
            path: coerce(lookup(path, where), value, where)
            for path, value in flatten(tables, where)
        }
        if "data.batch_size" in changes:
            changes = {"data.global_batch_size": 0, **changes}
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            runs.append(
                (
                    name,
                    seed,
                    with_values(cfg, {**changes, "variants": {}, "seeds": 1, "seed": seed}),
                )
            )
    return runs


def with_batch_sizes(cfg: Config, num_processes: int) -> Config:
    """`cfg` with both batch sizes as they are on so many processes; the global one decides where it is given.

    Raises UsageError where it cannot be divided.
    """
    at_once = num_processes * cfg.engine.grad_accum_steps
    size = cfg.data.global_batch_size
    if not size:
        return with_values(cfg, {"data.global_batch_size": cfg.data.batch_size * at_once})
    each, rest = divmod(size, at_once)
    among = f"{num_processes} process{'es' if num_processes > 1 else ''} x --grad-accum-steps {cfg.engine.grad_accum_steps}"
    if rest or not each:
        raise UsageError(
            f"--global-batch-size {size}: cannot be divided evenly among {among}; take a multiple of {at_once}"
        )
    if (cfg.augment.mixup or cfg.augment.cutmix) and each % 2:
        odd = f"gives each of {among} {each} images, an odd number"
        raise UsageError(
            f"--global-batch-size {size}: {odd}, where --mixup and --cutmix mix pairs; take a multiple of {2 * at_once}"
        )
    return with_values(cfg, {"data.batch_size": each})


def differences(old: Config, new: Config) -> list[str]:
    """'section.key: old → new' for every setting that changes what a run computes and is not the same in both."""
    lines = [
        f"{path}: {get(old, path)!r} → {get(new, path)!r}"
        for path in settings()
        if path not in RESUME_SAFE and get(old, path) != get(new, path)
    ]
    if old.variants != new.variants:
        names = sorted(
            name
            for name in {**old.variants, **new.variants}
            if old.variants.get(name) != new.variants.get(name)
        )
        lines.append(f"variants: {', '.join(names)} differ")
    return lines
