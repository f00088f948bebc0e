"""Tests of nn.MultiheadAttention on batch-first tokens: parity, bytes, and unsupported modules."""

import copy

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dad_fast.models.batch_first_attention import BatchFirstAttention, use_batch_first_attention
from dad_fast.models.optimizations import keep_class_token_only
from tests.models.test_class_token import images, run, tower

TOWERS = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.2},
    "attention pool": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3},
    "coca": {
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 3,
        "output_tokens": True,
    },
    "mean pool": {"pool_type": "avg"},
    "patch dropout": {"patch_dropout": 0.25},
}


class Pooled(nn.Module):
    """A vision tower without its second output, as `clip_teacher.ImageTower`."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def forward(self, x):
        found = self.visual(x)
        return found[0] if isinstance(found, tuple) else found


def optimized(model):
    other = copy.deepcopy(model)
    assert use_batch_first_attention(other) == ""
    return other


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kwargs", TOWERS.values(), ids=TOWERS)
def test_features_and_gradients_equal_those_of_the_plain_tower(kwargs, frozen):
    plain = Pooled(tower(**kwargs)).double().requires_grad_(not frozen)
    expected = run(plain, images(), not frozen, False)
    size = max(a.abs().max().item() for a in expected)
    for a, b in zip(expected, run(optimized(plain), images(), not frozen, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14 * size)


def test_without_gradients_too():
    """PyTorch's module takes another path there."""
    plain = tower().double().eval().requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(images()), optimized(plain)(images()), rtol=1e-12, atol=1e-13
        )


def test_last_block_for_the_class_token_in_either_order():
    plain = tower().double()
    for first, second in (
        (use_batch_first_attention, keep_class_token_only),
        (keep_class_token_only, use_batch_first_attention),
    ):
        other = copy.deepcopy(plain)
        assert first(other) == second(other) == ""
        for a, b in zip(
            run(plain, images(), False, False), run(other, images(), False, False), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def module(**kwargs):
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, **({"batch_first": True} | kwargs)).eval()


def tokens(n=5, width=8, seed=1):
    return torch.randn(3, n, width, generator=torch.Generator().manual_seed(seed))


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"need_weights": True, "average_attn_weights": False},
        {"need_weights": False, "attn_mask": CAUSAL},
        {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True},
        {"need_weights": False, "key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
    ],
)
def test_masks_and_weights_are_the_plain_modules(kwargs):
    plain = module()
    other, x = optimized(plain), tokens()
    for a, b in zip(plain(x, x, x, **kwargs), other(x, x, x, **kwargs), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_unbatched_tokens_are_the_plain_modules():
    plain, x = module(), tokens()[0]
    found = optimized(plain)(x, x, x, need_weights=False)[0]
    assert torch.equal(found, plain(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}], ids=["one width", "three widths"])
def test_queries_of_other_tokens(widths, bias):
    plain = module(bias=bias, **widths).double()
    query, key = tokens(2).double(), tokens(5, widths.get("kdim", 8), 2).double()
    value = tokens(5, widths.get("vdim", 8), 3).double()
    torch.testing.assert_close(
        optimized(plain)(query, key, value, need_weights=False)[0],
        plain(query, key, value, need_weights=False)[0],
        rtol=1e-12,
        atol=1e-14,
    )


class Derived(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: nn.Linear(3, 3), "no nn.MultiheadAttention"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), "no nn.MultiheadAttention"),
        (lambda: module(batch_first=False), "layout"),
        (lambda: module(dropout=0.1), "dropout"),
        (lambda: module(add_bias_kv=True), "more keys"),
        (lambda: module(add_zero_attn=True), "more keys"),
        (lambda: Derived(8, 2, batch_first=True), "Derived"),
    ],
)
def test_unsupported_modules_are_refused_and_unchanged(make, words):
    model = nn.Sequential(make())
    before = [type(m) for m in model.modules()]
    assert words in use_batch_first_attention(model)
    assert before == [type(m) for m in model.modules()]


def test_one_unsupported_module_leaves_all_unchanged():
    model = nn.Sequential(module(), module(dropout=0.1))
    assert "dropout" in use_batch_first_attention(model)
    assert not any(isinstance(m, BatchFirstAttention) for m in model.modules())


def test_keeps_names_and_values_and_can_be_copied():
    plain = tower()
    other = optimized(plain)
    for (name, a), (other_name, b) in zip(
        plain.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(a, b)
    again = copy.deepcopy(other)
    assert use_batch_first_attention(again) == ""
    assert torch.equal(again(images(torch.float32)), other(images(torch.float32)))


@pytest.mark.slow
def test_compiles_as_one_graph():
    plain = tower().double().eval()
    compiled = torch.compile(optimized(plain), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), plain(images()), rtol=1e-11, atol=1e-12)


# --- work -----------------------------------------------------------------------------------------


class Bytes(TorchDispatchMode):
    """Count bytes read and written by operations, without views and allocations, and bmm calls."""

    def __init__(self):
        super().__init__()
        self.total = self.products_in_turn = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not views and "empty" not in str(function) and "_unsafe_view" not in str(function):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.total += sum(
                min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors if t.numel()
            )
            self.products_in_turn += "bmm" in str(function)
        return result


def input_gradient(model, x):
    # torch's FLOP counter fails if a module's input is a leaf, hence the product.
    x = x.clone().requires_grad_(True) * 1.0
    return torch.autograd.grad(model(x).sum(), x)


def work(model):
    """Return bytes, FLOP and batched products of the gradient of the input."""
    model.eval().requires_grad_(False)
    x = torch.rand(2, 3, 64, 64)
    with Bytes() as counter:
        input_gradient(model, x)
    with FlopCounterMode(display=False) as flops:
        input_gradient(model, x)
    return counter.total, flops.get_total_flops(), counter.products_in_turn


def test_input_gradient_costs_no_more_than_that_of_timms_tower():
    """With frozen weights, PyTorch's module costs a matrix product per position and more bytes."""
    open_clip = pytest.importorskip("open_clip")
    plain = open_clip.transformer.VisionTransformer(64, 8, 128, 4, 2, 4.0, output_dim=16)
    same = timm.create_model(
        "vit_base_patch16_clip_224",
        img_size=64,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=2,
        num_classes=16,
    )
    before, flops_before, in_turn_before = work(plain)
    after, flops_after, in_turn = work(optimized(plain))
    of_timm, flops_timm, in_turn_timm = work(same)
    assert in_turn_before > 0 and in_turn == in_turn_timm == 0
    assert after < 0.75 * before and after <= 1.01 * of_timm
    assert flops_after == flops_before == pytest.approx(flops_timm, rel=0.001)
    for model in (optimized(plain), same):
        assert keep_class_token_only(model) == ""
        fewer, _, in_turn = work(model)
        assert fewer < after and in_turn == 0
