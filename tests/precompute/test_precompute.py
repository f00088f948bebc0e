"""`dad-fast precompute` and training from its stores: values equal those of online training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from dad_fast.cli.main import main
from dad_fast.data.loaders.loader import TrainLoader
from dad_fast.engine.build import Builder, make_step
from dad_fast.engine.update import Update
from dad_fast.methods.registry import Images
from dad_fast.methods.settings import resolve
from dad_fast.store import AdversarialStore, Manifest, TargetStore
from tests.numerics import assert_same_levels
from tests.processes import HANG, ROOT, one_thread
from tests.tiny import SIDE, STUDENT, write_images, write_parts, write_teacher


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of 24 images, a teacher and a VQGAN, as flags."""
    folder = write_parts(tmp_path_factory.mktemp("inputs"))
    return {
        "data": [
            "--data-dir",
            str(folder / "data"),
            *STUDENT,
            "-b",
            "6",
            "-j",
            "0",
            "--device",
            "cpu",
        ],
        "teacher": ["--teacher", str(folder / "teacher.safetensors")],
        "discretizer": ["--discretizer", str(folder / "vqgan.ckpt")],
        "attack": [
            "--attack-norm",
            "linf",
            "--attack-eps",
            "0.1",
            "--attack-step-size",
            "0.1",
            "--attack-random-start",
            "0.5",
        ],
        "folder": folder,
    }


def flags(inputs, *more):
    return [*inputs["data"], *inputs["teacher"], *inputs["discretizer"], *inputs["attack"], *more]


@pytest.fixture(scope="module")
def raw(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "store"
    assert (
        main(["precompute", *flags(inputs), "-o", str(folder), "--images", "raw", "--views", "2"])
        == 0
    )
    return folder


AUGMENTED = [
    "--mixup",
    "0.8",
    "--cutmix",
    "1.0",
    "--aa",
    "rand-m9-mstd0.5-inc1",
    "--reprob",
    "0.25",
]


@pytest.fixture(scope="module")
def targets(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets") / "store"
    assert (
        main(
            [
                "precompute",
                *flags(inputs, *AUGMENTED),
                "-o",
                str(folder),
                "--targets",
                "--views",
                "3",
            ]
        )
        == 0
    )
    return folder


def test_an_attack_that_changes_next_to_nothing_is_warned_of(inputs, tmp_path, caplog):
    weak = flags(inputs, "--attack-eps", "1e-4", "--attack-step-size", "1e-4")
    images = ["--discretizer", "jpeg:75", "--images", "raw"]
    assert main(["precompute", *weak, *images, "-o", str(tmp_path / "weak")]) == 0
    (warning,) = [text for text in caplog.messages if "changes next to nothing" in text]
    assert "jpeg:75" in warning and "0.00% of the pixel values" in warning


def test_a_store_records_what_auto_meant(raw):
    precision = Manifest.load(raw).settings["precision"]
    assert (precision["amp"], precision["channels_last"]) == (False, False)


def step_of(inputs, method, *more, pin_memory=False):
    """Return (TrainStep, its batches joined to the stores)."""
    from dad_fast.cli.parser import typed_settings
    from dad_fast.cli.train import make_parser

    given = vars(make_parser().parse([*more]))
    cfg = resolve(None, None, given["sets"], typed_settings(given) | {"method": method})
    parts = Builder().build(cfg)
    seed = parts.stored.view_seed(cfg.seed)
    loader = TrainLoader(
        parts.train, cfg.augment, SIDE, cfg.data.batch_size, seed, 0, cycle=parts.stored.cycle
    )
    step = make_step(
        cfg,
        parts.student,
        parts.teacher,
        parts.discretizer,
        Update(parts.student, cfg, parts.device),
    )
    return step, lambda *span: parts.stored.join(loader.batches(*span), pin_memory)


def test_decoded_codes_equal_the_stored_pixels(inputs, raw, tmp_path):
    assert main(["precompute", *flags(inputs), "-o", str(tmp_path / "codes"), "--views", "2"]) == 0
    step, batches = step_of(inputs, "dad", *flags(inputs, "--store", str(tmp_path / "codes")))
    other, others = step_of(inputs, "dad", *flags(inputs, "--store", str(raw)))
    for a, b in zip(batches(0, 6), others(0, 6), strict=True):
        assert (
            a.dad_codes is not None
            and b.dad_images is not None
            and torch.equal(a.dad_kept, b.dad_kept)
        )
        assert_same_levels(step.generator.stored_images(a), other.generator.stored_images(b))


def test_stored_outputs_are_the_teachers_logits_on_the_stored_pixels(inputs, raw):
    step, batches = step_of(inputs, "dad", *flags(inputs, "--store", str(raw)))
    for batch in batches(0, 8):  # both views
        generated = step.generate(batch)
        logits = step.generator.teacher(generated.images[Images.ATTACK_TEACHER])
        stored = generated.teacher[Images.ATTACK_TEACHER].float()
        torch.testing.assert_close(
            stored, logits - logits.amax(1, keepdim=True), rtol=1e-3, atol=2e-3
        )
        assert torch.equal(generated.keep.bool(), logits.argmax(1) == batch.labels)
    store = AdversarialStore(raw)
    rows = np.arange(len(store))
    assert (
        store.images(rows, 0) != store.images(rows, 1)
    ).any()  # the views have noise of their own
    assert 0 < store.changed(rows).mean() <= 1


@pytest.mark.parametrize("form", ["jpeg:30", "jpeg:95", "webp"])
def test_stored_outputs_belong_to_the_encoded_pixels(inputs, tmp_path, form):
    """Images are encoded once, since a JPEG of a decoded JPEG has other pixels."""
    store = tmp_path / "store"
    assert (
        main(
            [
                "precompute",
                *flags(inputs, "--discretizer", "identity"),
                "-o",
                str(store),
                "--images",
                form,
            ]
        )
        == 0
    )
    step, batches = step_of(inputs, "dad", *flags(inputs, "--store", str(store)))
    for batch in batches(0, 4):
        generated = step.generate(batch)
        logits = step.generator.teacher(generated.images[Images.ATTACK_TEACHER])
        torch.testing.assert_close(
            generated.teacher[Images.ATTACK_TEACHER].float(),
            logits - logits.amax(1, keepdim=True),
            rtol=1e-3,
            atol=1e-4,
        )
    assert (
        main(
            [
                "precompute",
                *flags(inputs, "--discretizer", "identity"),
                "-o",
                str(store),
                "--images",
                form,
                "--check",
                "1",
            ]
        )
        == 0
    )


def test_stored_targets_are_the_teacher_on_the_mixed_views(inputs, targets):
    views = flags(inputs, *AUGMENTED)
    # The seed decides about the student only.
    stored, batches = step_of(
        inputs, "kd", *views, "--store", str(targets), "--teacher", "", "--seed", "7"
    )
    online, plain = step_of(inputs, "kd", *views)
    assert stored.generator.teacher is None
    for a, b in zip(batches(0, 12), plain(0, 12), strict=True):  # three epochs of four steps
        logits = online.generate(b).teacher[Images.CLEAN]
        torch.testing.assert_close(
            stored.generate(a).teacher[Images.CLEAN].float(),
            logits - logits.amax(1, keepdim=True),
            rtol=1e-3,
            atol=2e-3,
        )
    first, again = list(batches(0, 4)), list(batches(12, 16))  # epoch 3 shows view 0 again
    for a, b in zip(first, again, strict=True):
        assert (
            b.epoch == 3
            and torch.equal(a.images, b.images)
            and torch.equal(a.clean_outputs, b.clean_outputs)
        )
        assert not torch.equal(a.seeds, b.seeds)


@pytest.mark.gpu
def test_batches_for_a_gpu_lie_in_page_locked_memory(inputs, raw, targets):
    """All fields from a store are pinned, and a buffer is reused only after it was read."""
    _step, batches = step_of(
        inputs, "dad", *flags(inputs, *AUGMENTED, "--store", str(raw), str(targets))
    )
    stored = step_of(
        inputs,
        "dad",
        *flags(inputs, *AUGMENTED, "--store", str(raw), str(targets)),
        pin_memory=True,
    )[1]
    for plain, pinned in zip(batches(0, 24), stored(0, 24), strict=True):
        names = ("dad_images", "dad_outputs", "dad_kept", "clean_outputs")
        there = {name: getattr(pinned, name).to("cuda", non_blocking=True) for name in names}
        for name in names:
            assert getattr(pinned, name).is_pinned() and torch.equal(
                there[name].cpu(), getattr(plain, name)
            )


def test_an_unreadable_image_is_replaced_in_both(inputs, tmp_path):
    """The next sample takes its position in a view, and the stored outputs are of that sample."""
    import shutil

    shutil.copytree(inputs["folder"] / "data", tmp_path / "data")
    broken = sorted((tmp_path / "data/train/bee").iterdir())[3]
    broken.write_bytes(b"\xff\xd8")
    data = [*flags(inputs), "--data-dir", str(tmp_path / "data"), "--set", "data.max_bad_share=0.1"]
    assert main(["precompute", *data, "-o", str(tmp_path / "targets"), "--targets"]) == 0
    assert main(["precompute", *data, "-o", str(tmp_path / "store"), "--images", "raw"]) == 0
    stored, batches = step_of(
        inputs,
        "dad",
        *data,
        "--store",
        str(tmp_path / "targets"),
        str(tmp_path / "store"),
        "--teacher",
        "",
    )
    online, plain = step_of(inputs, "kd", *data)
    replaced = 0
    for a, b in zip(batches(0, 4), plain(0, 4), strict=True):
        replaced += len(a.replaced)
        logits = online.generate(b).teacher[Images.CLEAN]
        torch.testing.assert_close(
            stored.generate(a).teacher[Images.CLEAN].float(),
            logits - logits.amax(1, keepdim=True),
            rtol=1e-3,
            atol=2e-3,
        )
    assert replaced == 1


@pytest.mark.parametrize(
    "method",
    [
        "dad",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("aug-only", "dat+dad", "kd")),
    ],
)
def test_training_from_stores_resumes_and_logs_its_stores(
    inputs, raw, targets, tmp_path, method, capsys
):
    needs = inputs["discretizer"] if method == "dat+dad" else []
    stores = [
        "--store",
        *{"kd": [str(targets)], "aug-only": [str(raw)]}.get(method, [str(raw), str(targets)]),
    ]
    run = [
        "train",
        "--method",
        method,
        *inputs["data"],
        *AUGMENTED,
        *inputs["attack"],
        *needs,
        *stores,
        "--epochs",
        "3",
    ]
    run += ["--warmup-epochs", "0", "--set", "log_every=4"]
    assert main([*run, "-o", str(tmp_path / "straight")]) == 0, capsys.readouterr().err
    import json

    facts = json.loads((tmp_path / "straight/run.json").read_text())
    assert facts["teacher_loaded"] is False and {s["kind"] for s in facts["stores"]} <= {
        "adversarial",
        "targets",
    }
    assert "no results of the teacher: the store has its hash" in capsys.readouterr().err
    assert main([*run, "-o", str(tmp_path / "parts"), "--max-steps", "5"]) == 0
    assert main([*run, "-o", str(tmp_path / "parts"), "--resume", "auto"]) == 0
    a, b = (tmp_path / name / "model.safetensors" for name in ("straight", "parts"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    "change, words",
    [
        (["--mixup", "0.5"], "mixup: 0.8 in the store, 0.5 here"),
        (["--img-size", "64"], "32 px"),
    ],
)
def test_stores_of_other_views_are_refused(inputs, raw, targets, tmp_path, capsys, change, words):
    run = [
        "train",
        "--method",
        "dad",
        *inputs["data"],
        *AUGMENTED,
        "--store",
        str(raw),
        str(targets),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*run, *change]) == 4
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_outputs_for_another_temperature_are_refused(inputs, tmp_path, capsys):
    store = tmp_path / "topk"
    assert (
        main(
            [
                "precompute",
                *flags(inputs),
                "-o",
                str(store),
                "--images",
                "raw",
                "--outputs",
                "topk:1",
                "--temperature",
                "2",
            ]
        )
        == 0
    )
    run = [
        "train",
        *flags(inputs, "--store", str(store)),
        "--method",
        "dad",
        "--max-steps",
        "1",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(run) == 4
    assert (
        "topk:1@2, are exact at temperature 2 only, and the run distils at 4 (--temperature)"
        in capsys.readouterr().err
    )
    assert main([*run, "--temperature", "2", "--distance", "l2"]) == 2
    assert "--distance l2 compares the logits of all classes" in capsys.readouterr().err
    assert main([*run, "--temperature", "2"]) == 0


def test_another_teacher_or_other_data_is_refused(inputs, raw, targets, tmp_path, capsys):
    write_teacher(tmp_path / "other.safetensors", seed=1)
    write_images(tmp_path / "data", classes=("ant", "bee", "dog"))
    run = [
        "train",
        "--method",
        "dad",
        *inputs["data"],
        "--store",
        str(raw),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*run, "--teacher", str(tmp_path / "other.safetensors")]) == 4
    assert "made with another teacher" in capsys.readouterr().err
    assert main([*run, *inputs["teacher"], "--data-dir", str(tmp_path / "data")]) == 4
    assert "class 2: cat there, dog here" in capsys.readouterr().err
    assert main(run) == 2 and "needs a teacher" in capsys.readouterr().err
    assert (
        main([*run, *inputs["teacher"], "--method", "ce"]) == 2
        and "--store" in capsys.readouterr().err
    )
    for method, store in (("kd", raw), ("ard", raw), ("aug-only", targets)):
        assert (
            main(
                [
                    "train",
                    *flags(
                        inputs,
                        "--method",
                        method,
                        "--store",
                        str(store),
                        "-o",
                        str(tmp_path / "out"),
                    ),
                ]
            )
            == 2
        )
        assert f"--method {method} learns from no " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.endswith(".lock")
    }


def command(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "dad_fast", "precompute", *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("nproc", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_write_the_bytes_of_one(inputs, raw, tmp_path, nproc):
    one, form = tmp_path / "one", ["--images", "raw", "--shard-blocks", "1"]
    with one_thread():
        assert main(["precompute", *flags(inputs), "-o", str(one), *form]) == 0
    process = command(*flags(inputs), "-o", tmp_path / "many", *form, "--nproc", nproc)
    assert process.wait(HANG) == 0, process.stderr.read().decode()
    assert bytes_of(one) == bytes_of(tmp_path / "many")


@pytest.mark.slow  # starts five processes; what a kill leaves of a shard is in test_store_writer.py
def test_killed_and_stopped_runs_resume_to_the_same_bytes(inputs, raw, tmp_path):
    folder = tmp_path / "store"
    arguments = [
        *flags(inputs),
        "-o",
        folder,
        "--images",
        "raw",
        "--views",
        "2",
        "-b",
        "6",
        "--block-size",
        "1",
    ]
    straight = tmp_path / "straight"
    with one_thread():
        assert main(["precompute", *map(str, arguments), "-o", str(straight)]) == 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = command(*arguments)
        before = (
            sum(path.stat().st_size for path in folder.glob("*.part")) if folder.exists() else 0
        )
        deadline = time.monotonic() + HANG
        while process.poll() is None and time.monotonic() < deadline:
            if (
                folder.exists()
                and sum(path.stat().st_size for path in folder.glob("*.part"))
                > before + 3 * SIDE * SIDE
            ):
                break
            time.sleep(0.005)
        process.send_signal(number)
        code = process.wait(HANG)
        assert code in ((-9, 0) if number == signal.SIGKILL else (75, 0))
    process = command(*arguments)
    assert process.wait(HANG) == 0
    assert bytes_of(folder) == bytes_of(straight)


def test_estimate_writes_nothing_and_check_recomputes(inputs, raw, tmp_path, capsys):
    assert (
        main(
            [
                "precompute",
                *flags(inputs),
                "-o",
                str(tmp_path / "no"),
                "--images",
                "raw",
                "--estimate",
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "img/s" in output and f" free in {tmp_path}" in output and not (tmp_path / "no").exists()
    store = ["precompute", *flags(inputs), "-o", str(raw), "--images", "raw", "--views", "2"]
    assert main([*store, "--check", "50%"]) == 0
    assert "24 of 24 records are computed again bit for bit" in capsys.readouterr().out
    assert main([*store, "--attack-eps", "0.2", "--check", "1"]) == 4
    assert "attack.eps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, offset, words",
    [
        ("images", 7, "images in 1;"),
        ("data", 5, "outputs in 1;"),
        ("data", 30, "codes in 1;"),
        ("index", 26, "kept in 1;"),
        ("", 0, ""),
    ],
)
def test_check_compares_every_part_of_a_record(inputs, raw, tmp_path, capsys, kind, offset, words):
    import shutil

    shutil.copytree(raw, tmp_path / "store")
    store = [
        "precompute",
        *flags(inputs),
        "-o",
        str(tmp_path / "store"),
        "--images",
        "raw",
        "--views",
        "2",
        "--check",
        "1",
    ]
    if not kind:  # made on another kind of device: what differs is told, and no error
        manifest = Manifest.load(tmp_path / "store")
        other = replace(
            manifest, settings={**manifest.settings, "device": "cuda"}, shards=manifest.shards
        )
        (tmp_path / "store/manifest.json").write_bytes(other.to_json())
        kind, offset = "images", 7
        devices = "(settings.device: cuda in the store, cpu in this run)"
        words = f"images in 1; largest difference of a logit 0 {devices}"
    path = tmp_path / "store" / f"shard-000000.{kind}"
    content = bytearray(path.read_bytes())
    content[offset] ^= 2
    path.write_bytes(content)
    assert main(store) == (0 if "cuda" in words else 4)
    out = capsys.readouterr().out
    assert f"47 of 48 records are computed again bit for bit; differing: {words}" in out, out


def test_parts_of_several_machines_are_merged(inputs, raw, tmp_path, capsys, monkeypatch):
    form = ["--images", "raw", "--views", "2", "--shard-blocks", "1"]
    assert main(["precompute", *flags(inputs), "-o", str(tmp_path / "one"), *form]) == 0
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["precompute", *flags(inputs), "-o", str(tmp_path / rank), *form]) == 0
    assert "this part is done, others are not yet" in capsys.readouterr().err
    assert (
        main(
            [
                "store",
                "merge",
                str(tmp_path / "0"),
                str(tmp_path / "1"),
                "-o",
                str(tmp_path / "whole"),
            ]
        )
        == 0
    )
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "one")
    assert (
        main(
            [
                "precompute",
                *flags(inputs),
                "-o",
                str(tmp_path / "0"),
                "--merge",
                str(tmp_path / "1"),
            ]
        )
        == 2
    )
    assert "dad-fast store merge PART" in capsys.readouterr().err
    assert main(["precompute", *flags(inputs), "-o", str(inputs["folder"] / "vqgan.ckpt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["precompute", *flags(inputs), "-o", str(tmp_path / "whole"), "--targets"]) == 4
    assert "kind: adversarial in the store, targets in this run; use" in capsys.readouterr().err


def test_views_of_targets_have_different_orders(targets):
    store = TargetStore(targets)
    rows = np.arange(len(store))
    assert not np.array_equal(store.keys(rows, 0), store.keys(rows, 1))
    assert {bytes(key) for key in store.keys(rows, 0)} == {
        bytes(key) for key in store.keys(rows, 1)
    }
