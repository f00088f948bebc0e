"""What a run says of itself before its first step."""

from __future__ import annotations

from dad_fast.config.schema import Config
from dad_fast.data.loaders.choose import resolve_loader
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.build import Components
from dad_fast.engine.probe_features import FeatureLoader


def introduction(cfg: Config, parts: Components, loader: TrainLoader | FeatureLoader) -> list[str]:
    """Lines for the log: data, batches, models and where they come from, what was saved of their work."""
    lines = [parts.train.describe(), _batches(cfg)]
    if distributed.world() > 1 and parts.student.has_batch_stats:
        lines.append(_batch_norm(cfg))
    if parts.teacher is not None:
        lines.append(f"teacher {parts.teacher.name}; it has seen: {parts.teacher.provenance}")
    if parts.probe is not None:
        trained = sum(p.numel() for p in parts.student.parameters() if p.requires_grad)
        lines.append(
            f"a linear layer of {trained:,} numbers is trained on the teacher's frozen encoder"
        )
    if parts.discretizer is not None:
        lines.append(
            f"discretizer {parts.discretizer.name}; it has seen: {parts.discretizer.provenance}"
        )
        lines += parts.discretizer.notes()
    for part, found in parts.savings.items():
        texts = [f"not {name} ({why})" if why else name for name, why in found.items()]
        lines.append(f"savings of the {part}: {', '.join(texts) or 'none'}")
    if not isinstance(loader, FeatureLoader):
        name, why = resolve_loader(cfg.data.loader, parts.train, parts.device)
        lines.append(f"loader {name}: {why}")
    lines += [
        f"{store.kind} from {store.folder}: {store.num_views} views of {len(store):,} images"
        for store in parts.stored.stores
    ]
    return lines


def _batches(cfg: Config) -> str:
    world, parts = distributed.world(), cfg.engine.grad_accum_steps
    accumulated = f" x {parts} accumulated" if parts > 1 else ""
    processes = f"{world} process{'es' if world > 1 else ''}"
    return f"batch {cfg.data.batch_size} x {processes}{accumulated} = {cfg.data.global_batch_size} images a step"


def _batch_norm(cfg: Config) -> str:
    if cfg.student.sync_bn:
        return f"batch norm: over the {cfg.data.batch_size * distributed.world()} images of all processes (--sync-bn)"
    return f"batch norm: each process over its own {cfg.data.batch_size} images, running statistics averaged (--sync-bn: over all images)"
