"""`group_norm_silu`: the op and its Triton kernels compared with float64 and with torch's norm.

Triton chooses the interpreter when imported, so that tests of kernels run in a separate process.
"""

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F

from dad_fast.kernels.group_norm_silu import (
    add_group_norm_silu,
    group_norm_silu,
    nhwc_group_norm,
    reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, C, H, W, groups.
SHAPES = [
    (2, 64, 8, 4, 8),
    (1, 24, 5, 7, 4),
    (2, 1, 1, 1, 1),
    (1, 96, 9, 5, 3),
    (1, 128, 4, 8, 16),
]
EVERY_SHAPE_AND_DTYPE = [(shape, torch.float32) for shape in SHAPES]
# One shape of even sizes, and one of odd sizes.
EVERY_SHAPE_AND_DTYPE += [(shape, dtype) for dtype in DTYPES[1:] for shape in SHAPES[:2]]
# Small, so that small maps have several chunks and strips.
META = {"rows": 8, "columns": 64, "tiles": 2, "num_warps": 4}


def inputs(shape, dtype=torch.float32, mean=0.0):
    *shape, num_groups = shape
    x, residual = torch.randn(shape) + mean, torch.randn(shape)
    weight, bias, channel_bias = torch.randn(3, shape[1])
    return x.to(dtype), residual.to(dtype), weight, bias, num_groups, channel_bias


def launch(x, residual, weight, bias, num_groups, channel_bias, silu=True, eps=1e-6, meta=META):
    from dad_fast.kernels.group_norm_silu_triton import launch

    return launch(x, residual, weight, bias, num_groups, eps, silu, channel_bias, meta)


def added(x, residual, channel_bias):
    total = (
        x.double() if channel_bias is None else x.double() + channel_bias.double().view(1, -1, 1, 1)
    )
    return total if residual is None else total + residual.double()


def step(dtype):
    """Return the spacing of `dtype` at 1, doubled for bfloat16, which the interpreter truncates."""
    return torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 else 1)


def assert_close_enough(y, total, weight, bias, num_groups, silu, eps=1e-6):
    """Assert at most twice the error of torch's norm in `y`'s dtype, or one ulp."""
    exact = reference(total.double(), weight, bias, num_groups, eps, silu, torch.float64)
    plain = F.group_norm(
        total.to(y.dtype).contiguous(), num_groups, weight.to(y.dtype), bias.to(y.dtype), eps
    )
    plain = F.silu(plain) if silu else plain
    error, allowed = (y.double() - exact).abs(), (plain.double() - exact).abs().max()
    assert (error <= 2 * allowed + step(y.dtype) * (1 + exact.abs())).all(), (error.max(), allowed)


@pytest.mark.interpreter
@pytest.mark.parametrize(("shape", "dtype"), EVERY_SHAPE_AND_DTYPE)
def test_kernel_of_a_branch(shape, dtype):
    """With and without a channel bias; no residual."""
    x, _, weight, bias, num_groups, channel_bias = inputs(shape, dtype)
    for before, silu in ((channel_bias, True), (None, False)):
        y, _ = launch(x, None, weight, bias, num_groups, before, silu)
        assert y.dtype == dtype and y.shape == x.shape and y.permute(0, 2, 3, 1).is_contiguous()
        assert_close_enough(y, added(x, None, before), weight, bias, num_groups, silu)


@pytest.mark.interpreter
@pytest.mark.parametrize(("shape", "dtype"), EVERY_SHAPE_AND_DTYPE)
def test_kernel_with_a_residual(shape, dtype):
    args = inputs(shape, dtype)
    x, residual, weight, bias, num_groups, channel_bias = args
    before = [tensor.clone() for tensor in (x, residual)]
    y, total = launch(*args)
    exact = added(x, residual, channel_bias)
    rounded_in_float32 = 1e-6 * sum(term.abs().max().item() for term in (x, residual, channel_bias))
    assert ((total.double() - exact).abs() <= step(dtype) * exact.abs() + rounded_in_float32).all()
    # The norm is that of the stored sum.
    assert_close_enough(y, total, weight, bias, num_groups, True)
    again = launch(*args)
    assert torch.equal(y, again[0]) and torch.equal(total, again[1])
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.interpreter
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_kernel_with_a_mean_far_from_zero(mean):
    """mean^2 / variance = 1e4 and 1e8: E[x^2] - E[x]^2 would lose all digits in float32."""
    x, _, weight, bias, num_groups, _ = inputs((1, 64, 12, 12, 8), mean=mean)
    y, _ = launch(x, None, weight, bias, num_groups, None)
    exact = reference(x.double(), weight, bias, num_groups, 1e-6, True, torch.float64)
    # The rounding of x itself.
    assert (y.double() - exact).abs().max() < 3e-7 * mean + 3e-6


@pytest.mark.interpreter
def test_kernel_with_a_small_eps_and_small_values():
    """A stream scaled by 2^-12 with eps 2^-24 gives the result of the unscaled one."""
    x, residual, weight, bias, num_groups, channel_bias = inputs(SHAPES[0])
    scale = 2.0**-12
    plain, _ = launch(x, residual, weight, bias, num_groups, channel_bias)
    scaled, _ = launch(
        x * scale,
        residual * scale,
        weight,
        bias,
        num_groups,
        channel_bias * scale,
        eps=1e-6 * scale**2,
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.interpreter
def test_kernel_layouts_and_table():
    """Contiguous and strided maps, the table's meta-parameters, an empty batch."""
    x, residual, weight, bias, num_groups, channel_bias = inputs(SHAPES[4])
    expected = launch(x, residual, weight, bias, num_groups, channel_bias)
    wide = torch.zeros(1, 128, 4, 16)
    wide[..., ::2] = x
    for x_like in (x.to(memory_format=torch.channels_last), wide[..., ::2]):
        for ours, theirs in zip(
            launch(x_like, residual, weight, bias, num_groups, channel_bias), expected, strict=True
        ):
            assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        launch(x, residual, weight, bias, num_groups, channel_bias, meta=None)[0], expected[0]
    )
    assert launch(x[:0], residual[:0], weight, bias, num_groups, channel_bias)[0].shape == (
        0,
        128,
        4,
        8,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kernel_with_a_non_finite_value(value):
    """Its group is NaN, as in torch, and the others are unchanged."""
    x, _, weight, bias, num_groups, _ = inputs(SHAPES[0])
    # In the first of 8 groups.
    x[0, 3, 5, 2] = value
    y, _ = launch(x, None, weight, bias, num_groups, None)
    assert y[0, :8].isnan().all() and y.isnan().sum() == 8 * 32


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_contract(dtype):
    x, residual, weight, bias, num_groups, channel_bias = inputs(SHAPES[1], dtype)
    torch.library.opcheck(
        torch.ops.dad_fast.group_norm_silu.default,
        (x, weight, bias, num_groups, 1e-6, True, channel_bias),
    )
    torch.library.opcheck(
        torch.ops.dad_fast.group_norm_silu.default, (x, weight, bias, num_groups, 1e-6, False, None)
    )
    torch.library.opcheck(
        torch.ops.dad_fast.add_group_norm_silu.default,
        (x, residual, weight, bias, num_groups, 1e-6, True, channel_bias),
    )
    y, total = add_group_norm_silu(
        x, residual, weight, bias, num_groups, 1e-6, channel_bias=channel_bias
    )
    assert_close_enough(y, total, weight, bias, num_groups, True)
    alone = group_norm_silu(total, weight, bias, num_groups, 1e-6)
    assert torch.equal(alone, y) and alone.permute(0, 2, 3, 1).is_contiguous()
    options = {"fullgraph": True, "backend": "aot_eager"}
    compiled = torch.compile(
        lambda *a: add_group_norm_silu(*a, num_groups, 1e-6, channel_bias=channel_bias), **options
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(compiled(x, residual, weight, bias), (y, total), strict=True)
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 6, 4)}, "B, C, H, W"),
        ({"num_groups": 4}, "4 groups do not divide 6"),
        ({"weight": torch.zeros(5)}, r"must be \[6\]"),
        ({"channel_bias": torch.zeros(6, 1)}, r"must be \[6\]"),
        ({"x": torch.zeros(2, 6, 4, 4, dtype=torch.float64)}, "float64"),
        ({"residual": torch.zeros(2, 6, 4, 4, dtype=torch.float16)}, "residual"),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    args = {
        "x": torch.zeros(2, 6, 4, 4),
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "num_groups": 3,
    } | change
    with pytest.raises(ValueError, match=words):
        add_group_norm_silu(**args) if "residual" in args else group_norm_silu(**args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*SHAPES, (4, 128, 112, 112, 32), (3, 512, 28, 28, 32), (2, 256, 57, 55, 32)]
)
def test_cuda(shape, dtype):
    x, residual, weight, bias, num_groups, channel_bias = (
        t.cuda() if isinstance(t, torch.Tensor) else t for t in inputs(shape, dtype, 5.0)
    )
    y, total = add_group_norm_silu(
        x, residual, weight, bias, num_groups, 1e-6, channel_bias=channel_bias
    )
    exact = added(x, residual, channel_bias)
    assert ((total.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()
    assert_close_enough(y, total, weight, bias, num_groups, True)
    y = group_norm_silu(x, weight, bias, num_groups, 1e-6, silu=False, channel_bias=channel_bias)
    assert_close_enough(y, added(x, None, channel_bias), weight, bias, num_groups, False)


@pytest.mark.gpu
def test_cuda_offsets_beyond_int32():
    """More than 2^31 values in one map: only 64-bit row offsets reach the last image."""
    x = (
        torch.randn(1, 64, 256, 256, device="cuda", dtype=torch.float16)
        .to(memory_format=torch.channels_last)
        .repeat(520, 1, 1, 1)
    )
    weight, bias = torch.rand(2, 64, device="cuda")
    y = group_norm_silu(x, weight, bias, 32)
    assert torch.equal(y[-1:], group_norm_silu(x[:1], weight, bias, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_torch_form_keeps_nhwc(dtype, mean):
    """With statistics of a mean far from 0; the error is that of torch's own."""
    x, _, weight, bias, num_groups, _ = inputs((2, 64, 28, 30, 8), dtype, mean)
    x = x.to(memory_format=torch.channels_last)
    y = nhwc_group_norm(x, num_groups, weight.to(dtype), bias.to(dtype), 1e-6)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert_close_enough(y, x, weight.to(dtype), bias.to(dtype), num_groups, False)
