"""Tests of VQGAN: taming's keys, published sizes, parity with an independent implementation."""

import copy
import json
from dataclasses import asdict
from itertools import groupby

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN, VQGANConfig
from dad_fast.errors import DataError, UsageError
from dad_fast.models.weights.files import write_safetensors
from tests.numerics import assert_same_function

F8_LIKE = VQGANConfig(
    ch=32,
    ch_mult=(1, 2, 2, 4),
    num_res_blocks=2,
    attn_levels=(3,),
    z_channels=4,
    embed_dim=4,
    n_embed=64,
)
F16_LIKE = VQGANConfig(
    ch=32,
    ch_mult=(1, 1, 2, 2, 4),
    num_res_blocks=1,
    attn_levels=(4,),
    z_channels=256,
    embed_dim=256,
    n_embed=48,
)
DEMO_LIKE = VQGANConfig(
    ch=8,
    ch_mult=(1, 2, 4),
    num_res_blocks=1,
    attn_levels=(1,),
    z_channels=4,
    embed_dim=4,
    n_embed=32,
    norm_groups=4,
)


class Independent:
    """Independent float64 implementation on a state dict, without any module of the package."""

    def __init__(self, state, groups=32):
        self.p = {key: tensor.double() for key, tensor in state.items()}
        self.groups = groups

    def has(self, prefix):
        return any(key.startswith(prefix + ".") for key in self.p)

    def conv(self, x, name, **kwargs):
        return F.conv2d(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], **kwargs)

    def norm(self, x, name):
        b, c, h, w = x.shape
        grouped = x.reshape(b, min(self.groups, c), -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        scaled = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
        return scaled.reshape(b, c, h, w) * self.p[f"{name}.weight"].view(1, c, 1, 1) + self.p[
            f"{name}.bias"
        ].view(1, c, 1, 1)

    def swish_norm(self, x, name):
        y = self.norm(x, name)
        return y / (1 + torch.exp(-y))

    def block(self, x, name):
        h = self.conv(self.swish_norm(x, f"{name}.norm1"), f"{name}.conv1", padding=1)
        h = self.conv(self.swish_norm(h, f"{name}.norm2"), f"{name}.conv2", padding=1)
        return h + (self.conv(x, f"{name}.nin_shortcut") if self.has(f"{name}.nin_shortcut") else x)

    def attention(self, x, name):
        b, c, h, w = x.shape
        y = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(y, f"{name}.{part}").reshape(b, c, h * w) for part in "qkv")
        share = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / c**0.5, dim=2)
        return x + self.conv(
            torch.einsum("bij,bcj->bci", share, v).reshape(b, c, h, w), f"{name}.proj_out"
        )

    def middle(self, x, name):
        return self.block(
            self.attention(self.block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2"
        )

    def level(self, x, name):
        i = 0
        while self.has(f"{name}.block.{i}"):
            x = self.block(x, f"{name}.block.{i}")
            if self.has(f"{name}.attn.{i}"):
                x = self.attention(x, f"{name}.attn.{i}")
            i += 1
        return x

    def encode(self, pixels):
        x = self.conv(pixels.double() * 2 - 1, "encoder.conv_in", padding=1)
        i = 0
        while self.has(f"encoder.down.{i}"):
            x = self.level(x, f"encoder.down.{i}")
            if self.has(f"encoder.down.{i}.downsample"):
                padded = x.new_zeros(x.shape[0], x.shape[1], x.shape[2] + 1, x.shape[3] + 1)
                padded[:, :, :-1, :-1] = x
                x = self.conv(padded, f"encoder.down.{i}.downsample.conv", stride=2)
            i += 1
        x = self.conv(
            self.swish_norm(self.middle(x, "encoder.mid"), "encoder.norm_out"),
            "encoder.conv_out",
            padding=1,
        )
        return self.conv(x, "quant_conv")

    def decode(self, codes):
        x = self.conv(
            self.p["quantize.embedding.weight"][codes].permute(0, 3, 1, 2), "post_quant_conv"
        )
        x = self.middle(self.conv(x, "decoder.conv_in", padding=1), "decoder.mid")
        levels = [i for i in range(8) if self.has(f"decoder.up.{i}")]
        for i in reversed(levels):
            x = self.level(x, f"decoder.up.{i}")
            if self.has(f"decoder.up.{i}.upsample"):
                x = self.conv(
                    x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3),
                    f"decoder.up.{i}.upsample.conv",
                    padding=1,
                )
        x = self.conv(self.swish_norm(x, "decoder.norm_out"), "decoder.conv_out", padding=1)
        return (x.clamp(-1, 1) + 1) / 2


def random_vqgan(config, seed=0):
    """VQGAN with random tensors, biases and norms included, and a codebook around its latents."""
    torch.manual_seed(seed)
    vqgan = VQGAN(config)
    with torch.no_grad():
        for parameter in vqgan.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        # [N, D]
        latents = vqgan.encode(torch.rand(4, 3, 64, 64)).permute(0, 2, 3, 1).flatten(0, 2)
        entries = latents[torch.randint(len(latents), (config.n_embed,))]
        vqgan.codebook.copy_(entries + 0.5 * latents.std(dim=0) * torch.randn_like(entries))
    return vqgan.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [F8_LIKE, F16_LIKE, DEMO_LIKE], ids=["f8", "f16", "demo"])
def test_equals_an_independent_float64_evaluation(config):
    vqgan = random_vqgan(config)
    exact = Independent(vqgan.state_dict(), config.norm_groups)
    pixels = torch.rand(2, 3, 48, 32)
    latents, expected = vqgan.encode(pixels), exact.encode(pixels)
    assert latents.shape == (2, config.embed_dim, 48 // vqgan.downsample, 32 // vqgan.downsample)
    torch.testing.assert_close(
        latents.double(), expected, rtol=1e-4, atol=1e-4 * expected.std().item()
    )

    # [N, K]
    distances = torch.cdist(
        expected.permute(0, 2, 3, 1).reshape(-1, config.embed_dim), vqgan.codebook.double()
    )
    codes = vqgan.codes(pixels)
    assert codes.dtype == torch.int64 and len(codes.unique()) > 4
    nearest_two = distances.topk(2, largest=False).values
    # Further apart than float32's error in the latents
    clear = nearest_two[:, 1] - nearest_two[:, 0] > 1e-3 * expected.std()
    assert clear.double().mean() > 0.9
    assert torch.equal(codes.flatten()[clear], distances.argmin(dim=1)[clear])
    # And of the latents as they are, every code is exact
    own = latents.double().permute(0, 2, 3, 1).reshape(-1, config.embed_dim)
    assert torch.equal(codes.flatten(), torch.cdist(own, vqgan.codebook.double()).argmin(dim=1))

    images, expected = vqgan.decode(codes), exact.decode(codes)
    assert images.shape == pixels.shape and images.min() >= 0 and images.max() <= 1
    # Not everything is clamped
    assert ((expected > 0) & (expected < 1)).double().mean() > 0.02
    assert_same_function(images.double(), expected)


# From the architecture by hand; f16's parameters likewise.
@pytest.mark.parametrize(
    "name, encoder, decoder, millions",
    [("f8-16384", 172.0, 360.1, 67.7), ("f16-1024", 105.9, 193.4, 72.1)],
)
def test_number_of_parameters_of_published_models(name, encoder, decoder, millions):
    with torch.device("meta"):
        vqgan = VQGAN(PRESETS[name])
        with FlopCounterMode(display=False) as encoding:
            latents = vqgan.encode(torch.empty(1, 3, 224, 224))
        with FlopCounterMode(display=False) as decoding:
            vqgan.decode(torch.empty(1, *latents.shape[2:], dtype=torch.int64))
    assert encoding.get_total_flops() / 1e9 == pytest.approx(encoder, abs=0.05)
    assert decoding.get_total_flops() / 1e9 == pytest.approx(decoder, abs=0.05)
    assert sum(p.numel() for p in vqgan.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_keys_equal_those_of_taming():
    """Compare with the names of a published f8 checkpoint, by pattern."""
    with torch.device("meta"):
        keys = list(VQGAN(PRESETS["f8-16384"]).state_dict())
    modules = {key.rpartition(".")[0] for key in keys}
    block = {f"{part}{i}" for part in ("norm", "conv") for i in (1, 2)}
    attention = {"norm", "q", "k", "v", "proj_out"}
    expected = {"quantize.embedding", "quant_conv", "post_quant_conv"}
    for half, levels, count, move in (
        ("encoder", "down", 2, "downsample"),
        ("decoder", "up", 3, "upsample"),
    ):
        expected |= {f"{half}.{name}" for name in ("conv_in", "norm_out", "conv_out")}
        expected |= {f"{half}.mid.{b}.{part}" for b in ("block_1", "block_2") for part in block}
        expected |= {f"{half}.mid.attn_1.{part}" for part in attention}
        expected |= {
            f"{half}.{levels}.{i}.block.{j}.{part}"
            for i in range(4)
            for j in range(count)
            for part in block
        }
        expected |= {
            f"{half}.{levels}.3.attn.{j}.{part}" for j in range(count) for part in attention
        }
        expected |= {
            f"{half}.{levels}.{i}.{move}.conv"
            for i in (range(3) if move == "downsample" else range(1, 4))
        }
    # a 1x1 convolution where the width changes: 128 -> 256 and 256 -> 512 down, 512 -> 256 and 256
    # -> 128 up
    expected |= {
        f"{name}.block.0.nin_shortcut"
        for name in ("encoder.down.1", "encoder.down.3", "decoder.up.2", "decoder.up.0")
    }
    assert modules == expected
    assert {key.rpartition(".")[2] for key in keys} == {"weight", "bias"}
    order = [name for name, _ in groupby(key.split(".")[0] for key in keys)]
    assert order == ["encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"]


def test_lightning_checkpoint(tmp_path):
    """Load {"state_dict": …} with the discriminator's weights; the config comes from the shapes."""
    vqgan = random_vqgan(F8_LIKE)
    training = {
        "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "loss.perceptual_loss.lin0.weight": torch.ones(1),
    }
    state = vqgan.state_dict() | training
    torch.save(
        {"epoch": 3, "global_step": 7, "state_dict": state, "optimizer_states": [{"state": {}}]},
        tmp_path / "last.ckpt",
    )
    loaded, seen = VQGAN.load_with_provenance(tmp_path / "last.ckpt")
    assert asdict(loaded.config) == asdict(F8_LIKE) and seen == "not recorded in the weights"
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), vqgan.state_dict().values(), strict=True)
    )
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.codes(pixels), vqgan.codes(pixels))


@pytest.mark.parametrize("name", PRESETS)
def test_config_is_inferred_from_shapes(name, tmp_path):
    from dad_fast.discretizers.vqgan.config import infer_config

    with torch.device("meta"):
        assert infer_config(VQGAN(PRESETS[name]).state_dict(), "x") == PRESETS[name]


def test_saved_file_loads(tmp_path):
    vqgan = random_vqgan(DEMO_LIKE)
    vqgan.save(tmp_path / "own.safetensors", seen="nothing but noise")
    loaded, seen = VQGAN.load_with_provenance(tmp_path / "own.safetensors")
    assert loaded.config == DEMO_LIKE and seen == "nothing but noise"
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.decode(loaded.codes(pixels)), vqgan.decode(vqgan.codes(pixels)))


def test_half_precision_weights_become_float32(tmp_path):
    vqgan = random_vqgan(DEMO_LIKE)
    write_safetensors(
        tmp_path / "half.safetensors",
        vqgan.half().state_dict(),
        {"dad_fast.vqgan": json.dumps(asdict(DEMO_LIKE))},
    )
    assert {p.dtype for p in VQGAN.load(tmp_path / "half.safetensors").parameters()} == {
        torch.float32
    }


def broken(state, metadata, how):
    match how:
        case "not a VQGAN":
            return {"fc.weight": torch.zeros(2, 2)}, {}
        case "Gumbel":
            return state | {"quantize.embed.weight": state["quantize.embedding.weight"]}, {}
        case "missing encoder.mid.attn_1.q.bias":
            return {k: v for k, v in state.items() if k != "encoder.mid.attn_1.q.bias"}, {}
        case "unexpected extra":
            return state | {"extra": torch.zeros(1)}, {}
        case "quant_conv.weight is":
            return state | {"quant_conv.weight": torch.zeros(4, 5, 1, 1)}, {}
        case "JSON":
            return state, {"dad_fast.vqgan": "]"}
        case "unknown VQGAN setting 'depth'":
            return state, {"dad_fast.vqgan": '{"depth": 3}'}
        case "no VQGAN can be made":
            return state, {"dad_fast.vqgan": '{"ch": 7, "norm_groups": 4}'}


@pytest.mark.parametrize(
    "how",
    [
        "not a VQGAN",
        "Gumbel",
        "missing encoder.mid.attn_1.q.bias",
        "unexpected extra",
        "quant_conv.weight is",
        "JSON",
        "unknown VQGAN setting 'depth'",
        "no VQGAN can be made",
    ],
)
def test_other_weights_are_refused(tmp_path, how):
    path = tmp_path / "other.safetensors"
    write_safetensors(path, *broken(random_vqgan(F8_LIKE).state_dict(), {}, how))
    with pytest.raises(DataError, match=how) as error:
        VQGAN.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_lookup_ignores_autocast():
    vqgan = random_vqgan(F8_LIKE)
    latents = vqgan.encode(torch.rand(2, 3, 32, 32))
    exact = torch.cdist(
        latents.double().permute(0, 2, 3, 1).reshape(-1, 4), vqgan.codebook.double()
    ).argmin(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vqgan.lookup(latents).flatten(), exact)
        # Autocast was on
        assert vqgan.encode(torch.rand(1, 3, 32, 32)).dtype == torch.bfloat16


def test_a_frozen_codebook_is_prepared_once():
    vqgan = random_vqgan(F8_LIKE).requires_grad_(False)
    first = vqgan.search()
    vqgan.lookup(torch.randn(1, 4, 3, 3))
    assert vqgan.search() is first
    training = random_vqgan(F8_LIKE).requires_grad_(True)
    training.lookup(torch.randn(1, 4, 3, 3))
    assert training._search is None


CHANGES = {
    "in place": lambda vqgan, new: vqgan.codebook.copy_(new),
    "one entry": lambda vqgan, new: vqgan.codebook[3].copy_(new[3]),
    "through .data": lambda vqgan, new: vqgan.codebook.data.copy_(new),
    "a new tensor": lambda vqgan, new: setattr(
        vqgan.quantize.embedding.weight, "data", new.clone()
    ),
    "a new parameter": lambda vqgan, new: setattr(
        vqgan.quantize.embedding, "weight", torch.nn.Parameter(new, requires_grad=False)
    ),
    "load_state_dict": lambda vqgan, new: vqgan.load_state_dict(
        vqgan.state_dict() | {"quantize.embedding.weight": new}
    ),
    "assigned": lambda vqgan, new: vqgan.load_state_dict(
        vqgan.state_dict() | {"quantize.embedding.weight": new}, assign=True
    ),
    "half and back": lambda vqgan, new: vqgan.bfloat16().float(),
    "trained and frozen again": lambda vqgan, new: train_codebook(vqgan),
    "under inference mode": lambda vqgan, new: under_inference_mode(vqgan, new),
}


def train_codebook(vqgan):
    vqgan.requires_grad_(True)
    optimizer = torch.optim.SGD([vqgan.codebook], lr=10.0)
    with torch.enable_grad():
        vqgan.codebook.square().sum().backward()
    optimizer.step()
    vqgan.requires_grad_(False)


def under_inference_mode(vqgan, new):
    with torch.inference_mode():
        vqgan.codebook.copy_(new)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_lookup_follows_the_codebook(change):
    vqgan = random_vqgan(F8_LIKE).requires_grad_(False)
    latents = torch.randn(2, 4, 30, 30) * vqgan.codebook.std()
    vqgan.lookup(latents)
    change(vqgan, torch.randn(64, 4) * vqgan.codebook.std())
    exact = torch.cdist(
        latents.double().permute(0, 2, 3, 1).reshape(-1, 4), vqgan.codebook.double()
    ).argmin(dim=1)
    assert torch.equal(vqgan.lookup(latents).flatten(), exact)


def test_a_copy_has_its_own_search():
    vqgan = random_vqgan(F8_LIKE).requires_grad_(False)
    latents = torch.randn(2, 4, 9, 9)
    codes = vqgan.lookup(latents)
    other = copy.deepcopy(vqgan)
    vqgan.codebook.zero_()
    assert torch.equal(other.lookup(latents), codes) and vqgan.lookup(latents).eq(0).all()
    assert set(other.state_dict()) == set(vqgan.state_dict())


def test_non_finite_latents_are_counted():
    vqgan = random_vqgan(F8_LIKE).requires_grad_(False)
    latents = torch.randn(2, 4, 9, 9)
    latents[0, 1, 2, 3] = torch.nan
    assert vqgan.lookup(latents)[0, 2, 3] == 0 and vqgan.search().num_nonfinite == 1


def test_indivisible_image_sides_are_refused():
    with pytest.raises(UsageError, match="--img-size that is a multiple of 4"):
        random_vqgan(DEMO_LIKE).codes(torch.rand(1, 3, 30, 28))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [F8_LIKE, F16_LIKE], ids=["f8", "f16"])
def test_cuda_equals_the_float64_evaluation(config):
    vqgan = random_vqgan(config).cuda()
    exact = Independent(vqgan.state_dict(), config.norm_groups)
    pixels = torch.rand(2, 3, 64, 64, device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        latents, codes = vqgan.encode(pixels), vqgan.codes(pixels)
        images = vqgan.decode(codes)
    expected = exact.encode(pixels)
    torch.testing.assert_close(
        latents.double(), expected, rtol=1e-3, atol=1e-3 * expected.std().item()
    )
    mine = latents.double().permute(0, 2, 3, 1).reshape(-1, config.embed_dim)
    assert torch.equal(codes.flatten(), torch.cdist(mine, vqgan.codebook.double()).argmin(dim=1))
    torch.testing.assert_close(images.double(), exact.decode(codes), rtol=0, atol=1e-3)
