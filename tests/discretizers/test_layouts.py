"""VQGANs of diffusers and LlamaGen equal taming's on the same weights; other files are one line."""

import json
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import save_file
from torch.nn import functional as F

from dad_fast.config.schema import PrecisionConfig
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.discretizers.vqgan.config import OTHER_LAYOUTS, VQGANConfig
from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.layouts import to_taming
from dad_fast.discretizers.vqgan.model import VQGAN
from dad_fast.errors import DataError, UsageError
from dad_fast.kernels.nearest_code.reference import search_reference
from tests.numerics import assert_same_function

CONFIG = VQGANConfig(
    ch=32,
    ch_mult=(1, 2, 2),
    num_res_blocks=2,
    attn_levels=(2,),
    z_channels=6,
    embed_dim=4,
    n_embed=48,
)
TOP = len(CONFIG.ch_mult) - 1
DESCRIBED = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 6,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "num_vq_embeddings": 48,
    "vq_embed_dim": 4,
}


@pytest.fixture(scope="module")
def taming():
    """A random VQGAN whose codes differ, and its state dict."""
    torch.manual_seed(0)
    vqgan = VQGAN(CONFIG).eval().requires_grad_(False)
    for parameter in vqgan.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    vqgan.codebook.normal_(std=0.3)
    return vqgan


def layer_name(key, names):
    """Return the name of a layer inside a block in another layout."""
    head, _, tail = key.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{names.get(layer, layer)}.{tail}"


def as_diffusers(state):
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}
    renamed = {}
    for key, value in state.items():
        if ".attn" in key:
            key = layer_name(key, {**attention, "proj_out": "to_out.0"})
            if value.ndim == 4:
                value = value[:, :, 0, 0]
        key = key.replace("nin_shortcut", "conv_shortcut")
        key = key.replace("norm_out", "conv_norm_out")
        for i, name in enumerate(("block_1", "block_2")):
            key = key.replace(f"mid.{name}", f"mid_block.resnets.{i}")
        key = key.replace("mid.attn_1", "mid_block.attentions.0")
        if found := re.match(r"(encoder|decoder)\.(down|up)\.(\d)\.(\w+)\.(.*)", key):
            half, way, level, kind, rest = found.groups()
            number = int(level) if way == "down" else TOP - int(level)
            kind = {
                "block": "resnets",
                "attn": "attentions",
                "downsample": "downsamplers.0",
                "upsample": "upsamplers.0",
            }[kind]
            key = f"{half}.{way}_blocks.{number}.{kind}.{rest}"
        renamed[key] = value.contiguous()
    assert len(renamed) == len(state)
    return renamed


def as_llamagen(state):
    renamed = {}
    for key, value in state.items():
        for i, name in enumerate(("block_1", "attn_1", "block_2")):
            key = key.replace(f".mid.{name}.", f".mid.{i}.")
        if found := re.match(r"(encoder|decoder)\.(down|up)\.(\d)\.(.*)", key):
            half, way, level, rest = found.groups()
            number = int(level) if way == "down" else TOP - int(level)
            key = f"{half}.conv_blocks.{number}.{rest}".replace(".block.", ".res.")
        renamed[key] = value
    return renamed


@pytest.fixture
def folder(taming, tmp_path):
    save_file(as_diffusers(taming.state_dict()), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DESCRIBED))
    return tmp_path


def load(path):
    return load_discretizer(str(path), PrecisionConfig(), torch.device("cpu"))


def assert_equals(found, vqgan, pixels):
    images, codes = found(pixels)
    assert torch.equal(codes, vqgan.codes(pixels)) and len(codes.unique()) > 5
    assert torch.equal(images, vqgan.decode(codes))


def test_diffusers_folder_equals_taming_on_the_same_weights(taming, folder):
    pixels = torch.rand(2, 3, 24, 16)
    found = load(folder)
    assert found.vqgan.config == CONFIG
    assert found.fingerprint() == load_taming(taming, folder).fingerprint()
    assert_equals(found, taming, pixels)
    assert_equals(load(folder / "diffusion_pytorch_model.safetensors"), taming, pixels)


def load_taming(vqgan, folder):
    torch.save({"state_dict": vqgan.state_dict()}, folder / "taming.ckpt")
    return load(folder / "taming.ckpt")


def test_diffusers_file_without_config_takes_its_shapes(taming, folder):
    (folder / "config.json").unlink()
    assert_equals(load(folder), taming, torch.rand(1, 3, 16, 16))


def test_names_of_attention_before_diffusers_0_15(taming):
    old = {"to_q": "query", "to_k": "key", "to_v": "value"}
    state = {}
    for key, value in as_diffusers(taming.state_dict()).items():
        renamed = key.replace("to_out.0", "proj_attn")
        state[layer_name(renamed, old) if ".attentions." in key else key] = value
    found, config = to_taming(state, "old.bin")
    assert config == CONFIG
    assert all(torch.equal(found[key], value) for key, value in taming.state_dict().items())


def test_middle_without_attention(taming, folder):
    """Without and with config.json, as aMUSEd's; the fused form is the same function."""
    state = {k: v for k, v in as_diffusers(taming.state_dict()).items() if "mid_block.att" not in k}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(DataError, match="missing encoder.mid.attn_1"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**DESCRIBED, "mid_block_add_attention": False}))
    described = load(folder)
    (folder / "config.json").unlink()
    pixels = torch.rand(1, 3, 16, 16)
    assert described.vqgan.encoder.mid.attn_1 is None
    assert_equals(load(folder), described.vqgan, pixels)
    fused = FusedVQGAN(described.vqgan)
    assert_same_function(fused.encode(pixels), described.vqgan.encode(pixels))


def test_norm_groups_come_from_config_json(taming, folder):
    (folder / "config.json").write_text(json.dumps({**DESCRIBED, "norm_num_groups": 8}))
    found = load(folder).vqgan
    assert found.config.norm_groups == 8 and found.encoder.norm_out.num_groups == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "describes a AutoencoderKL, not a VQModel"),
        ({"norm_type": "spatial"}, "norm_type is spatial; only a VQModel with group"),
        ({"mid_block_add_attention": False}, r"unexpected \w+\.mid\.attn_1"),
        ({"mid_block_add_attention": 3}, "no possible VQModel .mid_attention is 3"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "has a DownBlock2D; only"),
        ({"block_out_channels": [32, 48, 64]}, "no multiples of their first"),
        ({"num_vq_embeddings": 49}, "quantize.embedding.weight is .48, 4., not .49, 4."),
        ({"layers_per_block": 1}, r"weights of another architecture: unexpected decoder.up"),
        ({"latent_channels": -1}, "no possible VQModel .z_channels is -1"),
        ({"block_out_channels": []}, "no possible VQModel"),
        ({"in_channels": "3"}, "no possible VQModel"),
    ],
)
def test_config_json_that_does_not_fit_is_one_line(folder, change, message):
    (folder / "config.json").write_text(json.dumps({**DESCRIBED, **change}))
    with pytest.raises(DataError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_damaged_config_json_is_one_line(folder):
    for text in ("{", "[1]", "{}", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"config\.json"):
            load(folder)


def test_folder_of_a_pipeline_names_the_right_one(folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    (pipeline / "vqvae").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no diffusers VQModel; name its folder .*vqvae"):
        load(pipeline)
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "nowhere")


def test_llamagen_layout_searches_unit_codes_exactly(taming, tmp_path):
    """Codes are those of the fp64 search among latents and codes of length 1, as float32 has them."""
    state = {**as_llamagen(taming.state_dict()), "quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": state, "steps": 3}, tmp_path / "vq_ds4.pt")
    found = load(tmp_path / "vq_ds4.pt")
    assert found.vqgan.config.quantizer == "unit"
    torch.testing.assert_close(found.codebook.norm(dim=1), torch.ones(48))
    pixels = torch.rand(3, 3, 24, 16)
    images, codes = found(pixels)
    latents = F.normalize(taming.encode(pixels), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    codebook = F.normalize(taming.codebook, dim=1)
    assert torch.equal(codes.flatten(), search_reference(latents, codebook))
    assert not torch.equal(codes, taming.codes(pixels))
    quantized = codebook[codes].permute(0, 3, 1, 2)
    decoded = taming.decoder(taming.post_quant_conv(quantized))
    assert torch.equal(images, (decoded.clamp(-1, 1) + 1) / 2)


def test_unit_search_of_8_dimensions_is_exact_also_near_ties():
    torch.manual_seed(1)
    config = VQGANConfig(
        ch=4, ch_mult=(1, 1), num_res_blocks=1, attn_levels=(), z_channels=4, embed_dim=8,
        n_embed=16384, quantizer="unit", norm_groups=2,
    )  # fmt: skip
    vqgan = VQGAN(config).eval().requires_grad_(False)
    vqgan.codebook.copy_(F.normalize(torch.randn(16384, 8), dim=1))
    vqgan.codebook[7] = vqgan.codebook[1500]
    between = vqgan.codebook[:150] + vqgan.codebook[150:300]
    rows = torch.cat([torch.randn(100, 8) * 9, between, vqgan.codebook[1500:1501] * 5])
    latents = rows.T.reshape(1, 8, 1, -1).contiguous()
    codes = vqgan.lookup(latents).flatten()
    searched = F.normalize(latents, dim=1)[0, :, 0].T
    assert torch.equal(codes, search_reference(searched, vqgan.codebook))
    assert codes[-1] == 7


def test_saved_unit_codes_load_unchanged(taming, tmp_path):
    torch.save({"model": as_llamagen(taming.state_dict())}, tmp_path / "vq.pt")
    found = load(tmp_path / "vq.pt")
    found.vqgan.save(tmp_path / "own.safetensors", seen="x")
    again = load(tmp_path / "own.safetensors")
    assert again.vqgan.config == found.vqgan.config and again.fingerprint() == found.fingerprint()


def test_published_configurations_of_other_layouts():
    sizes = {"llamagen-f8": 70, "llamagen-f16": 72, "ldm-f4-8192": 55, "amused-f16-8192": 146}
    for name, millions in sizes.items():
        with torch.device("meta"):
            vqgan = VQGAN(OTHER_LAYOUTS[name])
        count = sum(p.numel() for p in vqgan.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=1), name


def test_weights_for_grey_images_are_refused(tmp_path):
    config = VQGANConfig(
        in_channels=1, ch=4, ch_mult=(1, 1), num_res_blocks=1, attn_levels=(), n_embed=8,
        norm_groups=2,
    )  # fmt: skip
    VQGAN(config).save(tmp_path / "grey.safetensors", seen="x")
    with pytest.raises(DataError, match="images of 1 channel; --discretizer needs one for RGB"):
        load(tmp_path / "grey.safetensors")


def test_two_entries_of_one_name_are_refused(taming):
    state = as_diffusers(taming.state_dict())
    state["encoder.down.0.block.0.conv1.weight"] = torch.zeros(1)
    with pytest.raises(DataError, match="encoder.down.0.block.0.conv1.weight is no layer"):
        to_taming(state, "x.bin")
