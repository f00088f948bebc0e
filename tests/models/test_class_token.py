"""Tests of the last block for the class token alone: parity, and unsupported models."""

import copy

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
import torch.nn.functional as F

from dad_fast.models.optimizations import keep_class_token_only
from tests.numerics import assert_same_function

TINY = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 8,
    "img_size": 32,
    "num_classes": 5,
}
TIMM = {
    "plain": {},
    "drop path": {"drop_path_rate": 0.5},
    "layer scale": {"init_values": 0.3},
    "qk norm": {"qk_norm": True},
    "registers": {"reg_tokens": 3},
    "no qkv bias": {"qkv_bias": False},
    "scaled norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": "layernorm"},
    "rms norm": {"norm_layer": "rmsnorm"},
    "norm after pooling": {"fc_norm": True},
    "swiglu": {"mlp_layer": timm.layers.SwiGLUPacked},
    "patch dropout": {"patch_drop_rate": 0.25},
    "gated": {"gated": True},
}
CLIP = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.2},
    "norm after pooling": {"final_ln_after_pool": True},
    "qk norm": {"qk_norm": True},
    "normformer": {
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
    },
    "patch dropout": {"patch_dropout": 0.25},
}


def vit(gated=False, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **(TINY | kwargs))
    if gated:  # as a few of timm's models build their attention
        for block in model.blocks:
            block.attn = timm.layers.Attention(32, 4, qkv_bias=True, gated=True)
    # Nothing at 0 or 1, where a mistake would not show
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def tower(**kwargs):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.transformer.VisionTransformer(32, 8, 32, 3, 4, 4.0, output_dim=6, **kwargs)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def saved(model):
    other = copy.deepcopy(model)
    assert keep_class_token_only(other) == ""
    return other


def run(model, x, weights, training):
    """Return logits, gradient of the input, gradients of the weights."""
    model.train(training)
    x = x.clone().requires_grad_(True)
    torch.manual_seed(7)  # drop path and patch dropout draw the same
    logits = model(x)
    wanted = [x, *(p for p in model.parameters() if weights and p.requires_grad)]
    g = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).view_as(logits).to(logits.dtype)
    return logits.detach(), *torch.autograd.grad(logits, wanted, g)


def images(dtype=torch.float64, batch=6):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make, kwargs",
    [(vit, k) for k in TIMM.values()] + [(tower, k) for k in CLIP.values()],
    ids=[*TIMM, *CLIP],
)
def test_logits_and_gradients_equal_those_of_the_full_block(make, kwargs, training):
    plain = make(**kwargs).double()
    whole = run(plain, images(), True, training)
    # Some gradients are 0 (the bias of a key's norm), up to rounding
    size = max(a.abs().max().item() for a in whole)
    for a, b in zip(whole, run(saved(plain), images(), True, training), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13 * size)


@pytest.mark.parametrize("make", [vit, tower])
def test_frozen_weights_get_no_gradient_and_the_input_does(make):
    plain = make().double().requires_grad_(False).eval()
    other = saved(plain)
    for a, b in zip(
        run(plain, images(), False, False), run(other, images(), False, False), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():  # open_clip's blocks take another path without gradients
        torch.testing.assert_close(plain(images()), other(images()), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make", [vit, tower])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_error_is_at_most_twice_that_of_the_full_block(make, dtype):
    exact_model = make().double()

    def results(model):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return run(model.float(), images(torch.float32, 32), True, True)

    exact = run(exact_model, images(torch.float32, 32).double(), True, True)
    plain, other = results(copy.deepcopy(exact_model)), results(saved(exact_model))
    for e, p, o in zip(exact, plain, other, strict=True):
        error_plain, error_saved = ((r.double() - e).norm() for r in (p, o))
        assert error_saved <= 2 * error_plain + 1e-6 * e.norm()


@pytest.mark.parametrize("make", [vit, tower])
def test_keeps_names_and_shapes_and_can_be_copied(make):
    plain = make()
    other = saved(plain)
    assert list(plain.state_dict()) == list(other.state_dict())
    again = copy.deepcopy(other)  # as the EMA does
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again.eval()(images(torch.float32)), other.eval()(images(torch.float32)))
    # Applying it twice changes nothing
    assert keep_class_token_only(again) == "" and type(again) is type(plain)


def test_works_with_gradient_checkpointing():
    plain = vit().double()
    other = saved(plain)
    other.set_grad_checkpointing(True)
    for a, b in zip(
        run(plain, images(), True, True), run(other, images(), True, True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_works_with_torch_compile():
    plain = vit().double()
    whole = torch.compile(saved(plain), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(images()), plain(images()), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "global_pool='avg'"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "global_pool='map'"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "pools more"),
        ("vit_tiny_patch16_224", {"proj_drop_rate": 0.1}, "dropout"),
        ("vit_tiny_patch16_224", {"attn_drop_rate": 0.1}, "dropout"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "DiffAttention"),
        (
            "vit_tiny_patch16_224",
            {"block_fn": timm.models.vision_transformer.ParallelThingsBlock},
            "ParallelThingsBlock",
        ),
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
    ],
)
def test_unsupported_models_are_refused_and_unchanged(name, kwargs, words):
    model = timm.create_model(name, **(TINY | kwargs)).eval()
    before, classes = model(images(torch.float32)), [type(m) for m in model.modules()]
    assert words in keep_class_token_only(model)
    assert torch.equal(model(images(torch.float32)), before)
    assert classes == [type(m) for m in model.modules()]


def test_other_networks_and_towers_are_refused():
    assert "ResNet" in keep_class_token_only(timm.create_model("resnet18"))
    assert "pool_type='avg'" in keep_class_token_only(tower(pool_type="avg"))
    assert "tokens too" in keep_class_token_only(tower(output_tokens=True))
    assert "pools more" in keep_class_token_only(tower(attentional_pool=True, attn_pooler_heads=2))


def test_open_clip_tower_around_a_timm_model():
    timm_model = pytest.importorskip("open_clip.timm_model")
    torch.manual_seed(0)
    model = timm_model.TimmModel("vit_tiny_patch16_224", 8, 224, pool="token").eval()
    x = torch.rand(1, 3, 224, 224)
    assert_same_function(saved(model)(x), model(x))
    assert "global_pool='avg'" in keep_class_token_only(
        timm_model.TimmModel("vit_tiny_patch16_224", 8, 224, pool="avg")
    )


@pytest.mark.slow  # counts on large models
def test_needs_fewer_flop():
    """A training step of ViT-B/16 needs 7 % fewer FLOP."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for change in (False, True):
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224")
        assert not change or keep_class_token_only(model) == ""
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(
                model(torch.empty(2, 3, 224, 224, device="meta")),
                torch.empty(2, dtype=torch.long, device="meta"),
            ).backward()
        counts.append(counter.get_total_flops() / 2)
    plain, class_token_only = counts
    assert plain == pytest.approx(105.2e9, rel=0.01)
    assert 1 - class_token_only / plain == pytest.approx(0.07, abs=0.005)
