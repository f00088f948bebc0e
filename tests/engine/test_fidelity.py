"""Fit of a discretizer to the data: what is measured and what is worth a warning."""

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from dad_fast.config.schema import Config
from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.discretizers.blur import Blur
from dad_fast.discretizers.identity import Identity
from dad_fast.engine.fidelity import measure_fidelity, warning_of_misfit


class Changed(Discretizer):
    """Discretizer that applies a function and has 100 codes."""

    name, provenance, code_bits = "changed", "", 7

    def __init__(self, change=lambda x: x, codes=100, image_size=0):
        self.change = change
        self.num_codes = codes
        self.image_size = image_size

    def __call__(self, pixels):
        numbers = torch.arange(len(pixels) * 16) % self.num_codes
        return Discretized(self.change(pixels), numbers.view(-1, 4, 4))

    @property
    def codebook(self):
        return torch.zeros(100, 2)


def colour_images():
    """Photograph-like: smooth, coloured, [16, 3, 32, 32]."""
    noise = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear")


def warned(discretizer, pixels):
    return warning_of_misfit(measure_fidelity(discretizer, pixels), discretizer)


@pytest.mark.parametrize(
    "discretizer", [Identity(), Blur(4), Changed(), Changed(image_size=20), Changed(codes=6)]
)
def test_good_discretizers_are_not_warned_about(discretizer):
    assert warned(discretizer, colour_images()) is None


@pytest.mark.parametrize(
    ("discretizer", "expected"),
    [
        (Changed(lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)), "colour into grey"),
        (Changed(lambda x: torch.full_like(x, 0.5)), r"loses (9\d%|all) of the .* variance"),
        (Changed(codes=4), "use 4 of 100 possible codes"),
        (Changed(image_size=224), "trained on images of 224 px, and these have 32"),
        (Changed(image_size=16), "trained on images of 16 px"),
    ],
)
def test_misfits_are_named_with_what_was_measured(discretizer, expected):
    found = warned(discretizer, colour_images())
    assert found.startswith("changed may not fit the data") and "fit-discretizer" in found
    assert re.search(expected, found), found


def test_values_are_exact():
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[:, :, :2] = 1.0
    found = measure_fidelity(Changed(lambda x: x * 0.5, codes=5), pixels)
    # Half of the values are wrong by 0.5: mean square 1/8, of a variance of 1/4.
    assert found.rms == pytest.approx(0.125**0.5) and found.lost == pytest.approx(0.5)
    assert (found.colour, found.codes, found.possible, found.side) == (0.0, 5, 32, 4)


def test_flat_grey_images_and_few_codes_are_no_reason_to_warn():
    flat = torch.full((2, 3, 8, 8), 0.4)
    assert warned(Changed(lambda x: x + 0.1, codes=1), flat) is None


def test_advice_logs_the_warning():
    from dad_fast.engine.notices import Advice

    class Parts:
        discretizer = Changed(codes=2)

    said = []
    found = measure_fidelity(Parts.discretizer, colour_images())
    Advice(Config(), Parts, "pil").on_fidelity(found, said.append)
    (line,) = said
    assert line.startswith("warning: changed may not fit the data: the first images use 2 of 100")
