"""Print an estimate: what the run is, its stages, and how it fits each GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dad_fast.engine.schedule import total_epochs
from dad_fast.errors import printable
from dad_fast.tools.dry_run.estimate import CONTEXT, FRAGMENTED, GIB, Estimate, Shared
from dad_fast.tools.dry_run.rates import Rates

NAMES = 34
EXPLANATION = (
    "modelled: arithmetic and passes over memory at the assumed rates of",
    "tools/dry_run/rates.toml; not measured on these GPUs. Kernel launches, loading,",
    "validation and start-up are not counted.",
)
# Seconds of the units of a table's times
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
STORES = "stores, filled once"


def show(found: Estimate, table: Sequence[Rates]) -> str:
    """Return the text of a run."""
    lines = [*_facts(found), "", *_stages(found, table), "", *_memory(found), ""]
    lines += _fits(found, table)
    lines += [*_explained(table), *(f"note: {note}" for note in found.step.notes)]
    return printable("\n".join(lines))


def show_several(
    groups: Sequence[Mapping[str, Estimate]], seeds: int, table: Sequence[Rates]
) -> str:
    """Return the text of several runs of `seeds` seeds each.

    groups: name of a run -> its estimate alone, for runs that learn from the same batches.
    """
    runs = {name: found for group in groups for name, found in group.items()}
    count = f"all {len(runs) * seeds} runs"
    filling = [_filling(list(runs.values()), rates) for rates in table]
    totals = list(filling)
    # Name, GFLOP per image, bytes at the peak, hours on each GPU
    rows: list[tuple[str, float, float, list[float]]] = []
    for group in groups:
        for name, found in group.items():
            hours = [found.training_hours(rates) for rates in table]
            rows.append((name, _gflop(found), found.step.trace.peak, hours))
        if len(group) > 1:
            shared = Shared(tuple(group.values()))
            hours = [shared.training_hours(rates) for rates in table]
            label = f"{len(group)} on the same batches"
            rows.append((label, shared.gflop(), shared.peak(), hours))
        totals = [total + seeds * each for total, each in zip(totals, hours, strict=True)]
    # The largest time decides the unit, so that a short run is not a row of zeros.
    seconds = 3600 * max(totals)
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "seconds")

    def cells(hours: Sequence[float]) -> str:
        times = (_short(3600 * each / UNITS[unit], decimals=2) for each in hours)
        return "".join(f"{time:>{_width(rates)}}" for time, rates in zip(times, table, strict=True))

    width = max(len(name) for name in (*(row[0] for row in rows), count, STORES)) + 1
    num_gpus = next(iter(runs.values())).num_gpus
    head = "".join(f"{rates.name:>{_width(rates)}}" for rates in table)
    lines = [
        f"dry run of {len(runs) * seeds} runs on {num_gpus} GPU{'s' if num_gpus > 1 else ''}; "
        "nothing is written",
        "",
        f"{'':<{width + 24}}  {unit} of training on",
        f"{'run':<{width}}{'seeds':>5}{'GFLOP/image':>12}{'GiB':>7}{head}",
    ]
    for name, gflop, peak, hours in rows:
        facts = f"{seeds:>5}{_short(gflop):>12}{_short(peak / GIB):>7}"
        lines.append(f"{name:<{width}}{facts}{cells(hours)}")
    if any(filling):
        lines.append(f"{STORES:<{width + 24}}{cells(filling)}")
    lines += [f"{count:<{width + 24}}{cells(totals)}", ""]
    if seeds > 1:
        lines.append("The row of a run shows one seed; the last row counts all.")
    if len(rows) > len(runs):
        lines += [
            "The row of a run shows it trained alone; the last row counts runs on the same",
            "batches together, as they are trained.",
        ]
    notes = dict.fromkeys(note for found in runs.values() for note in found.step.notes)
    lines += [*_explained(table), *(f"note: {note}" for note in notes)]
    return printable("\n".join(lines))


def _width(rates: Rates) -> int:
    return max(9, len(rates.name) + 2)


def _short(value: float, decimals: int = 1) -> str:
    """Format with `decimals`, or with two digits below 1."""
    return f"{value:,.{decimals}f}" if value >= 1 else f"{value:.2g}"


def _filling(runs: Sequence[Estimate], rates: Rates) -> float:
    """Return the hours of filling stores; runs with stores of one form share them."""
    hours = {}
    for found in runs:
        form = [(store.kind, store.views, store.num_bytes) for store in found.stores]
        hours[str(form)] = found.preparing_hours(rates)
    return sum(hours.values())


def _facts(found: Estimate) -> list[str]:
    cfg, data, step = found.cfg, found.data, found.step
    epochs = f"{total_epochs(cfg.schedule):g} epochs"
    gpus = f"{found.num_gpus} GPU{'s' if found.num_gpus > 1 else ''}"
    accumulated = cfg.engine.grad_accum_steps
    each = f"{cfg.data.batch_size} per GPU on {gpus}"
    each += f", {accumulated} accumulated" if accumulated > 1 else ""
    size = f", {_bytes(data.num_bytes)}" if data.num_bytes else ""
    parameters = [
        f"{name} {count / 1e6:,.{1 if count > 1e6 else 3}f} M"
        for name, count in step.parameters.items()
    ]
    lines = [
        f"dry run of {cfg.method}; nothing is written",
        f"data        {data.name}: {data.num_images:,} images of {data.num_classes:,} classes{size}",
        f"steps       {found.total_steps:,} of {cfg.data.global_batch_size:,} images "
        f"({each}) in {epochs}",
        f"parameters  {', '.join(parameters)}",
    ]
    if data.num_bytes:
        read = data.num_bytes * found.total_steps / max(1, found.steps_per_epoch)
        lines.append(f"reads       {_bytes(data.num_bytes)} an epoch, {_bytes(read)} in all")
    if found.is_compiled:
        lines.append(
            "compiled    by torch.compile, if its trial at start succeeds (--torchcompile)"
        )
    for store in found.stores:
        most = "" if store.exact else "at most "
        views = f"{store.views} view{'s' if store.views > 1 else ''} of every image"
        lines.append(f"makes       store of {store.kind}, {views}: {most}{_bytes(store.num_bytes)}")
    return lines


def _stages(found: Estimate, table: Sequence[Rates]) -> list[str]:
    head = "".join(f"{f'ms {rates.name}':>14}" for rates in table)
    lines = [f"{'stage':<{NAMES}}{'GFLOP/image':>12}{'peak GiB':>10}{head}"]
    images = found.cfg.data.batch_size * found.cfg.engine.grad_accum_steps
    for stage in found.stages():
        costs = [found.stage_cost(stage, rates) for rates in table]
        gflop = costs[0].flop / images / 1e9
        cells = "".join(f"{each.milliseconds:>14,.1f}" for each in costs)
        lines.append(f"{stage.name:<{NAMES}}{gflop:>12,.1f}{stage.peak / GIB:>10.1f}{cells}")
    if found.num_gpus > 1:
        gradients = found.step.memory["gradients"]
        times = [rates.all_reduce(gradients, found.num_gpus) for rates in table]
        cells = "".join(f"{each:>14,.1f}" for each in times)
        lines.append(f"{'sum of gradients over the GPUs of a node':<{NAMES + 22}}{cells}")
    cells = "".join(f"{found.step_milliseconds(rates):>14,.1f}" for rates in table)
    peak = found.step.trace.peak / GIB
    lines.append(f"{'step':<{NAMES}}{_gflop(found):>12,.1f}{peak:>10.1f}{cells}")
    return lines


def _gflop(found: Estimate) -> float:
    return sum(op.flop for op in found.step.trace.ops) / found.traced_images / 1e9


def _memory(found: Estimate) -> list[str]:
    memory, peak = found.step.memory, found.step.trace.peak
    parts = [f"{name} {size / GIB:.2f}" for name, size in memory.items() if size]
    rest = (peak - sum(memory.values())) / GIB
    return [
        f"memory      {peak / GIB:.1f} GiB per GPU at the peak, {found.memory_needed():.1f} with "
        f"{FRAGMENTED - 1:.0%} for fragments and {CONTEXT:g} GiB for CUDA (assumed)",
        f"            {', '.join(parts)}, activations {max(0.0, rest):.1f}",
    ]


def _fits(found: Estimate, table: Sequence[Rates]) -> list[str]:
    batch = found.cfg.data.batch_size
    prepares = found.preparing_hours(table[0]) > 0
    lines = [
        f"{'GPU':<14}{'source':<12}{f'batch {batch} fits':<18}{'largest batch':>14}"
        f"{'images/s':>12}{'hours':>9}{'before':>9}".removesuffix("" if prepares else "   before")
    ]
    for rates in table:
        fits = "yes" if found.memory_needed() <= rates.memory else "no"
        before = f"{found.preparing_hours(rates):>9,.1f}" if prepares else ""
        lines.append(
            f"{rates.name:<14}{rates.source:<12}{f'{fits}, {rates.memory:.0f} GiB':<18}"
            f"{f'about {found.largest_batch(rates):,}':>14}"
            f"{found.images_per_second(rates):>12,.0f}{found.training_hours(rates):>9,.1f}"
            f"{before}"
        )
    if prepares:
        lines.append("before: hours to fill stores or encode images, before the first step")
    return lines


def _explained(table: Sequence[Rates]) -> tuple[str, ...]:
    return EXPLANATION if any(rates.source == "modelled" for rates in table) else ()


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.{0 if count >= 100 * size else 1}f} {unit}"
    return f"{count / 1e3:,.1f} kB"
