"""`dad-fast fit-discretizer --perceptual`: loss, effect, resume, errors."""

import re

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from safetensors.torch import save_file

from dad_fast.cli.main import main
from dad_fast.config.options_fit import FitOptions
from dad_fast.loggers.run_log import read_metrics
from dad_fast.tools.fit_discretizer.fit import Fit
from dad_fast.tools.fit_discretizer.perceptual import load_perceptual
from tests.fits import stop_in_second_step
from tests.tiny import write_images

CPU = torch.device("cpu")
SMALL = [
    *("--width", "8", "--codes", "32", "--img-size", "16", "--batch-size", "4", "--epochs", "3"),
    *("--workers", "0", "--log-every", "2", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """NAME@FILE of a small network with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    return f"test_resnet@{path}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), per_class=4)


def run(data, output, *more):
    return main(["fit-discretizer", "--data-dir", str(data), "-o", str(output), *SMALL, *more])


def test_distance_is_that_of_unit_features_at_every_level(weights):
    found = load_perceptual(weights, 32, CPU)
    x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    model = timm.create_model("test_resnet", num_classes=3, features_only=True)
    model.load_state_dict(found.model.state_dict(), strict=False)
    model.eval()
    mean, std = (
        torch.tensor(found.model.pretrained_cfg["mean"]),
        torch.tensor(found.model.pretrained_cfg["std"]),
    )

    def unit(pixels):
        maps = model((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        return [level / level.norm(dim=1, keepdim=True).clamp_min(1e-6) for level in maps]

    expected = [(a - b).square().sum(1).mean() for a, b in zip(unit(y), unit(x), strict=True)]
    assert len(expected) == 5
    distance = found(y, x)
    torch.testing.assert_close(distance, sum(expected) / 5)
    distance.backward()
    assert y.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in found.parameters())
    assert found(x, x) == 0


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_other_architectures_have_feature_maps(name, tmp_path):
    save_file(timm.create_model(name).state_dict(), tmp_path / "a.safetensors")
    found = load_perceptual(f"timm:{name}@{tmp_path / 'a.safetensors'}", 32, CPU)
    x = torch.rand(1, 3, 32, 32)
    assert 0 < found(1 - x, x) <= 4


def test_the_term_brings_features_closer(weights):
    perceptual = load_perceptual(weights, 16, CPU)
    drawn = torch.Generator().manual_seed(1)
    pixels = torch.rand(4, 3, 16, 16, generator=drawn)

    def trained(term):
        torch.manual_seed(0)
        options = FitOptions(width=4, codes=64, perceptual_weight=1.0, lr=1e-2, epochs=16)
        fit = Fit(options, 16, CPU, term)
        for number in range(16):
            fit.step(number, 1, pixels)
        with torch.no_grad():
            decoded = fit.vqgan.decode(fit.vqgan.codes(pixels))
            return perceptual(decoded, pixels).item(), fit.window()

    without, window = trained(None)
    assert "perceptual" not in window
    distance, window = trained(perceptual)
    assert distance < 0.9 * without
    parts = window["l1"] + window["l2"] + 0.25 * window["commitment"] + window["perceptual"]
    assert window["loss"] == pytest.approx(parts, rel=1e-4)


def test_resume_is_bit_exact_and_needs_the_same_weights(
    weights, data, tmp_path, monkeypatch, capsys
):
    more = ["--max-steps", "4", "--perceptual", weights, "--perceptual-weight", "0.5"]
    whole = tmp_path / "whole.safetensors"
    assert run(data, whole, *more) == 0
    rows = read_metrics(tmp_path / "whole-fit", "train")
    assert all(row["perceptual"] > 0 for row in rows)

    output = tmp_path / "vq.safetensors"
    with monkeypatch.context() as patch:
        stop_in_second_step(patch)
        assert run(data, output, *more) == 75
    torch.manual_seed(7)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), other)
    for changed in (more[:2], [*more[:2], "--perceptual", f"test_resnet@{other}"]):
        capsys.readouterr()
        assert run(data, output, *changed, "--resume", "auto") == 2
        assert re.search("was made with (perceptual|weights of)", capsys.readouterr().err)
    assert run(data, output, *more, "--resume", "auto") == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        ("resnet5o", 2, "--perceptual resnet5o: timm has no such model; did you mean resnet50"),
        ("resnet18@nowhere.pt", 4, "nowhere.pt"),
        ("resnet18@{file}", 4, "small.safetensors"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    weights, data, tmp_path, capsys, value, code, message
):
    value = value.format(file=weights.partition("@")[2])
    assert run(data, tmp_path / "vq.safetensors", "--perceptual", value) == code
    # Loading a file may warn before.
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and re.search(message, error), error
    assert not list(tmp_path.iterdir())
    assert run(data, tmp_path / "vq.safetensors", "--perceptual-weight", "0") == 2
