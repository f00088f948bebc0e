"""What a VQGAN does on a GPU, as far as shapes and layouts tell: tensors of a pretended CUDA device
have no data. And the choices by size: images at once, form of the upsampling.
"""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.vqgan import discretizer as discretizer_module
from dad_fast.discretizers.vqgan import fused_layers, gpu_forms
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.fused_layers import Attention, Norm, Recipe, VQGANOptimizations
from dad_fast.discretizers.vqgan.gpu_forms import (
    MOST_BYTES,
    MOST_VALUES,
    micro_batch_size,
    norm_maps,
    upsampling_times,
)
from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN
from dad_fast.kernels import wide_attention
from tests.discretizers.test_vqgan import DEMO_LIKE, F8_LIKE, F16_LIKE, random_vqgan
from tests.numerics import assert_as_exact

AMP = PrecisionConfig(amp=True)
F8, F16 = replace(F8_LIKE, num_res_blocks=1), F16_LIKE


# --- layouts --------------------------------------------------------------------------------------


def on_pretended_gpu(config, monkeypatch, norm_kernel, height=32, width=48):
    """Yield (module, its inputs and outputs) of every norm and attention of an encode and decode."""
    monkeypatch.setattr(wide_attention, "architecture", lambda device: "sm_90")
    seen = []

    def note(module, args, out):
        seen.append((module, tree_leaves(args), tree_leaves(out)))

    def attended(attend):
        def call(q, k, v, scale):
            seen.append(("attention", [q, k, v], []))
            return attend(q, k, v, scale)

        return call

    with FakeTensorMode(), torch.device("cuda"):
        fused = FusedVQGAN(
            VQGAN(config),
            VQGANOptimizations(norm_kernel=norm_kernel),
            # Without a GPU, torch takes another convolution for bfloat16, which leaves NHWC.
            encoder=torch.float16,
            decoder=torch.float16,
        )
        for module in fused.modules():
            if isinstance(module, Norm):
                module.register_forward_hook(note)
            if isinstance(module, Attention):
                module.attend = attended(module.attend)
        latents = fused.encode(torch.empty(2, 3, height, width))
        fused.decode(torch.empty(2, *latents.shape[2:], dtype=torch.int64))
    return seen


@pytest.fixture
def norm_that_leaves_nhwc(monkeypatch):
    """Give torch's group norm the layout that it has in older releases on CUDA."""
    own = torch.nn.functional.group_norm

    def group_norm(*args, **named):
        return own(*args, **named).contiguous()

    monkeypatch.setattr(torch.nn.functional, "group_norm", group_norm)


@pytest.mark.parametrize(
    ("config", "norm_kernel"),
    [(F8, False), (F8, True), pytest.param(F16, False, marks=pytest.mark.slow)],
    ids=["f8", "f8-kernel", "f16"],
)
def test_norms_keep_nhwc_and_attention_gets_dense_inputs(
    config, norm_kernel, norm_that_leaves_nhwc, monkeypatch
):
    seen = on_pretended_gpu(config, monkeypatch, norm_kernel)
    attentions = [tensors for what, tensors, _ in seen if what == "attention"]
    norms = [(x, out) for what, x, out in seen if isinstance(what, Norm)]
    assert len(attentions) >= 2 and len(norms) > 10
    for tensors in attentions:
        assert all(tensor.is_contiguous() and tensor.device.type == "cuda" for tensor in tensors)
    for inputs, outputs in norms:
        maps = [t for t in (*inputs, *outputs) if isinstance(t, torch.Tensor) and t.ndim == 4]
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in maps)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_forms_of_a_gpu_are_exact_enough(dtype, norm_that_leaves_nhwc, monkeypatch):
    """NHWC norms in plain torch and attention by bmm obey the 2x rule in the whole VQGAN."""
    torch.manual_seed(0)
    vqgan = random_vqgan(F8)
    exact = VQGAN(vqgan.config).double()
    exact.load_state_dict(vqgan.state_dict())
    pixels = torch.rand(2, 3, 48, 16)
    with torch.no_grad():
        latents = exact.encode(pixels.double())
        codes = vqgan.lookup(latents)
        images = exact.decode(codes)
    monkeypatch.setattr(
        fused_layers, "wide_attention", lambda device, width: wide_attention.WAYS["bmm"]
    )
    fused = FusedVQGAN(vqgan, encoder=dtype, decoder=dtype)
    norms = [module.norm for module in fused.modules() if isinstance(module, Norm)]
    assert set(norms) == {fused_layers.nhwc_group_norm}
    found = fused.encode(pixels), fused.decode(codes)
    with torch.autocast("cpu", dtype), torch.no_grad():
        plain = vqgan.encode(pixels), vqgan.decode(codes)
    for ours, theirs, truth in zip(found, plain, (latents, images), strict=True):
        assert_as_exact(ours, theirs, truth, ulps=0)


# --- images at once -------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Number of values of the largest result."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.values = max(self.values, *sizes) if sizes else self.values
        return out


@pytest.mark.parametrize("name", ["f8-16384", "f16-1024"])
def test_largest_map_of_published_models(name):
    config = PRESETS[name]
    with torch.device("meta"):
        fused = FusedVQGAN(VQGAN(config))
        with Largest() as seen:
            latents = fused.encode(torch.empty(1, 3, 224, 224))
            fused.decode(torch.empty(1, *latents.shape[2:], dtype=torch.int64))
    assert seen.values <= config.largest_map(224, 224) <= 1.02 * seen.values


def test_micro_batch_sizes():
    f8 = PRESETS["f8-16384"].largest_map(224, 224)
    # On a CPU, the whole batch unless a map passes 2^31 values.
    assert micro_batch_size(128, f8, 0) == 128 and micro_batch_size(256, f8, 0) == 128
    assert [micro_batch_size(n, f8, 2) for n in (32, 64, 128, 256, 512)] == [32, 64, 64, 64, 64]
    # No divisor is near: nearly equal parts.
    assert micro_batch_size(254, f8, 2) == 64
    for batch_size in range(1, 600, 7):
        for itemsize in (0, 2, 4):
            size = micro_batch_size(batch_size, f8, itemsize)
            assert 1 <= size <= batch_size and size * f8 <= MOST_VALUES
            assert size * f8 * itemsize <= MOST_BYTES
    # An image that is too large alone is taken alone.
    assert micro_batch_size(8, 2**32, 2) == 1


def sizes_seen(discretizer, monkeypatch):
    seen = {"encode": [], "decode": []}
    for name, sizes in seen.items():
        whole = getattr(discretizer.fused, name)

        def call(batch, whole=whole, sizes=sizes):
            sizes.append(len(batch))
            return whole(batch)

        monkeypatch.setattr(discretizer.fused, name, call)
    return seen


@pytest.mark.parametrize("precision", [PrecisionConfig(), AMP], ids=["float32", "amp"])
def test_micro_batches_equal_their_images(precision, monkeypatch):
    vqgan, pixels = random_vqgan(DEMO_LIKE), torch.rand(5, 3, 16, 16)
    parts = pixels.split(2)
    alone = [VQGANDiscretizer(vqgan, precision)(part) for part in parts]
    discretizer = VQGANDiscretizer(vqgan, precision, micro_batch=2)
    seen = sizes_seen(discretizer, monkeypatch)
    images, codes = discretizer(pixels)
    assert seen == {"encode": [2, 2, 1], "decode": [2, 2, 1]}
    assert torch.equal(images, torch.cat([one.images for one in alone]))
    assert torch.equal(codes, torch.cat([one.codes for one in alone]))


def test_auto_splits_by_the_size_of_maps(monkeypatch):
    discretizer = VQGANDiscretizer(random_vqgan(DEMO_LIKE), AMP)
    values = DEMO_LIKE.largest_map(16, 16)
    monkeypatch.setattr(gpu_forms, "MOST_VALUES", 3 * values)
    seen = sizes_seen(discretizer, monkeypatch)
    discretizer(torch.rand(6, 3, 16, 16))
    assert seen == {"encode": [3, 3], "decode": [3, 3]}


# --- upsampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folded", "plain", "chosen"), [(2.0, 1.0, False), (1.0, 2.0, True), (1.0, 0.97, True)]
)
def test_the_faster_upsampling_is_chosen(folded, plain, chosen, monkeypatch):
    discretizer = VQGANDiscretizer(random_vqgan(DEMO_LIKE), AMP)
    pixels = torch.rand(2, 3, 16, 16)
    expected = discretizer(pixels)
    monkeypatch.setattr(VQGANDiscretizer, "_on_gpu", True)
    monkeypatch.setattr(discretizer_module, "upsampling_times", lambda *arguments: (folded, plain))
    (record,) = discretizer.time_forms(16, 8).values()
    assert record == (
        "folded" if chosen else "plain",
        f"folded {folded:.2f} ms, plain {plain:.2f} ms for 8 images",
    )
    assert discretizer.optimizations.upsample == chosen
    torch.testing.assert_close(discretizer(pixels).images, expected.images, atol=0.05, rtol=0)


def test_no_timing_on_a_cpu_or_without_the_saving(monkeypatch):
    vqgan = random_vqgan(DEMO_LIKE)
    assert VQGANDiscretizer(vqgan, AMP).time_forms(16, 8) == {}
    monkeypatch.setattr(VQGANDiscretizer, "_on_gpu", True)
    optimizations = replace(VQGANOptimizations(), upsample=False)
    assert VQGANDiscretizer(vqgan, AMP, optimizations=optimizations).time_forms(16, 8) == {}


def test_every_upsampling_is_timed_at_its_size(monkeypatch):
    vqgan, seen = random_vqgan(DEMO_LIKE), []

    def milliseconds(layer, terms):
        seen.append((layer.transposed, tuple(terms.x.shape), tuple(layer(terms).x.shape)))
        return 1.0

    monkeypatch.setattr(gpu_forms, "milliseconds", milliseconds)
    recipe = Recipe(VQGANOptimizations(), torch.float32)
    times = upsampling_times(vqgan.decoder, recipe, 16, 2)
    layers = DEMO_LIKE.downsample.bit_length() - 1
    assert times == (layers, layers)
    assert all(out[2:] == (2 * x[2], 2 * x[3]) for _, x, out in seen)
    assert max(out[2] for _, _, out in seen) == 16
    assert [x for folded, x, _ in seen if folded] == [x for folded, x, _ in seen if not folded]


# --- shapes of the norms --------------------------------------------------------------------------


def test_norm_maps_are_those_that_the_vqgan_passes(monkeypatch):
    """Compared with the calls of the op in an encode and decode."""
    vqgan, called = random_vqgan(F8), set()
    fused = FusedVQGAN(
        vqgan, VQGANOptimizations(norm_kernel=True), encoder=torch.float16, decoder=torch.bfloat16
    )

    def note(op, has_residual):
        def call(x, *args, silu, channel_bias):
            num_groups, eps = args[-2:]
            settings = num_groups, eps, silu, x.dtype, channel_bias is not None, has_residual
            called.add((*x.shape[1:], *settings))
            return op(x, *args, silu=silu, channel_bias=channel_bias)

        return call

    for name, has_residual in (("group_norm_silu", False), ("add_group_norm_silu", True)):
        op = getattr(fused_layers, name)
        monkeypatch.setattr(fused_layers, name, note(op, has_residual))
    codes = fused.codes(torch.rand(1, 3, 16, 16))
    fused.decode(codes)
    monkeypatch.undo()
    found = norm_maps(
        FusedVQGAN(vqgan, encoder=torch.float16, decoder=torch.bfloat16), vqgan.config, 16
    )
    assert set(map(tuple, found)) == called and len(found) == len(called)
