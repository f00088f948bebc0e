"""Tests of the fused VQGAN: parity with the plain one, and float16's range."""

from dataclasses import fields

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from torch.utils.flop_counter import FlopCounterMode

from dad_fast.discretizers.vqgan.float16_range import HEADROOM, probe_range, scale_for
from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.fused_layers import VQGANOptimizations
from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN
from dad_fast.errors import UsageError
from dad_fast.models.weights.files import asset
from tests.discretizers.test_vqgan import DEMO_LIKE, F8_LIKE, F16_LIKE, random_vqgan
from tests.numerics import assert_as_exact, clearly_nearest, error

MODELS = {"f8": F8_LIKE, "f16": F16_LIKE, "demo": DEMO_LIKE}
NAMES = [field.name for field in fields(VQGANOptimizations)]
HALF = [torch.float16, torch.bfloat16]


def only(*names):
    return VQGANOptimizations(**{name: name in names for name in NAMES})


def double(vqgan):
    copy = VQGAN(vqgan.config).double()
    copy.load_state_dict(vqgan.state_dict())
    return copy.requires_grad_(False)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """VQGAN, pixels, their codes, and latents and images in float64."""
    torch.manual_seed(0)
    vqgan = random_vqgan(MODELS[request.param])
    exact, pixels = double(vqgan), torch.rand(2, 3, 48, 16)
    latents = exact.encode(pixels.double())
    codes = vqgan.lookup(latents)
    return vqgan, pixels, codes, latents, exact.decode(codes)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("channels_last", [False, True])
def test_without_optimizations_it_equals_the_plain_model_bit_for_bit(case, dtype, channels_last):
    vqgan, pixels, codes, _, _ = case
    pixels = pixels.to(memory_format=torch.channels_last) if channels_last else pixels
    fused = FusedVQGAN(vqgan, VQGANOptimizations.none(), encoder=dtype, decoder=dtype)
    with torch.autocast("cpu", dtype if dtype in HALF else torch.bfloat16, enabled=dtype in HALF):
        latents, images = vqgan.encode(pixels), vqgan.decode(codes)
    assert torch.equal(fused.encode(pixels), latents) and torch.equal(fused.decode(codes), images)
    assert torch.equal(fused.codes(pixels), vqgan.lookup(latents))


@pytest.mark.parametrize(
    "optimizations",
    [VQGANOptimizations(), VQGANOptimizations(norm_kernel=True), *map(only, NAMES)],
    ids=["default", "all", *NAMES],
)
def test_error_in_float32_is_at_most_twice_that_of_the_plain_model(case, optimizations):
    """No code differs either, where float32 can distinguish the two nearest entries."""
    vqgan, pixels, codes, latents, images = case
    fused = FusedVQGAN(vqgan, optimizations)
    assert_as_exact(fused.encode(pixels), vqgan.encode(pixels), latents)
    assert_as_exact(fused.decode(codes), vqgan.decode(codes), images)
    clear = clearly_nearest(latents, vqgan.codebook)
    assert clear.float().mean() > 0.8 and torch.equal(fused.codes(pixels)[clear], codes[clear])
    assert not fused.encode(pixels.requires_grad_()).requires_grad
    pixels.requires_grad_(False)


def test_every_optimization_is_exact_in_float64(case):
    """The difference vanishes in float64."""
    vqgan, pixels, codes, latents, images = case
    fused = FusedVQGAN(
        double(vqgan),
        encoder=torch.float64,
        decoder=torch.float64,
        encoder_scale=0.5,
        decoder_scale=2.0**-7,
    )
    assert error(fused.encode(pixels.double()), latents) < 1e-13
    assert error(fused.decode(codes), images) < 1e-13


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norm_kernel", [False, True])
def test_error_in_16_bit_is_at_most_twice_that_of_the_plain_model(case, dtype, norm_kernel):
    vqgan, pixels, codes, latents, images = case
    fused = FusedVQGAN(
        vqgan, VQGANOptimizations(norm_kernel=norm_kernel), encoder=dtype, decoder=dtype
    )
    with torch.autocast("cpu", dtype):
        plain_latents, plain_images = vqgan.encode(pixels), vqgan.decode(codes)
        got = fused.encode(pixels)  # autocast around it changes nothing
    assert got.dtype == dtype and torch.equal(got, fused.encode(pixels))
    assert_as_exact(got, plain_latents, latents, ulps=0)
    decoded = fused.decode(codes)
    assert decoded.dtype == torch.float32 and decoded.min() >= 0 and decoded.max() <= 1
    assert_as_exact(decoded, plain_images, images, ulps=0)


@pytest.mark.parametrize("dtype", HALF)
def test_embedded_vqgan_keeps_its_codes(dtype):
    """Merging trained projections changes no clear code."""
    vqgan = VQGAN.load(asset("digits-vqgan.safetensors")).eval().requires_grad_(False)
    exact, pixels = double(vqgan), torch.rand(8, 3, 28, 28)
    latents, codes = exact.encode(pixels.double()), vqgan.codes(pixels)
    clear = clearly_nearest(latents, vqgan.codebook)
    assert clear.float().mean() > 0.9
    assert torch.equal(FusedVQGAN(vqgan).codes(pixels)[clear], vqgan.lookup(latents)[clear])
    fused = FusedVQGAN(vqgan, encoder=dtype, decoder=dtype)
    with torch.autocast("cpu", dtype):
        assert error(fused.encode(pixels), latents) <= 2 * error(vqgan.encode(pixels), latents)
        assert error(fused.decode(codes), exact.decode(codes)) <= 2 * error(
            vqgan.decode(codes), exact.decode(codes)
        )


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (3, 2)])
def test_upsampling_at_every_border(height, width):
    from dad_fast.discretizers.vqgan.fused_layers import Recipe, Sum, Up
    from dad_fast.discretizers.vqgan.model import Upsample

    plain, x = Upsample(4).double(), torch.randn(2, 4, height, width).double()
    folded = Up(plain, Recipe(VQGANOptimizations(), torch.float64))(Sum(x)).total()
    torch.testing.assert_close(folded, plain(x), rtol=1e-13, atol=1e-13)


# By hand, at 224 px: an attention saves two projections of 784 x 512 x 512 (f16: 196), and an
# upsampled convolution 5/9 of its FLOP.
@pytest.mark.parametrize(
    "name, encode, decode", [("f8-16384", 169.5, 307.5), ("f16-1024", 105.3, 172.0)]
)
def test_flop_of_published_models(name, encode, decode):
    with torch.device("meta"):
        fused = FusedVQGAN(VQGAN(PRESETS[name]))
        with FlopCounterMode(display=False) as encoding:
            latents = fused.encode(torch.empty(1, 3, 224, 224))
        with FlopCounterMode(display=False) as decoding:
            fused.decode(torch.empty(1, *latents.shape[2:], dtype=torch.int64))
    assert encoding.get_total_flops() / 1e9 == pytest.approx(encode, abs=0.1)
    assert decoding.get_total_flops() / 1e9 == pytest.approx(decode, abs=0.1)


def test_fused_form_keeps_its_weights_and_checks():
    vqgan = random_vqgan(DEMO_LIKE)
    fused, pixels = FusedVQGAN(vqgan), torch.rand(1, 3, 16, 16)
    before = fused.encode(pixels)
    with torch.no_grad():
        vqgan.encoder.conv_in.weight.mul_(2)
    assert torch.equal(fused.encode(pixels), before)
    assert list(fused.parameters()) == []
    with pytest.raises(UsageError, match="--img-size that is a multiple of 4"):
        fused.codes(torch.rand(1, 3, 30, 28))


def test_compiles_as_one_graph():
    vqgan = random_vqgan(DEMO_LIKE)
    pixels = torch.rand(1, 3, 16, 16)
    exact = double(vqgan).encode(pixels.double())
    for optimizations in (VQGANOptimizations(), VQGANOptimizations(norm_kernel=True)):
        fused = FusedVQGAN(vqgan, optimizations, encoder=torch.bfloat16)
        compiled = torch.compile(fused.encode, fullgraph=True, backend="aot_eager")
        # Bfloat16 kernels of other layouts round otherwise
        assert_as_exact(compiled(pixels), fused.encode(pixels), exact)


# --- float16's range ------------------------------------------------------------------------------


def loud_vqgan():
    """VQGAN whose residual streams and branches exceed float16's range."""
    vqgan = random_vqgan(F8_LIKE)
    with torch.no_grad():
        for half in (vqgan.encoder, vqgan.decoder):
            for name, parameter in half.named_parameters():
                if name.endswith(
                    ("conv1.weight", "conv2.weight", "proj_out.weight")
                ) or name.startswith("conv_in"):
                    parameter.mul_(2.0**17)
    return vqgan


@pytest.mark.parametrize("norm_kernel", [False, True])
def test_scaled_activations_fit_float16(norm_kernel):
    vqgan, pixels = loud_vqgan(), torch.rand(2, 3, 32, 32)
    exact = double(vqgan)
    latents, codes = exact.encode(pixels.double()), vqgan.codes(pixels)
    optimizations = VQGANOptimizations(norm_kernel=norm_kernel)
    overflowing = FusedVQGAN(vqgan, optimizations, encoder=torch.float16, decoder=torch.float16)
    assert not overflowing.encode(pixels).isfinite().all()
    assert not overflowing.decode(codes).isfinite().all()

    found = probe_range(vqgan, pixels)
    assert max(found.encoder.values()) > 65504 and max(found.decoder.values()) > 65504
    assert found.encoder_scale < 2.0**-3 and found.decoder_scale < 2.0**-3
    scales = {"encoder_scale": found.encoder_scale, "decoder_scale": found.decoder_scale}
    scaled = FusedVQGAN(
        vqgan, optimizations, encoder=torch.float16, decoder=torch.float16, **scales
    )
    assert error(scaled.encode(pixels), latents) < 3e-3
    assert error(scaled.decode(codes), exact.decode(codes)) < 5e-3

    # A power of two changes no bit of float32.
    one, other = FusedVQGAN(vqgan, optimizations), FusedVQGAN(vqgan, optimizations, **scales)
    assert torch.equal(one.encode(pixels), other.encode(pixels))
    assert torch.equal(one.decode(codes), other.decode(codes))


def test_eps_is_scaled_with_the_stream():
    """On a map so flat that group norm's eps decides, an unscaled eps would change the output."""
    vqgan, pixels = random_vqgan(DEMO_LIKE), torch.full((1, 3, 16, 16), 0.5)
    with torch.no_grad():
        vqgan.encoder.conv_in.weight.mul_(1e-4)
        vqgan.encoder.conv_in.bias.fill_(0.01)
    assert torch.equal(
        FusedVQGAN(vqgan, encoder_scale=2.0**-9).encode(pixels), FusedVQGAN(vqgan).encode(pixels)
    )


def test_scale_for():
    assert scale_for(0.0) == scale_for(65504 / HEADROOM) == 1.0
    assert scale_for(65504 / HEADROOM * 1.01) == 0.5
    assert scale_for(65504.0 * 4) == 1 / (4 * HEADROOM)
    with pytest.raises(ValueError, match="not finite"):
        scale_for(float("inf"))


def test_small_activations_are_not_scaled():
    found = probe_range(random_vqgan(DEMO_LIKE), torch.rand(1, 3, 16, 16))
    assert found.encoder_scale == found.decoder_scale == 1.0
    assert "encoder.down_1_attn_0.q" in found.encoder
    assert "decoder.up_2_upsample.conv" not in found.encoder


# --- CUDA -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "optimizations",
    [VQGANOptimizations(), VQGANOptimizations(norm_kernel=True), *map(only, NAMES)],
    ids=["default", "all", *NAMES],
)
def test_cuda_error_in_16_bit_is_at_most_twice_that_of_the_plain_model(dtype, optimizations):
    vqgan = random_vqgan(F8_LIKE).cuda()
    exact, pixels = double(vqgan).cuda(), torch.rand(2, 3, 64, 96, device="cuda")
    latents, codes = exact.encode(pixels.double()), vqgan.codes(pixels)
    images = exact.decode(codes)
    fused = FusedVQGAN(vqgan, optimizations, encoder=dtype, decoder=dtype)
    with torch.autocast("cuda", dtype), torch.no_grad():
        plain_latents, plain_images = vqgan.encode(pixels), vqgan.decode(codes)
    assert error(fused.encode(pixels), latents) <= 2 * error(plain_latents, latents)
    assert error(fused.decode(codes), images) <= 2 * error(plain_images, images)


@pytest.mark.gpu
@pytest.mark.parametrize("norm_kernel", [False, True])
def test_cuda_graph(norm_kernel):
    """Replaying a captured graph on new inputs equals the eager result."""
    vqgan = random_vqgan(F8_LIKE).cuda()
    fused = FusedVQGAN(
        vqgan,
        VQGANOptimizations(norm_kernel=norm_kernel),
        encoder=torch.float16,
        decoder=torch.bfloat16,
    )
    pixels, codes = (
        torch.rand(2, 3, 64, 64, device="cuda"),
        torch.randint(0, 64, (2, 8, 8), device="cuda"),
    )
    for function, static, fresh in (
        (fused.encode, pixels, torch.rand_like(pixels)),
        (fused.decode, codes, torch.randint_like(codes, 64)),
    ):
        with torch.cuda.stream(torch.cuda.Stream()):
            function(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(static)
        static.copy_(fresh)
        graph.replay()
        assert torch.equal(out, function(fresh))
