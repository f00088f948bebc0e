"""The DALI loader: the PIL loader's sequence, exact resume, unusual files by PIL, fail-over."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nvidia.dali")
torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")

from dali_cases import CENTER, FULL, Files, by_dali, decoded, jpeg, photos, record_of
from PIL import Image

from dad_fast.config.schema import AugmentConfig
from dad_fast.data.loaders.choose import resolve_loader, train_loader
from dad_fast.data.loaders.dali import loader as dali_loader
from dad_fast.data.loaders.dali.jpeg import is_sound
from dad_fast.data.loaders.dali.loader import DaliLoader
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.data.sources.decode import DecodeError, read_rgb
from dad_fast.data.sources.registry import open_source
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from tests.processes import HANG

st = hypothesis.strategies
CPU = torch.device("cpu")
FIELDS = ("labels", "samples", "seeds", "mix_kind", "mix_lam", "mix_box")


def shade(number, size=(64, 48)):
    """Make a smooth picture with colours of its own."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    return Image.fromarray(
        np.stack([x * 3 + number, y * 4, np.full_like(x, number * 5)], axis=-1)
        .clip(0, 255)
        .astype(np.uint8)
    )


def shades(num=30):
    return [jpeg(shade(number)) for number in range(num)]


def nobody_reads(number):
    """Make a file with all its markers and an invalid code table."""
    data = jpeg(shade(number))
    table = data.index(b"\xff\xc4") + 5
    damaged = data[:table] + b"\xff" * 16 + data[table + 16 :]
    assert is_sound(damaged, 64, 48)
    with pytest.raises(DecodeError):
        decoded(damaged)
    return damaged


def loaders(source, aug=FULL, img_size=32, batch_size=6, seed=3, workers=0):
    yield DaliLoader(source, aug, img_size, batch_size, seed, workers, device=CPU)
    yield TrainLoader(source, aug, img_size, batch_size, seed, workers)


def collect(loader, start, stop):
    batches = list(loader.batches(start, stop))
    assert [batch.step for batch in batches] == list(range(start, stop))
    return {
        name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", *FIELDS)
    }


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


def distance(a, b):
    return (a["images"].int() - b["images"].int()).abs().float().mean().item()


def test_the_sequence_equals_the_pil_loaders():
    dali, pil = loaders(Files(photos() * 5))
    assert (dali.name, pil.name, dali.steps_per_epoch) == (
        "dali",
        "pil",
        pil.steps_per_epoch,
    )
    ours, theirs = collect(dali, 0, 5), collect(pil, 0, 5)  # over three epochs
    assert_same({name: ours[name] for name in FIELDS}, {name: theirs[name] for name in FIELDS})
    assert distance(ours, theirs) < 4 and not dali.failed_over
    batch = next(dali.batches(3, 4))
    assert (
        batch.images.shape == (6, 3, 32, 32)
        and batch.images.dtype == torch.uint8
        and (batch.epoch, batch.step) == (1, 3)
    )
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "policy",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("v0", "original")), "3a", "ta"],
)
def test_policies_are_executed_as_by_pil(policy):
    """At the size of test_dali_parity.py, since PIL's equalize is coarse for few pixels."""
    dali, pil = loaders(Files(photos() * 5), AugmentConfig(aa=policy), img_size=96)
    ours, theirs = collect(dali, 0, 3), collect(pil, 0, 3)
    assert distance(ours, theirs) < 4 and not dali.failed_over


def test_augmix_is_left_to_pil():
    aug = AugmentConfig(aa="augmix-m3")
    loader = train_loader("auto", Files(shades()), aug, 32, 6, 3, 0, device="cuda:0")
    assert loader.name == "pil"
    assert loader.why == "DALI does not average chains of operations (--aa augmix-m3)"


@pytest.mark.parametrize(
    "aug",
    [
        pytest.param(FULL, marks=pytest.mark.slow),
        AugmentConfig(color_jitter=0.4, aa="rand-m9-n1-t3a"),
    ],
)
def test_resume_at_any_step(aug):
    source = Files(shades())
    whole = collect(next(loaders(source, aug)), 0, 12)
    for start in (1, 5, 11):
        rest = collect(next(loaders(source, aug)), start, 12)
        assert_same({name: value[start * 6 :] for name, value in whole.items()}, rest)


@pytest.mark.slow  # several pipelines
def test_workers_and_an_abandoned_pass_keep_the_batches():
    source = Files([*shades(), nobody_reads(3)])
    here = collect(next(loaders(source)), 0, 10)
    loader = next(loaders(source))
    next(loader.batches(3, 10))
    assert_same(here, collect(loader, 0, 10))
    workers = next(loaders(source, workers=1))
    assert_same(here, collect(workers, 0, 10))
    assert loader.replaced == workers.replaced == ["file30"]


ABANDON = """
from tests.data.test_dali import *

if __name__ == "__main__":
    batches = next(loaders(Files(shades()), workers=1)).batches(0, 20)
    next(batches)
"""


@pytest.mark.slow
def test_a_process_ends_with_batches_in_the_pipeline(tmp_path):
    (tmp_path / "script.py").write_text(ABANDON)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[1].parent)])
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr


def test_ranks_and_usage_errors_equal_the_pil_loaders():
    source = Files(shades())
    whole = collect(next(loaders(source)), 0, 4)
    ranks = [
        list(DaliLoader(source, FULL, 32, 2, 3, 0, rank=r, world=3, device=CPU).batches(0, 4))
        for r in range(3)
    ]
    assert torch.equal(
        whole["images"], torch.cat([ranks[r][step].images for step in range(4) for r in range(3)])
    )
    with pytest.raises(UsageError, match="--batch-size 5: must be even"):
        DaliLoader(source, FULL, 32, 5, 0, 0, device=CPU)


def folder_of(tmp_path, files):
    for number, (name, content) in enumerate(files.items()):
        path = tmp_path / "images" / "ab"[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "images"


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_unusual_images_are_replaced_as_by_pil(tmp_path):
    photo = decoded(photos()[0]).resize((160, 107))
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = Image.fromarray(np.linspace(0, 65535, 90 * 70).astype(np.uint16).reshape(70, 90))
    by_pil_too = {
        "cmyk.jpg": jpeg(photo.convert("CMYK")),
        "ramp16.png": encoded(ramp, "PNG"),
        "palette.png": encoded(photo.convert("P"), "PNG"),
        "alpha.png": encoded(photo.convert("RGBA"), "PNG"),
        "photo.webp": encoded(photo, "WEBP"),
        "tail.jpg": jpeg(photo) + b"a preview, say",
    }
    files = by_pil_too | {
        "plain.jpg": jpeg(photo),
        "grey.jpg": jpeg(photo.convert("L")),
        "progressive.jpg": jpeg(photo, progressive=True),
        "exif.jpg": jpeg(photo, exif=exif),
        "one.jpg": jpeg(photo.resize((1, 1))),
        "wide.jpg": jpeg(photo.resize((6000, 40))),
        "large.jpg": jpeg(photo.resize((6000, 4000))),
        "tall.jpg": jpeg(photo.resize((3, 6000))),
    }
    source = open_source(str(folder_of(tmp_path, files)))
    names = [os.path.basename(key) for key in source.keys]
    for aug in (CENTER, AugmentConfig(color_jitter=0.0, scale=(0.5, 1.0))):
        dali, pil = loaders(source, aug, batch_size=len(files))
        ours, theirs = collect(dali, 0, 1), collect(pil, 0, 1)
        assert (
            torch.equal(ours["samples"], theirs["samples"])
            and not dali.replaced
            and not dali.failed_over
        )
        for row, sample in enumerate(ours["samples"].tolist()):
            error = (ours["images"][row].int() - theirs["images"][row].int()).abs().float()
            assert error.mean() <= (0.0 if names[sample] in by_pil_too else 0.6), names[sample]


def test_pil_makes_all_images_without_a_jpeg():
    source = Files(shades(), plain=[False] * 30)
    dali, pil = loaders(source)
    assert_same(collect(dali, 0, 10), collect(pil, 0, 10))


def test_pil_executes_settings_that_dali_lacks():
    source = Files(shades())
    for aug, img_size in ((AugmentConfig(train_interpolation="box"), 32), (FULL, 2)):
        dali, pil = loaders(source, aug, img_size)
        assert_same(collect(dali, 0, 5), collect(pil, 0, 5))


def test_a_bad_file_fails_over_to_pil_and_is_named(caplog):
    good = shades()
    bad = list(good)
    bad[7] = nobody_reads(7)
    source = Files(bad)
    (dali, pil), clean = loaders(source), collect(next(loaders(Files(good))), 0, 15)
    ours, theirs = collect(dali, 0, 15), collect(pil, 0, 15)
    assert_same({name: ours[name] for name in FIELDS}, {name: theirs[name] for name in FIELDS})
    assert dali.replaced == pil.replaced == ["file7"] and "file7 cannot be read" in caplog.text
    assert dali.failed_over == 3 and 7 not in ours["samples"]  # once an epoch
    for step in range(15):
        rows = slice(step * 6, step * 6 + 6)
        failed = 7 in clean["samples"][rows]
        assert torch.equal(ours["images"][rows], (theirs if failed else clean)["images"][rows]), (
            step
        )
    assert_same(
        {name: value[18:] for name, value in ours.items()}, collect(next(loaders(source)), 3, 15)
    )


def test_a_file_that_only_pil_reads_is_logged_once_per_batch(caplog):
    dali, pil = loaders(Files(shades(), torn={7: nobody_reads(7)}))
    ours, theirs = collect(dali, 0, 5), collect(pil, 0, 5)
    assert_same({name: ours[name] for name in FIELDS}, {name: theirs[name] for name in FIELDS})
    assert dali.replaced == [] and dali.failed_over == 1
    assert (
        caplog.text.count("DALI could not make the batch of step") == 1
        and ": file7)" in caplog.text
    )
    step = (ours["samples"] == 7).nonzero().item() // 6
    assert torch.equal(
        ours["images"][step * 6 : step * 6 + 6], theirs["images"][step * 6 : step * 6 + 6]
    )


def test_repeated_dali_failures_stop_the_run():
    loader = next(
        loaders(
            Files(shades(60), torn={number: nobody_reads(number) for number in range(60)}), CENTER
        )
    )
    with pytest.raises(
        EnvironmentProblem,
        match="DALI failed on 8 batches in a row that PIL can read .*--loader pil",
    ):
        list(loader.batches(0, 9))


def test_files_that_change_during_a_run_are_replaced(tmp_path):
    """Deleted, truncated, damaged and grown files are named, replaced and counted."""
    root = folder_of(tmp_path, {f"{number:02}.jpg": data for number, data in enumerate(shades(40))})
    source = open_source(str(root), max_bad_share=0.5)
    source.max_bad_share = 0.5
    dali, pil = loaders(source, batch_size=4)
    batches = dali.batches(0, 10)
    next(batches)
    (root / source.keys[3]).unlink()
    for number, damage in (
        (9, lambda data: data[:300]),
        (20, lambda data: data[:300] + bytes(len(data) - 300)),
    ):
        path = root / source.keys[number]
        path.write_bytes(damage(path.read_bytes()))
    (root / source.keys[30]).write_bytes(jpeg(shade(1, (99, 98))))
    assert len(list(batches)) == 9
    ours, theirs = collect(dali, 10, 20), collect(pil, 10, 20)
    assert_same({name: ours[name] for name in FIELDS}, {name: theirs[name] for name in FIELDS})
    assert (
        sorted(dali.replaced)
        == sorted(pil.replaced)
        == sorted(source.keys[number] for number in (3, 9, 20, 30))
    )
    source.max_bad_share = 0.05
    with pytest.raises(DataError, match="of 40 images cannot be read"):
        collect(next(loaders(source, batch_size=4)), 10, 20)


BASES = [jpeg(shade(9)), jpeg(shade(9), progressive=True), jpeg(shade(9), restart_marker_rows=1)]


@hypothesis.given(
    base=st.sampled_from(BASES), at=st.integers(2, 10**4), junk=st.binary(min_size=1, max_size=40)
)
@hypothesis.settings(max_examples=60, phases=[hypothesis.Phase.generate])
def test_dali_and_pil_agree_on_damaged_files(base, at, junk):
    """With changed bytes PIL decodes the file, or DALI's pixels equal PIL's, or DALI refuses it."""
    at %= len(base)
    damaged = (base[:at] + junk + base[at + len(junk) :])[: len(base)]
    try:
        image = read_rgb(io.BytesIO(damaged))
    except DecodeError:
        image = None
    if not is_sound(damaged, 64, 48):
        return
    try:
        pixels = by_dali([damaged], [record_of(shade(0), 48, crop=(8, 0, 48, 48))])[0]
    except RuntimeError:
        return
    assert image is not None and np.array_equal(pixels, np.asarray(image)[:, 8:56])


def test_jpeg_headers_are_checked():
    whole = jpeg(shade(0))
    assert is_sound(whole, 64, 48)
    cut = (
        b"",
        whole[:-2],
        whole[:200],
        whole[1:],
        whole + b"\0",
        b"\xff\xd8\xff\xd9",
        whole[:3] + b"\x5d" + whole[4:],
    )
    for data in (*cut, encoded(shade(0), "PNG"), jpeg(shade(0).convert("CMYK"))):
        assert not is_sound(data, 64, 48)
    assert not is_sound(whole, 48, 64)


def test_resolve_loader_chooses_by_device_and_source(monkeypatch, tmp_path):
    source = Files(shades())
    cuda = torch.device("cuda")
    assert resolve_loader("auto", source, cuda)[0] == "dali"
    assert resolve_loader("auto", source, CPU) == (
        "pil",
        "on a CPU PIL is faster, unless large photographs are only cropped",
    )
    assert resolve_loader("auto", Files(shades(), plain=[False] * 30), cuda)[0] == "pil"
    assert resolve_loader("dali", source, CPU)[0] == "dali" and resolve_loader(
        "torchvision", source, cuda
    ) == ("pil", "asked for")
    assert isinstance(train_loader("dali", source, FULL, 32, 6, 0, 0), DaliLoader)
    assert train_loader("auto", source, FULL, 32, 6, 0, 0).name == "pil"

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    package = f"nvidia-dali-cuda{(torch.version.cuda or '13').split('.')[0]}0"
    name, why = resolve_loader("auto", source, cuda)
    assert name == "pil" and why.startswith(f"DALI is not installed: pip install {package}")
    with pytest.raises(
        EnvironmentProblem,
        match=f"--loader dali: .*{package} .*placeholder.*; or use --loader pil",
    ):
        train_loader("dali", source, FULL, 32, 6, 0, 0)
    (tmp_path / "nvidia_dali-1.0.dist-info").mkdir()
    (tmp_path / "nvidia_dali-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nvidia-dali\nVersion: 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        EnvironmentProblem,
        match=f"--loader dali: PyPI's nvidia-dali is a placeholder; .* pip install {package}",
    ):
        resolve_loader("dali", source, CPU)


@pytest.mark.parametrize("breaks", ["the definition", "build"])
def test_a_pipeline_that_cannot_be_built_leaves_the_run_to_pil(monkeypatch, breaks):
    reason = "nvml error: driver/library\nversion mismatch"

    class Pipeline:
        def __init__(self, **options):
            if breaks == "the definition":
                raise TypeError(reason)

        def build(self):
            raise RuntimeError(reason)

    monkeypatch.setattr(dali_loader, "augment", Pipeline)
    source = Files(shades())
    arguments = source, FULL, 32, 6, 3, 0
    loader = train_loader("auto", *arguments, device="cuda:0")
    assert loader.name == "pil"
    assert loader.why == (
        "DALI cannot build its pipeline here (nvml error: driver/library version mismatch)"
    )
    loader.pin_memory = False  # there may be no GPU to pin for
    assert_same(collect(train_loader("pil", *arguments), 0, 3), collect(loader, 0, 3))
    with pytest.raises(EnvironmentProblem, match="--loader dali: DALI cannot .*use --loader pil"):
        train_loader("dali", *arguments)
    with pytest.raises(UsageError, match="--batch-size 0"):
        train_loader("auto", source, FULL, 32, 0, 3, 0, device="cuda:0")


def test_the_pipeline_is_built_once_before_the_first_batch(monkeypatch):
    calls = []
    real = dali_loader.augment

    def counted(**options):
        calls.append(options)
        return real(**options)

    monkeypatch.setattr(dali_loader, "augment", counted)
    loader = train_loader("dali", Files(shades()), FULL, 32, 6, 3, 0)
    assert len(calls) == 1
    first = collect(loader, 0, 3)
    assert len(calls) == 1
    # Batches that an abandoned pass left in the pipeline are not those of the next pass.
    next(loader.batches(0, 3))
    assert_same(collect(loader, 0, 3), first)
