"""Tests of discretizers: images, codes, precision per stage, one-line errors."""

import io

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
from PIL import Image

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.fused_layers import VQGANOptimizations
from dad_fast.discretizers.vqgan.model import VQGAN, VQGANConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.kernels import CodebookSearch
from dad_fast.models.weights.files import sha256_file
from tests.numerics import assert_as_exact, assert_same_function, clearly_nearest, error

CPU, FLOAT32 = torch.device("cpu"), PrecisionConfig()


@pytest.fixture
def vqgan():
    torch.manual_seed(0)
    model = VQGAN(
        VQGANConfig(
            ch=8,
            ch_mult=(1, 2),
            num_res_blocks=1,
            attn_levels=(1,),
            z_channels=4,
            embed_dim=4,
            n_embed=32,
        )
    )
    with torch.no_grad():
        model.codebook.normal_(std=0.5)
    return model


def load(name, precision=FLOAT32):
    return load_discretizer(str(name), precision, CPU)


def test_vqgan_from_a_file(vqgan, tmp_path):
    vqgan.save(tmp_path / "own.safetensors", seen="noise")
    torch.save({"state_dict": vqgan.state_dict()}, tmp_path / "taming.ckpt")
    pixels = torch.rand(2, 3, 16, 12, requires_grad=True)
    discretizer = load(tmp_path / "own.safetensors")
    assert (discretizer.provenance, discretizer.weights_sha256) == (
        "noise",
        sha256_file(tmp_path / "own.safetensors"),
    )
    images, codes = discretizer(pixels)
    assert images.shape == pixels.shape
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert codes.shape == (2, 8, 6) and codes.dtype == torch.int64
    assert torch.equal(images, vqgan.eval().decode(codes))
    assert torch.equal(codes, vqgan.codes(pixels))
    taming = load(tmp_path / "taming.ckpt")
    assert torch.equal(taming(pixels).images, images)
    assert taming.provenance == "not recorded in the weights"
    assert not any(p.requires_grad for p in taming.vqgan.parameters()) and not taming.vqgan.training


@pytest.mark.parametrize("optimizations", [None, VQGANOptimizations()])
def test_precision_of_each_stage(vqgan, optimizations, monkeypatch):
    """Encoder and decoder run in their own dtypes under amp; the lookup always gets float32."""
    seen = []

    def search(self, latents):
        assert not torch.is_autocast_enabled("cpu")
        seen.append(latents.dtype)
        return exact_search(self, latents)

    exact_search = CodebookSearch.search
    monkeypatch.setattr(CodebookSearch, "search", search)
    pixels = torch.rand(1, 3, 8, 8)
    exact = VQGANDiscretizer(vqgan, FLOAT32)(pixels)
    mixed = VQGANDiscretizer(
        vqgan,
        PrecisionConfig(amp=True, encoder="float16", decoder="bfloat16"),
        optimizations=optimizations,
    )
    assert mixed.encode(pixels).dtype == torch.float16
    assert mixed.fused.decode(exact.codes).dtype in (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        images, codes = mixed(pixels)
    assert images.dtype == torch.float32 and torch.equal(codes, vqgan.lookup(mixed.encode(pixels)))
    with torch.autocast("cpu", torch.bfloat16):
        plain = vqgan.decode(codes)
    assert_as_exact(images, plain, vqgan.decode(codes))
    # Float32's is a thousandth of that
    assert error(images, vqgan.decode(codes)) > 1e-4
    clear = clearly_nearest(vqgan.encode(pixels), vqgan.codebook)
    assert clear.float().mean() > 0.8
    for precision in (FLOAT32, PrecisionConfig(amp=True, encoder="float32", decoder="float32")):
        images, codes = VQGANDiscretizer(vqgan, precision, optimizations=optimizations)(pixels)
        assert torch.equal(codes[clear], exact.codes[clear])
        assert_same_function(images, vqgan.decode(codes))
    assert seen == [torch.float32] * 5


def test_without_amp_it_equals_the_plain_model_bit_for_bit(vqgan):
    pixels = torch.rand(2, 3, 16, 12)
    images, codes = VQGANDiscretizer(vqgan, FLOAT32)(pixels)
    assert torch.equal(codes, vqgan.codes(pixels)) and torch.equal(images, vqgan.decode(codes))


def test_fit_float16(vqgan, tmp_path):
    """Only a float16 half whose activations overflow is scaled, and then its latents are finite."""
    pixels = torch.rand(2, 3, 16, 12)
    half = PrecisionConfig(amp=True, encoder="float16", decoder="bfloat16")
    assert VQGANDiscretizer(vqgan, half).fit_float16(pixels) == ""
    with torch.no_grad():
        vqgan.encoder.conv_in.weight.mul_(2.0**18)
        vqgan.decoder.conv_in.weight.mul_(2.0**18)
    exact = vqgan.encode(pixels)
    assert VQGANDiscretizer(vqgan, FLOAT32).fit_float16(pixels) == ""
    discretizer = VQGANDiscretizer(vqgan, half)
    assert not discretizer.encode(pixels).isfinite().all()
    line = discretizer.fit_float16(pixels)
    assert "encoder runs at 2^-" in line
    assert "decoder" not in line
    assert "\n" not in line
    torch.testing.assert_close(
        discretizer.encode(pixels).float(), exact, rtol=0, atol=0.02 * exact.std().item()
    )
    # A file is fitted when it is loaded, by synthetic images
    vqgan.save(tmp_path / "loud.safetensors", seen="")
    loaded = load(tmp_path / "loud.safetensors", half)
    assert "encoder runs at 2^-" in loaded.range_note
    torch.testing.assert_close(
        loaded.encode(pixels).float(), exact, rtol=0, atol=0.02 * exact.std().item()
    )


def test_image_size_must_be_a_multiple_of_the_factor(vqgan):
    with pytest.raises(UsageError, match=r"15x16 .* 2x2 .* --img-size that is a multiple of 2"):
        VQGANDiscretizer(vqgan, FLOAT32)(torch.rand(1, 3, 15, 16))


def test_identity():
    pixels = torch.rand(2, 3, 5, 7, requires_grad=True)
    images, codes = load("identity")(pixels)
    assert torch.equal(images, pixels) and not images.requires_grad and codes is None


def test_jpeg_equals_pillow():
    """Equals a JPEG file of each image, written and read again by Pillow."""
    ramp = torch.linspace(0, 1, 48)
    image = torch.stack((ramp.expand(32, 48), ramp.flip(0).expand(32, 48), torch.rand(32, 48)))
    pixels = image.repeat(2, 1, 1, 1).requires_grad_()
    images, codes = load("jpeg:30")(pixels)
    assert codes is None
    assert images.shape == pixels.shape
    assert images.dtype == torch.float32
    assert not images.requires_grad
    file = io.BytesIO()
    levels = (pixels[0].detach() * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(file, "JPEG", quality=30)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert torch.equal(images[0], expected) and torch.equal(images[0], images[1])
    smooth = pixels.detach().clone()
    smooth[:, 2] = 0.5
    coarse, fine = ((load(f"jpeg:{q}")(smooth).images - smooth).square().mean() for q in (10, 95))
    assert fine < coarse / 4


@pytest.mark.parametrize("name", ["jpeg", "jpeg:", "jpeg:0", "jpeg:101", "jpeg:high"])
def test_jpeg_needs_a_quality(name):
    with pytest.raises(UsageError, match="jpeg:QUALITY"):
        load(name)


def test_webp_equals_pillow():
    pixels = torch.rand(2, 3, 20, 16)
    images, codes = load("webp:40")(pixels)
    file = io.BytesIO()
    levels = (pixels[1] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(file, "WEBP", quality=40)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert codes is None and torch.equal(images[1], expected)


def test_blur_loses_detail_and_keeps_what_is_smooth():
    ramp = torch.linspace(0.2, 0.8, 32).expand(2, 3, 32, 32)
    stripes = (torch.arange(32) % 2).float().expand(2, 3, 32, 32).clone().requires_grad_()
    blur = load("blur:4")
    images, codes = blur(stripes)
    assert codes is None and not images.requires_grad
    assert (images[..., 4:-4] - 0.5).abs().max() < 0.05
    assert (blur(ramp).images - ramp)[..., 4:-4].abs().max() < 0.01
    assert load("blur:2.5")(torch.rand(1, 3, 13, 21)).images.shape == (1, 3, 13, 21)


@pytest.mark.parametrize("name", ["identity", "jpeg:75", "webp:75", "blur:4"])
def test_controls_have_no_codes(name):
    control = load(name)
    assert (control.name, control.describe_codes(32), control.code_bits) == (name, "no codes", 0)
    assert control(torch.rand(1, 3, 8, 8)).codes is None and control.fingerprint() is None


@pytest.mark.parametrize(
    "name", ["webp:0", "webp:101", "webp:4.5", "blur", "blur:1", "blur:nan", "blur:65"]
)
def test_controls_need_a_valid_argument(name):
    form = {"webp": "webp:QUALITY", "blur": "blur:FACTOR"}[name.partition(":")[0]]
    with pytest.raises(UsageError, match=f"--discretizer {name}: write {form}"):
        load(name)


@pytest.mark.parametrize("name", ["", "vqgan", "f8-16384"])
def test_unknown_names_are_refused(name):
    with pytest.raises(
        UsageError, match=f"--discretizer '{name}': no such file; write a .ckpt .*jpeg:75"
    ):
        load(name)


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere.ckpt: no such weights file"):
        load(tmp_path / "nowhere.ckpt")
    with pytest.raises(
        UsageError, match="no embedded file letters-vqgan.safetensors: there are .*digits"
    ):
        load("embedded:letters")
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match="other.ckpt: not a VQGAN .*--discretizer"):
        load(tmp_path / "other.ckpt")
