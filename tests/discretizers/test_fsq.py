"""FSQ: exact rounding, codes as integers, straight-through gradients, files."""

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors import safe_open

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.config import VQGANConfig
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.fsq import bounded, fsq_codebook, fsq_codes, straight_through
from dad_fast.discretizers.vqgan.model import VQGAN

LEVELS = (8, 5, 2, 3)
CONFIG = VQGANConfig(
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_levels=(),
    z_channels=4,
    embed_dim=4,
    n_embed=math.prod(LEVELS),
    norm_groups=4,
    quantizer="fsq",
    levels=LEVELS,
)


@pytest.fixture
def vqgan():
    torch.manual_seed(0)
    model = VQGAN(CONFIG).eval().requires_grad_(False)
    model.quant_conv.weight.mul_(20)
    return model


def latents_of(*sides):
    return torch.randn(*sides, generator=torch.Generator().manual_seed(3)) * 3


def test_codes_are_the_rounding_of_each_dimension_in_float64():
    latents = latents_of(2, 4, 30, 50)
    codes = fsq_codes(latents, LEVELS)
    exact = bounded(latents.double(), LEVELS)
    # float32 decides differently only where float64 is next to a tie.
    clear = ((exact - exact.floor() - 0.5).abs() > 1e-5).all(1)
    assert clear.float().mean() > 0.99
    digits = exact.round() + torch.tensor([n // 2 for n in LEVELS]).view(1, 4, 1, 1)
    radix = torch.tensor([1, 8, 40, 80]).view(1, 4, 1, 1)
    assert torch.equal(codes[clear], (digits * radix).sum(1).long()[clear])
    assert codes.dtype == torch.int64 and codes.min() == 0 and codes.max() == 239


@pytest.mark.parametrize("levels", [(2,), (3,), (256, 255), LEVELS])
def test_every_level_is_reached_and_none_beyond(levels):
    ramp = torch.linspace(-12, 12, 40_001)
    latents = ramp.expand(1, len(levels), 1, -1)
    found = bounded(latents, levels).round()
    for values, size in zip(found[0], levels, strict=True):
        expected = torch.arange(size, dtype=torch.float32) - size // 2
        assert torch.equal(values.unique(), expected)
    assert bounded(torch.zeros(1, len(levels), 1, 1), levels).abs().max() < 1e-5


def test_codebook_has_the_value_of_each_code():
    codebook = fsq_codebook(LEVELS)
    assert codebook.shape == (240, 4) and len(codebook.unique(dim=0)) == 240
    latents = latents_of(1, 4, 9, 9)
    values = codebook[fsq_codes(latents, LEVELS)].permute(0, 3, 1, 2)
    assert torch.equal(values, straight_through(latents, LEVELS).detach())
    assert values.min() >= -1 and values.max() <= 1


def test_gradient_passes_as_if_nothing_were_rounded():
    latents = latents_of(1, 4, 5, 5).double().requires_grad_()
    weight = torch.rand(1, 4, 5, 5, dtype=torch.float64)
    (straight_through(latents, LEVELS) * weight).sum().backward()
    found, latents.grad = latents.grad, None
    scale = torch.tensor([n // 2 for n in LEVELS]).view(1, 4, 1, 1)
    (bounded(latents, LEVELS) / scale * weight).sum().backward()
    torch.testing.assert_close(found, latents.grad)
    assert found.abs().max() > 0


def test_file_has_no_codebook_and_loads(vqgan, tmp_path):
    vqgan.save(tmp_path / "fsq.safetensors", seen="noise")
    with safe_open(tmp_path / "fsq.safetensors", framework="pt") as file:
        assert "quantize.embedding.weight" not in file.keys()
    found = load_discretizer(
        str(tmp_path / "fsq.safetensors"), PrecisionConfig(), torch.device("cpu")
    )
    pixels = torch.rand(2, 3, 16, 12)
    images, codes = found(pixels)
    assert torch.equal(codes, fsq_codes(vqgan.encode(pixels), LEVELS)) and len(codes.unique()) > 9
    assert torch.equal(images, vqgan.decode(codes))
    assert (found.backend, found.code_bits, found.code_grid(16)) == ("fsq", 8, (8, 8))
    assert "codebook_search" not in found.kernels
    assert found.describe_codes(16) == "8x8 codes of 8 bits per image"


def test_latents_that_are_not_finite_get_code_0_and_count(vqgan):
    latents = latents_of(1, 4, 2, 3)
    latents[0, 1, 0, 2], latents[0, 3, 1, 1] = torch.nan, torch.inf
    codes = vqgan.lookup(latents)
    assert codes[0, 0, 2] == 0 and codes[0, 1, 1] == 0 and codes[0, 0, 0] > 0
    assert vqgan.search().num_nonfinite == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (8, 5)}, "levels .8, 5. make no 240 codes"),
        ({"levels": (1, 240, 1, 1)}, "levels is"),
        ({"levels": (300, 5, 2, 3)}, "levels is"),
        ({"quantizer": "nearest"}, "levels is .* without fsq"),
        ({"quantizer": "gumbel"}, "quantizer is gumbel"),
    ],
)
def test_impossible_levels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**vars(CONFIG), **change})


@pytest.mark.parametrize("quantizer", ["fsq", "unit"])
def test_mixed_precision_quantizes_in_float32(quantizer, vqgan):
    """Fused halves in 16 bits; latents are bounded, or divided by their length, in float32."""
    levels = LEVELS if quantizer == "fsq" else ()
    other = VQGAN(replace(CONFIG, quantizer=quantizer, levels=levels))
    other.load_state_dict({**vqgan.state_dict(), **codebook_of(quantizer)})
    pixels = torch.rand(2, 3, 16, 16)
    exact = VQGANDiscretizer(other, PrecisionConfig())(pixels)
    images, codes = VQGANDiscretizer(other, PrecisionConfig(amp=True))(pixels)
    assert (codes == exact.codes).float().mean() > 0.9
    assert images.dtype == torch.float32 and images.shape == pixels.shape


def codebook_of(quantizer):
    torch.manual_seed(2)
    weight = torch.nn.functional.normalize(torch.randn(240, 4), dim=1)
    return {} if quantizer == "fsq" else {"quantize.embedding.weight": weight}
