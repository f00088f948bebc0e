"""Writer of stores: identical bytes from any number of processes, kills, full disks, locks."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")

from store_data import (
    content,
    exit_code,
    files,
    in_child,
    make_manifest,
    make_targets,
    records,
    write,
)

from dad_fast.errors import DataError, NotFinite, UsageError
from dad_fast.store import AdversarialStore, StoreRows, StoreWriter
from dad_fast.store.images import encode_images
from dad_fast.store.verify import verify


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("reference") / "store"
    assert write(folder, make_manifest(), resume=False) == []
    assert verify(folder) == []
    return files(folder)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_write_the_same_bytes_as_one(tmp_path: Path, reference, world: int) -> None:
    """Run all processes at once; each calls finish() at its end."""
    children = [
        in_child(lambda rank=rank: write(tmp_path / "store", make_manifest(), rank, world))
        for rank in range(world)
    ]
    assert [exit_code(child) for child in children] == [0] * world
    assert files(tmp_path / "store") == reference


def test_blocks_per_shard_decide_the_files_and_world_may_change(tmp_path: Path, reference) -> None:
    manifest = make_manifest()
    assert write(tmp_path / "store", manifest, rank=1, world=3) == [0, 2, 3, 5]
    with pytest.raises(DataError, match="shards 0, 2, 3, 5 of 6 are missing"):
        AdversarialStore(tmp_path / "store")
    assert write(tmp_path / "store", manifest, rank=0, world=2) == [3, 5]
    assert write(tmp_path / "store", manifest, rank=1, world=2) == []
    assert files(tmp_path / "store") == reference


def dies_at(number: int) -> None:
    """Kill this process, as kill -9 does, in its `number`-th call that changes the disk.

    Half of a write is still done.
    """
    calls = 0

    def wrap(name: str) -> None:
        plain = getattr(os, name)

        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == number:
                if name == "write":
                    plain(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments)

        setattr(os, name, call)

    for name in ("write", "ftruncate", "fsync", "replace", "unlink", "mkdir"):
        wrap(name)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_step_resumes(tmp_path: Path, stride: int) -> None:
    """Interrupts every call (or every fourth) that changes the disk once: in open(), in both
    shards, in finish().
    """
    manifest, number, deaths = make_manifest(num_samples=21, num_views=1), 1 - stride, 0
    write(tmp_path / "reference", manifest)
    reference = files(tmp_path / "reference")
    while True:
        number += stride
        folder = tmp_path / str(number)

        def work(folder: Path = folder, number: int = number) -> None:
            dies_at(number)
            write(folder, manifest)

        code = exit_code(in_child(work))
        redone: list[object] = []
        assert write(folder, manifest, before_block=redone.append) == []
        assert files(folder) == reference, f"killed at call {number}"
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
    assert deaths > 40 // stride and not redone


def test_several_killed_processes_resume_to_the_same_bytes(tmp_path: Path, reference) -> None:
    """Three processes, killed repeatedly in calls that change the disk, end with the same bytes."""
    manifest, folder, rng = make_manifest(), tmp_path / "store", random.Random(0)
    for _ in range(6):

        def work(rank: int, number: int) -> None:
            dies_at(number)
            write(folder, manifest, rank, 3)

        numbers = [rng.randint(1, 40) for _ in range(3)]
        children = [
            in_child(lambda rank=rank, number=number: work(rank, number))
            for rank, number in enumerate(numbers)
        ]
        assert {exit_code(child) for child in children} <= {0, -signal.SIGKILL}
    assert write(folder, manifest) == []
    assert files(folder) == reference


SLOW_WRITER = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from store_data import make_manifest, write
print("ready", flush=True)
write(sys.argv[1], make_manifest(), before_block=lambda block: time.sleep(0.01))
"""


def test_a_writer_killed_at_random_moments_resumes(tmp_path: Path, reference) -> None:
    """A real process with blocks of 10 ms; each block is done once or twice."""
    tests = Path(__file__).parents[1]
    script, folder, rng = (
        SLOW_WRITER.format(root=str(tests.parent), tests=str(tests)),
        tmp_path / "store",
        random.Random(0),
    )
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.06))
        child.kill()
        child.wait()
    assert write(folder, make_manifest()) == []
    assert files(folder) == reference


@pytest.mark.parametrize(
    "died", ["in a block", "before the names", "between the names", "before the checksums"]
)
def test_blocks_to_do_lists_the_missing_blocks(tmp_path: Path, reference, died: str) -> None:
    manifest, folder = make_manifest(), tmp_path / "store"
    writer = StoreWriter.open(folder, manifest)
    assert len(writer.blocks_to_do(0)) == 2 and not list(folder.glob("shard-*"))
    with pytest.raises(KeyboardInterrupt), writer.shard(0) as shard:
        for block in shard.todo()[: 1 if died == "in a block" else 2]:
            shard.append(records(manifest, block))
        raise KeyboardInterrupt
    for kind in {
        "between the names": ["index", "data"],
        "before the checksums": ["index", "data", "images"],
    }.get(died, []):
        os.replace(folder / f"shard-000000.{kind}.part", folder / f"shard-000000.{kind}")
    left = writer.blocks_to_do(0)
    assert [block.number for block in left] == ([1] if died == "in a block" else [])
    assert (0 in writer.shards_to_do()) == (died == "in a block")
    for number in writer.shards_to_do():
        blocks = writer.blocks_to_do(number)
        with writer.shard(number) as shard:
            for block in blocks:
                shard.append(records(manifest, block))
    assert writer.finish() == [] and files(folder) == reference


def test_at_most_one_block_is_computed_twice(tmp_path: Path, reference) -> None:
    manifest, done = make_manifest(), []

    def die(block) -> None:
        done.append(block)
        if len(done) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "store", manifest, before_block=die)
    write(tmp_path / "store", manifest, before_block=done.append)
    blocks = [
        block
        for shard in range(manifest.geometry.num_shards)
        for block in manifest.geometry.blocks(shard)
    ]
    assert sorted(done, key=lambda b: (b.view, b.start)) == sorted(
        [*blocks, done[7]], key=lambda b: (b.view, b.start)
    )
    assert files(tmp_path / "store") == reference


@pytest.mark.parametrize("kind", ["index", "data", "images"])
@pytest.mark.parametrize("damage", ["torn", "longer", "flipped", "lost"])
def test_a_damaged_part_is_cut_back_to_its_last_whole_block(
    tmp_path: Path, reference, kind: str, damage: str
) -> None:
    manifest, folder = make_manifest(), tmp_path / "store"
    writer = StoreWriter.open(folder, manifest)
    with writer.shard(0) as shard:
        shard.append(records(manifest, shard.todo()[0]))
    part = folder / f"shard-000000.{kind}.part"
    whole = part.read_bytes()
    if damage == "lost":
        part.unlink()
    else:
        half = len(whole) // 2
        part.write_bytes(
            {
                "torn": whole[:half],
                "longer": whole + b"x" * 11,
                "flipped": whole[:half] + b"\x55" + whole[half + 1 :],
            }[damage]
        )
    with writer.shard(0) as shard:
        assert shard.next_block == (1 if damage == "longer" else 0)
    write(folder, manifest)
    assert files(folder) == reference


@pytest.mark.parametrize(("limit", "begun"), [(700, False), (400, True), (900, True), (1100, True)])
def test_a_full_disk_is_reported_and_loses_only_its_block(
    tmp_path: Path, reference, capfd, limit: int, begun: bool
) -> None:
    """A limit of file sizes fails the manifest, a shard's index, or its images at any block."""
    manifest, folder = make_manifest(), tmp_path / "store"
    if begun:
        StoreWriter.open(folder, manifest)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write(folder, manifest)

    assert exit_code(in_child(work)) == 4
    message = capfd.readouterr().err
    assert "the disk is full" in message and str(folder) in message and message.count("\n") == 1
    kept = [path.stat().st_size for path in folder.glob("*.index.part")]
    assert kept == ([] if not begun else [0] if limit < 8 * 56 else [8 * 56])
    assert write(folder, manifest) == []
    assert files(folder) == reference


def test_a_shard_has_one_writer_and_a_dead_writer_blocks_none(tmp_path: Path, reference) -> None:
    manifest, folder = make_manifest(), tmp_path / "store"
    ready, told = os.pipe()

    def work() -> None:
        writer = StoreWriter.open(folder, manifest, resume=True)
        with writer.shard(0) as shard:
            shard.append(records(manifest, shard.todo()[0]))
            os.write(told, b"x")
            time.sleep(3600)

    child = in_child(work)
    os.read(ready, 1)
    writer = StoreWriter.open(folder, manifest, resume=True)
    with pytest.raises(DataError, match="another process is writing shard 0"), writer.shard(0):
        pass
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    assert (folder / "shard-000000.lock").exists()
    with writer.shard(0) as shard:
        assert shard.next_block == 1
    write(folder, manifest)
    assert files(folder) == reference


def test_a_shard_finished_by_another_process_is_skipped(tmp_path: Path) -> None:
    manifest = make_manifest()
    writer = StoreWriter.open(tmp_path / "store", manifest)
    write(tmp_path / "store", manifest)
    before = files(tmp_path / "store")
    with writer.shard(0) as shard:
        assert shard.todo() == []
    assert files(tmp_path / "store") == before
    assert writer.finish() == [] and writer.finish() == []


def test_a_lost_shard_is_written_again(tmp_path: Path, reference) -> None:
    manifest, folder = make_manifest(), tmp_path / "store"
    write(folder, manifest)
    (folder / "shard-000002.data").unlink()
    (folder / "shard-000004.images").write_bytes(b"short")
    with pytest.raises(DataError, match="shards 2, 4 of 6 are missing"):
        AdversarialStore(folder)
    blocks: list = []
    assert StoreWriter.open(folder, manifest, resume=True).shards_to_do() == [2, 4]
    assert write(folder, manifest, before_block=blocks.append) == []
    assert files(folder) == reference
    assert {(block.view, block.start // 16) for block in blocks} <= {(0, 2), (1, 1)}


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    write(tmp_path / "store", make_manifest())
    other = make_manifest(
        settings={"attack": {"eps": 0.2, "norm": "l2"}, "seed": 0, "amp": True}, num_views=3
    )
    with pytest.raises(DataError) as caught:
        StoreWriter.open(tmp_path / "store", other, resume=True)
    message = str(caught.value)
    assert (
        "settings.attack.eps: 0.1 in the store, 0.2 in this run" in message
        and "--views: 2 in the store, 3" in message
    )
    assert (
        "settings.amp: nothing in the store, True in this run" in message and "norm" not in message
    )
    with pytest.raises(UsageError, match="a store already"):
        StoreWriter.open(tmp_path / "store", make_manifest())


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="thesis.tex"):
        StoreWriter.open(tmp_path, make_manifest(), resume=True)
    with pytest.raises(DataError, match="cannot be written"):
        StoreWriter.open(tmp_path / "thesis.tex" / "store", make_manifest())


def test_non_finite_outputs_are_refused(tmp_path: Path) -> None:
    manifest = make_targets()
    with pytest.raises(NotFinite, match="picture 3 ä"):
        with StoreWriter.open(tmp_path / "store", manifest).shard(0) as shard:
            values = content(manifest, 0)["outputs"][:8].copy()
            values[3, 1] = np.nan
            good = records(manifest, shard.todo()[0])
            shard.append(StoreRows(keys=good.keys, labels=good.labels, outputs=values))
    assert (tmp_path / "store" / "shard-000000.index.part").stat().st_size == 0


def test_encoded_images_are_stored_unchanged(tmp_path: Path) -> None:
    manifest = make_manifest(images="webp")
    write(tmp_path / "pixels", manifest)
    with StoreWriter.open(tmp_path / "files", manifest).shard(0) as shard:
        for block in shard.todo():
            good = records(manifest, block)
            files_of = encode_images(good.images, "webp")
            with pytest.raises(ValueError, match="encoded images"):
                shard.append(StoreRows(**{**vars(good), "images": files_of[:-1]}))
            shard.append(StoreRows(**{**vars(good), "images": files_of}))
    for kind in ("index", "data", "images"):
        assert (tmp_path / f"files/shard-000000.{kind}").read_bytes() == (
            tmp_path / f"pixels/shard-000000.{kind}"
        ).read_bytes()


def test_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    with StoreWriter.open(tmp_path / "store", manifest).shard(0) as shard:
        good = records(manifest, shard.todo()[0])
        wrong = {
            "codes": good.codes[:, :-1],
            "images": good.images[:7],
            "outputs": good.outputs[:, :4],
            "keys": good.keys[:3],
        }
        for name, values in {
            **wrong,
            "labels": good.labels[:, None],
            "images ": good.images.astype(float),
        }.items():
            with pytest.raises(ValueError, match=name.strip()):
                shard.append(StoreRows(**{**vars(good), name.strip(): values}))
        assert shard.next_block == 0
