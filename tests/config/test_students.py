"""Several students in the settings: flags, `[[students]]`, layers, names of their runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dad_fast.cli.train import make_parser
from dad_fast.config import Config, differences, expand, from_toml, to_toml
from dad_fast.config.fields import with_values
from dad_fast.config.resolve import gather
from dad_fast.errors import UsageError
from dad_fast.methods.batches import batch_settings
from dad_fast.methods.settings import check

TWO = """
[[students]]
name = "resnet18"
drop_path = 0.1
optim.lr = 0.01
[students.ema]
model_ema = true

[[students]]
label = "narrow"
name = "resnet18"
model_kwargs = {channels = [8, 8, 8, 8]}
"""


def settings_of(tmp_path: Path, text: str = TWO, *sets: str, **flags: object) -> Config:
    file = tmp_path / "run.toml"
    file.write_text(text)
    given = {path.replace("__", "."): value for path, value in flags.items()}
    return gather("demo", file, list(sets), {"method": "kd", **given})


def runs_of(cfg: Config) -> dict[str, Config]:
    return {name: one for name, _, one in expand(cfg)}


def test_students_have_their_own_settings_and_share_the_others(tmp_path: Path) -> None:
    cfg = settings_of(tmp_path, "[optim]\nweight_decay = 0.5\n" + TWO)
    check(cfg)
    first, second = runs_of(cfg).values()
    assert [name for name, _, _ in expand(cfg)] == ["resnet18", "narrow"]
    assert (first.student.drop_path, first.optim.lr, first.ema.model_ema) == (0.1, 0.01, True)
    assert (second.student.drop_path, second.optim.lr, second.ema.model_ema) == (0.0, 3e-3, False)
    assert second.student.model_kwargs == {"channels": [8, 8, 8, 8]}
    assert first.optim.weight_decay == second.optim.weight_decay == 0.5
    assert first.students == second.students == {}


def test_flag_takes_several_students(tmp_path: Path) -> None:
    parser = make_parser()
    given = parser.parse(
        ["--student", "x", "--student", "resnet18", "resnet26,vit_tiny_patch16_224", "a.toml"]
    )
    assert given.configs == ["a.toml"]
    assert vars(given)["student.name"] == ["resnet18", "resnet26", "vit_tiny_patch16_224"]
    cfg = gather("demo", None, [], {"student.name": ["resnet18", "hf-hub:timm/resnet26.bt_in1k"]})
    assert cfg.student.name == ""
    names = ["ce", "kd", "dad", "kd-stored", "dad-stored"]
    labels = ["resnet18", "resnet26.bt_in1k"]
    assert list(runs_of(cfg)) == [f"{name}_{label}" for name in names for label in labels]
    assert gather("demo", None, [], {"student.name": ["resnet18"]}).student.name == "resnet18"


def test_later_layers_override_students(tmp_path: Path) -> None:
    flags = settings_of(tmp_path, TWO, "students.narrow.drop_path=0.3", optim__lr="0.5")
    first, second = runs_of(flags).values()
    assert first.optim.lr == second.optim.lr == 0.5
    assert (first.student.drop_path, second.student.drop_path) == (0.1, 0.3)
    for names, labels in (("resnet34", ["kd"]), (["a", "b"], ["a", "b"])):
        replaced = settings_of(tmp_path, TWO, student__name=names)
        assert list(runs_of(replaced)) == labels


def test_students_round_trip_and_are_compared(tmp_path: Path) -> None:
    cfg = settings_of(tmp_path)
    assert from_toml(to_toml(cfg)) == cfg
    assert '[[students]]\nlabel = "narrow"\nname = "resnet18"' in to_toml(cfg)
    other = with_values(cfg, {"students": {**cfg.students, "narrow": {"student.name": "resnet26"}}})
    assert differences(cfg, other) == ["students: narrow differ"]


ONE = '[[students]]\nname = "a"\n'
MISTAKES = {
    "one name twice": (ONE + ONE, "two students are named a; give each a label of its own"),
    "no name": ("[[students]]\ndrop_path = 0.1", 'a student needs a name: name = "resnet50"'),
    "no table": ("students = 3", "students is a list of tables: [[students]]"),
    "a label": (ONE + 'label = "a/b"', "'a/b' cannot be a student's label"),
    "a key": (ONE + "lr = 1", "unknown key student.lr; did you mean optim.lr?"),
    "a key of the run": (ONE + "max_steps = 1", "max_steps cannot differ between students"),
    "a section": (ONE + "student.drop = 0.1", "a student's own keys have no section: leave"),
    "two sources": ('[student]\nname = "b"\n' + ONE, "both name students; leave one out"),
    "a value": (ONE + "drop_path = 2", "student.drop_path (--drop-path) must be 0 or more and"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistake_in_students_is_one_line(tmp_path: Path, what: str) -> None:
    text, message = MISTAKES[what]
    with pytest.raises(UsageError) as caught:
        settings_of(tmp_path, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


UNFIT = {
    "batches": (["students.narrow.data.batch_size=8"], "data.batch_size decides the batches"),
    "epochs": (["students.narrow.schedule.epochs=8"], "schedule.epochs decides the batches"),
    "weights": (["student.weights=x.pth"], ""),
    "a variant": (["variants.a.student.name=x"], "student.name, and students are named for all"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_students_that_cannot_share_batches_are_an_error(tmp_path: Path, what: str) -> None:
    sets, message = UNFIT[what]
    cfg = settings_of(tmp_path, TWO, *sets)
    if not message:
        # Both are one architecture.
        check(cfg)
        cfg = settings_of(tmp_path, TWO.replace('"resnet18"', '"resnet26"', 1), *sets)
        message = "--student-weights x.pth: weights of one architecture"
    with pytest.raises(UsageError) as caught:
        check(cfg)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_the_learner_uses_may_differ_between_runs_of_one_batch() -> None:
    (base,) = runs_of(gather("demo", None, [], {"method": "dad"})).values()

    def equal(other: dict[str, object], any_size: bool = False, to: Config = base) -> bool:
        changed = batch_settings(with_values(to, other), any_size=any_size)
        return changed == batch_settings(to, any_size=any_size)

    for path, value in {
        "loss.kd": 7.0,
        "loss.temperature": 9.0,
        "loss.distance": "l2",
        "loss.filter": False,
        "optim.lr": 1.0,
        "optim.opt": "sgd",
        "schedule.warmup_epochs": 0.5,
        "schedule.sched": "step",
        "ema.model_ema": True,
        "student.name": "resnet26",
        "student.drop_path": 0.5,
        "student.bn": "split",
        "student.seed": 3,
        "augment.smoothing": 0.2,
    }.items():
        assert equal({path: value}), path
    for path, value in {
        "seed": 5,
        "method": "kd",
        "data.batch_size": 7,
        "augment.hflip": 0.9,
        "attack.eps": 0.9,
        "discretizer.name": "identity",
        "teacher.name": "other",
        "schedule.epochs": 77,
        "loss.form": "joint",
        "store.dirs": ("x",),
        "precision.amp": "off",
    }.items():
        assert not equal({path: value}), path

    # The student decides the size of the images where nothing else does.
    own_size = with_values(base, {"augment.img_size": 0})
    assert not equal({"student.name": "resnet26"}, to=own_size)
    assert equal({"student.name": "resnet26"}, any_size=True, to=own_size)
    # The joint form mixes stored outputs at the temperature.
    joint = with_values(base, {"loss.form": "joint"})
    assert not equal({"loss.temperature": 9.0}, to=joint)
    # An ensemble has outputs of its own at every temperature; stores apply the filter.
    ensemble = with_values(base, {"teacher.name": "embedded:digits+timm:resnet18"})
    assert not equal({"loss.temperature": 9.0}, to=ensemble)
    stored = with_values(base, {"store.dirs": ("x",)})
    assert not equal({"loss.filter": False}, to=stored)
