"""`pgd_update`: the op and its Triton kernels compared with the plain form and with float64.

Triton chooses the interpreter when imported, so that tests of kernels run in a separate process.
"""

import pytest

torch = pytest.importorskip("torch")
from dad_fast.kernels.pgd_update import pgd_update, reference
from dad_fast.methods.attack import PGD

SHAPES = [(3, 3, 8, 8), (1, 3, 37, 41), (2, 1, 1, 1), (2, 3, 40, 40)]
STEPS = [
    ("l2", 0.1, 0.1),
    ("l2", 5.0, 0.3),
    ("l2", 0.0, 1.0),
    ("l2", 0.7, 0.0),
    ("linf", 0.03, 0.01),
    ("linf", 0.0, 0.5),
]


def launch(*args):
    from dad_fast.kernels.pgd_update_triton import launch

    return launch(*args)


def inputs(shape, eps, seed=0, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(shape, generator=g)
    delta = torch.randn(shape, generator=g) * eps / 10
    gradient = (scale * torch.randn(shape, generator=g)).to(dtype)
    return pixels, (pixels + delta).clamp(0, 1) - pixels, gradient


def exact(pixels, delta, gradient, *step):
    return reference(pixels.double(), delta.double(), gradient.double(), *step)


def assert_close_enough(got, args):
    """Assert at most twice the error of the plain form, or the spacing of float32."""
    for ours, plain, true in zip(got, reference(*args), exact(*args), strict=True):
        error, allowed = (ours.double() - true).abs().max(), (plain.double() - true).abs().max()
        assert error <= 2 * allowed + 1.2e-7, (error, allowed)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_kernel_equals_the_plain_form(shape, step):
    args = (*inputs(shape, step[1]), *step)
    before = [tensor.clone() for tensor in args[:3]]
    got = launch(*args)
    assert_close_enough(got, args)
    delta, image = got
    assert image.min() >= 0 and image.max() <= 1
    size = delta.flatten(1).norm(dim=1) if step[0] == "l2" else delta.abs().amax()
    assert (size <= step[1] * (1 + 1e-5) + 1e-6).all()
    for first, second in zip(got, launch(*args), strict=True):
        # The same result twice.
        assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, args[:3], strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_kernel_takes_16_bit_gradients(norm, dtype):
    pixels, delta, gradient = inputs((2, 3, 20, 20), 0.1, dtype=dtype)
    assert_close_enough(
        launch(pixels, delta, gradient, norm, 0.1, 0.1),
        (pixels, delta, gradient.float(), norm, 0.1, 0.1),
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e25, 1e37])
def test_kernel_with_gradients_whose_squares_overflow_float32(scale):
    pixels, delta, gradient = inputs((2, 3, 16, 16), 0.1, scale=scale)
    args = (pixels, delta, gradient, "l2", 0.1, 0.1)
    for ours, true in zip(launch(*args), exact(*args), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=1.2e-7)


@pytest.mark.interpreter
def test_kernel_with_a_step_that_cancels_the_delta():
    """|d|^2 + 2 s d.g/|g| + s^2 cancels to nearly 0, and the budget is even smaller."""
    pixels = torch.full((2, 3, 16, 16), 0.5)
    gradient = torch.randn(pixels.shape)
    delta = -0.1 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for eps in (1e-9, 1e-3):
        delta_new, _ = launch(pixels, delta, gradient, "l2", eps, 0.1)
        assert (delta_new.flatten(1).norm(dim=1) <= eps + 1e-6).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_kernel_with_zero_and_non_finite_gradients(norm):
    pixels, delta, gradient = inputs((4, 3, 8, 8), 0.1)
    gradient[0] = 0.0
    gradient[1, 0, 0, 0] = float("nan")
    gradient[2, 0, 0, 0] = float("inf")
    got = launch(pixels, delta, gradient, norm, 0.1, 0.1)
    plain = reference(pixels, delta, gradient, norm, 0.1, 0.1)
    for ours, theirs in zip(got, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1.2e-7, equal_nan=True)
    assert torch.equal(got[0].isnan(), plain[0].isnan())
    assert got[0][1].isnan().any() == (norm == "l2")
    assert not got[0][3].isnan().any()


@pytest.mark.interpreter
def test_kernel_layouts():
    """Channels-last pixels, gradients in another layout, a gradient that is a view."""
    pixels, delta, gradient = inputs((2, 3, 12, 10), 0.1)
    wide = torch.zeros(2, 3, 12, 20)
    wide[..., ::2] = gradient
    expected = launch(pixels, delta, gradient, "l2", 0.1, 0.1)
    last = torch.channels_last
    for p, d, g in [
        (pixels.to(memory_format=last), delta.to(memory_format=last), gradient),
        (pixels, delta, gradient.to(memory_format=last)),
        (pixels, delta.to(memory_format=last), wide[..., ::2]),
    ]:
        got = launch(p, d, g, "l2", 0.1, 0.1)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.stride() == p.stride()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1.2e-7)


@pytest.mark.interpreter
def test_kernel_with_more_blocks_than_partial_sums(monkeypatch):
    from dad_fast.kernels import pgd_update_triton

    monkeypatch.setattr(pgd_update_triton, "MAX_PARTS", 2)
    monkeypatch.setattr(pgd_update_triton, "BLOCK", 64)
    args = (*inputs((2, 3, 11, 13), 0.1), "l2", 0.1, 0.1)
    assert_close_enough(launch(*args), args)


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_operator_contract(norm):
    args = (*inputs((2, 3, 8, 8), 0.1), norm, 0.1, 0.1)
    torch.library.opcheck(torch.ops.dad_fast.pgd_update.default, args)
    compiled = torch.compile(
        lambda *tensors: pgd_update(*tensors, norm, 0.1, 0.1), fullgraph=True, backend="aot_eager"
    )
    for a, b, c in zip(pgd_update(*args), reference(*args), compiled(*args[:3]), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_attack_is_the_same_with_and_without_the_op():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    x, y, keys = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0]), torch.arange(5)
    for norm in ("l2", "linf"):
        plain, fused = (
            PGD(norm, 0.3, 0.2, 3, 0.8, fused=on)(model, x, y, keys) for on in (False, True)
        )
        assert torch.equal(plain, fused) and not fused.requires_grad


@pytest.mark.parametrize(
    "change, words",
    [
        ({"norm": "l1"}, "l2 or linf"),
        ({"delta": torch.zeros(2, 3, 4, 5)}, "one shape"),
        ({"pixels": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, "float32"),
        ({"gradient": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "gradient"),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    args = {name: torch.zeros(2, 3, 4, 4) for name in ("pixels", "delta", "gradient")}
    with pytest.raises(ValueError, match=words):
        pgd_update(**args | {"norm": "l2", "eps": 0.1, "step_size": 0.1} | change)


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 3, 224, 224)])
def test_on_a_gpu(shape, step):
    """Eager, compiled and replayed from a CUDA graph."""
    cuda = [tensor.cuda() for tensor in inputs(shape, step[1])]
    got = pgd_update(*cuda, *step)
    assert_close_enough(got, (*cuda, *step))
    torch.library.opcheck(torch.ops.dad_fast.pgd_update.default, (*cuda, *step))
    compiled = torch.compile(lambda *tensors: pgd_update(*tensors, *step), fullgraph=True)(*cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = pgd_update(*cuda, *step)
    graph.replay()
    for first, *others in zip(got, pgd_update(*cuda, *step), compiled, replayed, strict=True):
        assert all(torch.equal(first, other) for other in others)
