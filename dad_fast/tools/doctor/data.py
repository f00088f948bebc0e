"""`dad-fast doctor --data`: report the contents of a data set, its faults, and its decoding speed
on this machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import numpy as np

from dad_fast.config.options import DoctorOptions
from dad_fast.cores import num_cores
from dad_fast.data.sources.base import Source
from dad_fast.data.sources.index import Files
from dad_fast.data.sources.names import shown, some
from dad_fast.data.sources.pool import progress_bar
from dad_fast.data.sources.registry import OTHER_NAMES, find_listing, open_source
from dad_fast.errors import DataError, EnvironmentProblem
from dad_fast.tools.doctor.row import Row, render

MAX_BAD_SHARE = 0.01  # default of data.max_bad_share
SECONDS = 3.0  # decoding time per back end
SAMPLES = 256  # images that are decoded repeatedly


def run(options: DoctorOptions) -> int:
    """Print the rows and return 0.

    Raises DataError (exit code 4) if more than `MAX_BAD_SHARE` is unreadable or a class has no
    image.
    """
    warnings = _Collected()
    logger = logging.getLogger("dad_fast.data")
    logger.addHandler(warnings)
    propagate, logger.propagate = logger.propagate, False
    try:
        source = open_source(options.data, _split(options), options.class_map, max_bad_share=1.0)
    finally:
        logger.propagate = propagate
        logger.removeHandler(warnings)

    texts = [text for text in warnings.texts if not text.startswith(source.name)]
    for row in contents(source, texts):
        print(render(row), flush=True)
    if hasattr(source, "files"):
        rates = {}
        for name, measure in back_ends(options.loader, source).items():
            row, rates[name] = measure(source)
            print(render(row), flush=True)
        print(render(feeds(rates, options.need)), flush=True)

    bad = int((~source.ok).sum())
    if bad > MAX_BAD_SHARE * len(source):
        raise DataError(
            f"{source.name}: training stops at {MAX_BAD_SHARE:.0%} of unreadable images; fix them "
            "or raise data.max_bad_share"
        )
    if len(source.classes) < 2:
        raise DataError(f"{source.name}: one class; a classifier needs two (--data)")
    present = np.unique(source.labels[source.ok])
    if len(present) < len(source.classes):
        raise DataError(
            f"{source.name}: {len(source.classes) - len(present):,} classes have no image; add "
            "images, or leave these classes out of the --class-map"
        )
    return 0


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _split(options: DoctorOptions) -> str:
    if options.split is not None:
        return options.split
    listing = find_listing(options.data)
    if listing is None:
        return "train"
    names = ("train", *OTHER_NAMES["train"])
    return next((name for name in names if listing.has_split(name)), "")


def contents(source: Source, warnings: list[str]) -> Iterator[Row]:
    """Yield the rows that follow from the index: classes, bad files, warnings, formats, bytes,
    sizes.
    """
    ok = source.ok
    yield Row("data", "ok", source.describe())

    counts = np.bincount(source.labels[ok], minlength=len(source.classes))
    names = [
        f"{i} {shown(name)}" if name != str(i) else name
        for i, name in enumerate(source.classes.names)
    ]
    empty = [names[i] for i in np.flatnonzero(counts == 0).tolist()]
    least, most = counts.min(), counts.max()
    detail = f"{most:,} images each: {some(names)}"
    if least < most:
        detail = f"{least:,} to {most:,} images each, {np.median(counts):,.0f} in the median: {some(names)}"
    if empty:
        detail += f"; without images: {some(empty)}"
    yield Row("classes", "wrong" if empty else "ok", detail)

    files: Files | None = getattr(source, "files", None)
    if files is not None and files.bad:
        listed = some((f"{name} ({why})" for name, why in files.bad), limit=20)
        detail = f"{len(files.bad):,} cannot be read, {100 * len(files.bad) / len(source):.2g} % of all: {listed}"
        yield Row(
            "bad files",
            "wrong",
            detail,
            "replace or remove them; a run takes the next valid image instead of each",
        )
    else:
        yield Row(
            "bad files", "ok", "none" if files is None else "none: each image has been decoded once"
        )
    for text in warnings:
        yield Row("warning", "wrong", text)

    if files is not None:
        formats = np.bincount(files.formats[ok], minlength=len(files.format_names))
        order = np.argsort(-formats, kind="stable")
        named = [f"{files.format_names[i] or '?'} {formats[i]:,}" for i in order if formats[i]]
        yield Row("formats", "ok", ", ".join(named))

        total = _bytes(int(files.num_bytes[ok].sum()))
        median_bytes = _bytes(int(np.median(files.num_bytes[ok])))
        yield Row("bytes", "ok", f"{total} in all, {median_bytes} an image in the median")

    sides = source.sizes[ok]
    area = sides.prod(axis=1, dtype=np.int64)
    small, median, large = (np.argsort(area, kind="stable")[[0, len(area) // 2, -1]]).tolist()
    shapes = (
        f"{sides[i][0]}x{sides[i][1]} px ({area[i] / 1e6:.2g} MP)" for i in (small, median, large)
    )
    detail = "smallest {}, median {}, largest {}".format(*shapes)
    megapixels = area.sum() / 1e6
    total = f"{megapixels:,.0f}" if megapixels >= 10 else f"{megapixels:.2g}"
    yield Row("sizes", "ok", f"{detail}; {total} megapixels in all")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def back_ends(loader: str, source: Source) -> dict[str, Callable[[Source], tuple[Row, float]]]:
    """Return the decoders to time: name -> function that returns a row and images per second."""
    found: dict[str, Callable[[Source], tuple[Row, float]]] = {}
    if loader != "dali":
        found["PIL"] = pil_rate
    if loader not in ("pil", "torchvision"):
        import torch

        from dad_fast.data.loaders.choose import resolve_loader

        try:
            resolve_loader("dali", source, torch.device("cpu"))
            found["DALI cpu"] = lambda source: dali_rate(source, "cpu")
            found["DALI mixed"] = lambda source: dali_rate(source, "mixed")
        except EnvironmentProblem as error:
            if loader == "dali":
                raise
            missing = (
                str(error).removeprefix("--loader dali: ").removesuffix("; or use --loader pil")
            )
            found["DALI"] = lambda source: (Row("DALI", "off", missing), 0.0)
    return found


def _chosen(source: Source) -> list[int]:
    """Return readable samples, spread evenly over the source."""
    samples = np.flatnonzero(source.ok)
    spread = np.linspace(0, len(samples) - 1, min(SAMPLES, len(samples))).astype(int)
    return samples[spread].tolist()


def _rate(decode: Callable[[int], int], name: str) -> float:
    """Return images per second of decode(0), decode(1), …; each call returns its number of images.

    The first is a warm-up.
    """
    decode(0)
    done = call = 0
    start = time.perf_counter()
    with progress_bar(100, f"decoding with {name}") as advance:
        shown_percent = 0
        while (elapsed := time.perf_counter() - start) < SECONDS:
            done += decode(call)
            call += 1
            percent = min(100, int(100 * elapsed / SECONDS))
            advance(percent - shown_percent)
            shown_percent = percent
    return done / (time.perf_counter() - start)


def pil_rate(source: Source) -> tuple[Row, float]:
    """Time one core and multiply by the number of cores: processes share nothing but memory
    bandwidth.
    """
    samples = _chosen(source)

    def decode(call: int) -> int:
        source.read(samples[call % len(samples)])
        return 1

    rate = _rate(decode, "PIL")
    cores = num_cores()
    detail = f"{rate:,.0f} img/s a core; {rate * cores:,.0f} on {cores} cores if they are free"
    return Row("PIL", "ok", detail), rate * cores


def dali_rate(source: Source, device: str) -> tuple[Row, float]:
    """Time DALI on plain JPEGs; PIL decodes all other formats in either loader."""
    name = f"DALI {device}"
    if device == "mixed":
        import torch

        if not torch.cuda.is_available():
            return Row(name, "off", "no GPU here"), 0.0
    samples = _chosen(source)
    encoded = [source.encoded(i) for i in samples]
    files = [content for content in encoded if content is not None]
    if not files:
        return Row(name, "off", "no plain JPEGs here: PIL decodes everything in either loader"), 0.0
    try:
        from dad_fast.data.loaders.dali.decode import decoder

        decode = decoder(files, device, num_cores())

        def decode_all(call: int) -> int:
            decode()
            return len(files)

        rate = _rate(decode_all, name)
    except Exception as error:  # DALI raises RuntimeError and its own types, with pages of text
        reason = " ".join(str(error).split())[:200]
        fix = "--loader torchvision decodes with PIL"
        return Row(name, "wrong", f"failed: {reason}", fix), 0.0

    cores = num_cores()
    where = "on this GPU" if device == "mixed" else f"on {cores} cores, {rate / cores:,.0f} a core"
    share = len(files) / len(samples)
    part = "" if share == 1 else f", on the {share:.0%} that are plain JPEGs"
    return Row(name, "ok", f"{rate:,.0f} img/s {where}{part}"), rate


def feeds(rates: dict[str, float], need: float) -> Row:
    """Compare the fastest back end with `need`, the images per second of training; 0 = not given."""
    best = max(rates, key=lambda name: rates[name])
    able = f"{best} decodes {rates[best]:,.0f} img/s before augmentation"
    if not need:
        return Row("feeds", "ok", f"{able}; --need N compares it with the img/s of a run")
    if rates[best] >= need:
        return Row("feeds", "ok", f"{able}; {need:,.0f} are needed: enough")
    fix = "more cores, a GPU that decodes (--loader dali), smaller images, or a store"
    return Row("feeds", "off", f"{able}; {need:,.0f} are needed: too slow", fix)
