"""`dad-fast train`: the real path on an image folder, and every mistake is one line."""

import json
import os
import re
import shutil

import pytest

pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
import tiny

from dad_fast.cli.main import main
from dad_fast.report.pieces import read_pieces


def arguments(parts, out, *more):
    return tiny.train_arguments(
        parts, out, "--device", "cpu", *more, discretizer=str(parts / "vqgan.ckpt")
    )


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("aug-only", "dat", "dat+dad")]


@pytest.mark.parametrize("method", ["ce", "kd", "dad", *SLOWER])
def test_every_method_trains_on_an_image_folder(parts, tmp_path, capsys, method):
    augment = ["--mixup", "0.8", "--aa", "rand-m9-mstd0.5-inc1"]
    assert main(arguments(parts, tmp_path / "run", "--method", method, *augment)) == 0
    made = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {
        "config.toml",
        "run.json",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "model.safetensors",
        "results.json",
        "report.html",
    }
    sheets = {"sheet.png", "sheet.safetensors"}
    assert made - sheets == expected
    assert made & sheets == (set() if method in ("ce", "kd") else sheets)
    (ending,) = re.findall(r"model.safetensors, results.json, .*", capsys.readouterr().err)
    assert ("sheet.png" in ending) == (sheets <= made)
    if sheets <= made:
        examples = read_pieces(tmp_path / "run/sheet.safetensors").examples
        classes = json.loads((tmp_path / "run/results.json").read_text())["classes"]
        assert {example["label"] for example in examples} == set(classes)
    page = (tmp_path / "run/report.html").read_text()
    for words in ("changed codes", "difference ×", "Q(clean)"):
        assert (words in page) == (method not in ("ce", "kd"))
    record = json.loads((tmp_path / "run/results.json").read_text())
    suite = record["suites"]["val"]
    assert record["steps"] == 2 and suite["num_images"] == 24
    assert sum(suite["confusion"]["images"].values()) == 24
    assert len(record["classes"]) == max(map(int, suite["confusion"]["images"])) + 1
    facts = json.loads((tmp_path / "run/run.json").read_text())
    chosen = {name: choice["value"] for name, choice in facts["choices"].items()}
    assert (chosen["amp"], chosen["dtype.student"], chosen["cuda_graphs"]) == (
        "off",
        "float32",
        "off",
    )
    assert chosen["loader"] == facts["loader"] and "allocator" in chosen
    assert ("dtype.encoder" in chosen) == (method not in ("ce", "kd"))
    log = (tmp_path / "run/train.log").read_text()
    for name, choice in facts["choices"].items():
        assert re.search(rf"  {re.escape(name)} +{re.escape(choice['value'])} \(", log)
    assert method == "ce" or "sha256" in facts["teacher" if method != "dat" else "discretizer"]


@pytest.mark.slow  # five trainings; orders are in tests/methods
def test_the_discretizers_and_the_two_orders(parts, tmp_path):
    forms = (
        ["--discretizer", "jpeg:60"],
        ["--discretizer", "identity"],
        ["--attack-order", "authors"],
    )
    for number, more in enumerate(forms):
        assert main(arguments(parts, tmp_path / str(number), *more)) == 0


def test_finished_run_is_resumed_evaluated_and_overwritten(parts, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(parts, out)) == 0
    weights = (out / "model.safetensors").read_bytes()
    assert main(arguments(parts, out)) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(arguments(parts, out, "--resume", "auto")) == 0
    assert "finished already" in capsys.readouterr().err
    assert main(arguments(parts, out, "--resume", "auto", "--lr", "0.5")) == 2
    assert "optim.lr" in capsys.readouterr().err
    longer = ["--resume", "auto", "--max-steps", "4"]
    assert main(arguments(parts, out, *longer)) == 0
    first, second = json.loads((out / "run.json").read_text())["commands"]
    assert first.startswith("dad-fast train ") and second == f"{first} --resume auto --max-steps 4"
    assert json.loads((out / "results.json").read_text())["steps"] == 4
    assert main(arguments(parts, out, *longer, "--suite", "contrast:1")) == 0
    assert list(json.loads((out / "results.json").read_text())["suites"]) == ["contrast:1"]
    scores = tmp_path / "scores.json"
    suites = ["--data-dir", str(parts / "data"), "--suite", "val", "contrast:2"]
    assert main(["eval", str(out), *suites, "--json", str(scores)]) == 0
    assert scores.exists()
    (out / "notes.txt").write_text("mine")
    (out / "train-rank1.log").write_text("of another process")
    assert main(arguments(parts, out, "--overwrite", "--seed", "1")) == 0
    assert not (out / "train-rank1.log").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "model.safetensors").read_bytes() != weights


def test_several_runs_make_a_table_longest_first(parts, tmp_path, capsys):
    file = tmp_path / "compare.toml"
    file.write_text(
        '[variants.plain]\nmethod = "ce"\n'
        '[variants.long]\nmethod = "kd"\nschedule.cooldown_epochs = 3\n'
    )
    given = arguments(parts, tmp_path / "out", "--seeds", "2", "--jobs", "1")
    assert main([given[0], str(file), *given[1:]]) == 0
    lines = capsys.readouterr().err.splitlines()
    order = [line.partition("] ")[2].partition(":")[0] for line in lines if "/4] " in line]
    assert order == ["long seed 0", "long seed 1", "plain seed 0", "plain seed 1"]
    record = json.loads((tmp_path / "out/results.json").read_text())
    cells = [(run["variant"], run["seed"]) for run in record["runs"]]
    assert cells == [("plain", 0), ("plain", 1), ("long", 0), ("long", 1)]
    assert (tmp_path / "out/long/seed-1/model.safetensors").exists()
    assert "plain" in (tmp_path / "out/table.md").read_text()
    shutil.rmtree(tmp_path / "out/long/seed-1")
    assert main([given[0], str(file), *given[1:], "--resume", "auto"]) == 0
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert again["runs"][3]["suites"] == record["runs"][3]["suites"]


def test_init_from_loads_weights_of_another_run(parts, tmp_path):
    assert main(arguments(parts, tmp_path / "first", "--method", "ce")) == 0
    start = ["--init-from", tmp_path / "first", "--lr", "1e-12"]
    assert main(arguments(parts, tmp_path / "second", "--method", "ce", *start)) == 0
    import torch
    from safetensors.torch import load_file

    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    torch.testing.assert_close(first["fc.weight"], second["fc.weight"], rtol=0, atol=1e-6)


def bad_data(root, change):
    tiny.write_images(root)
    change(root)
    return root


def make_empty(root):
    for path in (root / "train/bee").iterdir():
        path.unlink()


def make_unreadable(root):
    for path in (root / "train/bee").iterdir():
        path.write_bytes(b"not an image")


def make_another_class(root):
    os.rename(root / "val/cat", root / "val/dog")


CONVNEXT = ["--student", "test_convnext", "--set", "student.model_kwargs={}"]
MISTAKES = {
    "no such folder": (4, "--data-dir", lambda p, t: ["--data-dir", t / "nowhere"]),
    "an empty class": (4, "bee", lambda p, t: ["--data-dir", bad_data(t / "d", make_empty)]),
    "unreadable images": (
        4,
        "bee",
        lambda p, t: ["--data-dir", bad_data(t / "d", make_unreadable)],
    ),
    "classes that differ": (
        4,
        "cat",
        lambda p, t: ["--data-dir", bad_data(t / "d", make_another_class)],
    ),
    "a class map that disagrees": (
        4,
        "class",
        lambda p, t: ["--class-map", _class_map(t / "c.csv")],
    ),
    "an unknown student": (2, "resnet18", lambda p, t: ["--student", "resnet81"]),
    "an unknown teacher": (
        2,
        "ViT-B-32",
        lambda p, t: ["--teacher", f"open_clip:ViT-B-23@{p / 'teacher.safetensors'}"],
    ),
    "a teacher that is no file": (
        4,
        "nowhere.safetensors",
        lambda p, t: ["--teacher", t / "nowhere.safetensors"],
    ),
    "student weights of another architecture": (
        4,
        "architecture",
        lambda p, t: ["--student-weights", p / "teacher.safetensors"],
    ),
    "a discretizer that is a teacher": (
        4,
        "VQGAN",
        lambda p, t: ["--discretizer", p / "teacher.safetensors"],
    ),
    "a size that Q cannot take": (2, "--img-size", lambda p, t: ["--img-size", "34"]),
    "a size that the student cannot take": (
        2,
        "--img-size",
        lambda p, t: [*CONVNEXT, "--img-size", "8"],
    ),
    "an unknown flag": (2, "--batch-size", lambda p, t: ["--batch-sise", "8"]),
    "an unknown key": (2, "optim.lr", lambda p, t: ["--set", "optim.lrr=1"]),
    "an odd batch with mixup": (
        2,
        "--batch-size",
        lambda p, t: ["--mixup", "1", "--batch-size", "7"],
    ),
    "a batch larger than the data": (2, "--batch-size", lambda p, t: ["--batch-size", "1000"]),
    "an unknown suite": (4, "contrast", lambda p, t: ["--suite", "contrats"]),
    "a device that is not there": (3, "--device", lambda p, t: ["--device", "cuda:7"]),
    "an optimizer that is not there": (2, "--opt", lambda p, t: ["--opt", "adamm"]),
    "a checkpoint that is not there": (4, "checkpoint", lambda p, t: ["--resume", t / "nowhere"]),
}


def _class_map(path):
    path.write_text("id,folder,name\n0,ant,ant\n1,bee,bee\n")
    return path


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_with_its_exit_code_and_writes_nothing(parts, tmp_path, capsys, what):
    code, word, change = MISTAKES[what]
    more = change(parts, tmp_path)
    capsys.readouterr()
    assert main(arguments(parts, tmp_path / "out", *more)) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dad-fast")]
    assert len(errors) == 1 and word in errors[0] and "Traceback" not in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_never_overwritten(parts, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("precious")
    assert main(arguments(parts, tmp_path / "home", "--overwrite")) == 2
    assert (tmp_path / "home/thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    assert main(arguments(parts, tmp_path / "file")) == 2
    assert capsys.readouterr().err.count("\n") == 2
