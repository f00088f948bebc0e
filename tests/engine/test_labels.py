"""Training without labels, or with labels for a part of the images, against the same with labels."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
for package in ("timm", "open_clip"):
    pytest.importorskip(package)
from dad_fast.cli.main import main
from dad_fast.config.schema import DataConfig, LossConfig, StoreConfig
from dad_fast.data.sources.base import UNLABELLED
from dad_fast.methods.losses import objective
from dad_fast.methods.registry import METHODS, Images
from dad_fast.store import AdversarialStore
from tests.engine.test_step import SIDE, B, C, batch, make
from tests.steps import inputs_of, loss_of
from tests.tiny import train_arguments, write_images

BY_TEACHER = DataConfig(labels="teacher")
WITH_EXTRA = DataConfig(extra_data="extra")
# Neighbours: two with labels, one with and one without, two without, two without.
PARTLY = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)


def unmixed():
    return replace(batch(kinds=(0, 0, 0, 0)), mix_lam=torch.ones(B))


def without(data, known=None):
    """The batch without the labels of images that are not `known`; by default without any."""
    known = torch.zeros(B, dtype=torch.bool) if known is None else known
    return replace(data, labels=data.labels.where(known, UNLABELLED))


@torch.no_grad()
def answers_of(step, data):
    return step.generator.teacher(step.generator.mixed(data).pixels).argmax(-1)


@pytest.mark.parametrize("method", ["kd", "dad", "rslad"])
def test_the_teachers_answer_is_the_label(method):
    """The attack and the filter see a label that equals it; cross-entropy is off."""
    step, data = make(method, data=BY_TEACHER), unmixed()
    labels = answers_of(step, data)
    loss, scalars = loss_of(step, without(data))
    expected, _ = loss_of(
        make(method, loss=LossConfig(ce=0, kd=0.5, dad=0.25, ard=0.4)),
        replace(data, labels=labels),
    )
    assert loss.item() == expected.item() and "ce" not in scalars
    # True labels of the data are ignored by the loader; here they would change the attack.
    assert not torch.equal(labels, data.labels)


def test_mixed_images_without_labels_are_one_class_to_the_attack():
    step, data = make("dad", data=BY_TEACHER), batch()
    found = inputs_of(step, without(data))
    labels = answers_of(step, without(data))
    one_hot = torch.nn.functional.one_hot(labels, C).float()
    assert torch.equal(found.targets[Images.ATTACK_TEACHER], one_hot)
    predicted = found.teacher[Images.ATTACK_TEACHER].argmax(-1)
    assert torch.equal(found.keep, (predicted == labels).float())


@pytest.mark.parametrize("fused", [False, True])
def test_labels_of_a_part_count_for_that_part(fused):
    """CE is over images whose pixels all have labels, divided by the whole batch."""
    # Without a mix the share is 1.
    data = batch(kinds=(1, 1, 0, 1))
    data = replace(data, mix_lam=data.mix_lam.where(data.mix_kind > 0, 1.0))
    step = make("dad", data=WITH_EXTRA)
    found = inputs_of(step, without(data, PARTLY))
    # The third image has a label and is mixed with one that has none.
    expected = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]).float()
    assert torch.equal(found.labelled, expected)
    whole = inputs_of(make("dad"), data)
    same = expected.bool()
    targets = found.targets[Images.CLEAN]
    assert torch.equal(targets[same], whole.targets[Images.CLEAN][same])
    answers = answers_of(step, without(data, PARTLY))
    assert torch.equal(targets[~same].argmax(-1), answers[~same]) and targets[~same].max() == 1

    g = torch.Generator().manual_seed(0)
    draws = [torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(4)]
    kinds = (Images.CLEAN, Images.ATTACK_TEACHER)
    student = {kinds[0]: draws[0], kinds[1]: draws[1]}
    teacher = {kinds[0]: draws[2], kinds[1]: draws[3]}
    y = {kind: targets.double() for kind in kinds}
    counts = {"labelled": expected.double(), "fused": fused}
    weights = LossConfig(ce=1.0, kd=0.5, dad=0.5)
    _, values = objective(METHODS["dad"], weights, student, teacher, y, found.keep, **counts)
    ce = -(targets * student[Images.CLEAN].log_softmax(-1)).sum(-1)
    assert values["ce"].item() == pytest.approx((ce * expected).sum().item() / B)
    everything = objective(METHODS["dad"], weights, student, teacher, y, found.keep)[1]
    for name in ("kd", "dad"):
        assert values[name].item() == pytest.approx(everything[name].item())


def test_stores_need_no_answers():
    """With stored images and outputs no teacher is asked."""
    stored = {
        "dad_images": torch.zeros(B, 3, SIDE, SIDE, dtype=torch.uint8),
        "dad_outputs": torch.zeros(B, C).half(),
        "dad_kept": torch.ones(B),
        "clean_outputs": torch.zeros(B, C).half(),
    }
    step = make("dad", data=BY_TEACHER, store=StoreConfig(dirs=("a store",)))
    step.generator.teacher = None
    loss, scalars = loss_of(step, replace(without(unmixed()), **stored))
    assert torch.isfinite(loss) and set(scalars) == {"loss", "kd", "dad", "kept"}


@pytest.fixture(scope="module")
def unlabelled(parts, tmp_path_factory):
    """Data whose train split has no class folders, and a class map."""
    root = tmp_path_factory.mktemp("unlabelled")
    write_images(root, per_class=4)
    for number, path in enumerate(sorted((root / "train").glob("*/*.jpg"))):
        path.rename(root / "train" / f"{number}.jpg")
    for folder in (root / "train").iterdir():
        if folder.is_dir():
            folder.rmdir()
    (root / "classes.csv").write_text("id,folder,name\n0,ant,ant\n1,bee,bee\n2,cat,cat\n")
    return ["--data-dir", root, "--labels", "teacher", "--class-map", root / "classes.csv"]


def test_images_without_labels_are_stored_and_trained_on(parts, unlabelled, tmp_path, capsys):
    """`precompute` keeps what the teacher still predicts; `train` learns from it and online."""
    store = tmp_path / "store"
    fill = train_arguments(parts, store, *unlabelled, "--images", "raw", verb="precompute")
    drop = ("--max-steps", "--epochs", "--warmup-epochs")
    for flag in drop:
        del fill[fill.index(flag) : fill.index(flag) + 2]
    assert main(fill) == 0 and main(["store", "verify", str(store)]) == 0
    found = AdversarialStore(store)
    assert (found.labels(torch.arange(12).numpy()) == UNLABELLED).all()

    run = train_arguments(parts, tmp_path / "run", *unlabelled, "--mixup", "0.5")
    assert main(run) == 0
    printed = capsys.readouterr().err
    assert "12 images without labels; labels: the teacher's predictions" in printed
    learned = train_arguments(parts, tmp_path / "stored", *unlabelled, "--store", store)
    assert main(learned) == 0
    labelled = train_arguments(parts, tmp_path / "other", "--store", store)
    assert main(labelled) == 4


def test_further_images_join_a_labelled_set(parts, unlabelled, tmp_path, capsys):
    extra = unlabelled[1] / "train"
    assert main(train_arguments(parts, tmp_path / "run", "--extra-data", extra)) == 0
    assert "+ " in (shown := capsys.readouterr().err) and "12 images without labels" in shown


MISTAKES = {
    "labels alone": (["--labels", "teacher", "--method", "ce"], 2, "learns from labels alone"),
    "attacked": (["--labels", "teacher", "--method", "dat+dad"], 2, "on attacked images; use dad"),
    "extra alone": (["--extra-data", "x", "--method", "dat"], 2, "use one of kd, dad, dat+dad"),
    "probe": (
        ["--labels", "teacher", "--method", "lp-clip", "--lp-labels", "true"],
        2,
        "--lp-labels true needs them",
    ),
    "no folder": (["--extra-data", "nowhere"], 4, "--extra-data nowhere: no such folder"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_written(parts, tmp_path, capsys, what):
    more, code, words = MISTAKES[what]
    assert main(train_arguments(parts, tmp_path / "run", *more)) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and words in line
    assert not (tmp_path / "run").exists()


def test_images_without_classes_need_a_class_map(parts, unlabelled, tmp_path, capsys):
    for more, words in (
        (unlabelled[:2], "no class folders in it; put the images of each class in one, or see"),
        (unlabelled[:4], "name the classes of the teacher in a CSV"),
    ):
        assert main(train_arguments(parts, tmp_path / "run", *more)) == 4
        assert words in capsys.readouterr().err
