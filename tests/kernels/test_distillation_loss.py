"""`distillation_loss`: the op and its Triton kernels compared with plain functions and float64.

Triton chooses the interpreter when imported, so that tests of kernels run in a separate process.
"""

import math
from itertools import product

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F

from dad_fast.kernels import distillation_loss as op
from dad_fast.kernels.distillation_loss import distillation_loss

# Incoming gradients of CE and KD.
G = (0.7, -1.3)


def draw(batch=5, classes=10, scale=3.0, dtype=torch.float32, seed=0):
    """Return (student, teacher, probabilities, labels, weight) with some samples filtered."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(batch, classes, generator=g) for _ in range(2))
    probs = torch.rand(batch, classes, generator=g).softmax(1)
    labels = torch.randint(0, classes, (batch,), generator=g)
    weight = torch.randint(0, 2, (batch,), generator=g).float() * 1.5
    return student.to(dtype), teacher, probs, labels, weight


def through_autograd(student, teacher, targets, weight, temperature, smoothing, loss):
    """Return (losses [2], gradient of G . losses with respect to the student)."""
    student = student.clone().requires_grad_(True)
    ce, kd = loss(student, teacher, targets, weight, temperature, smoothing)
    (G[0] * ce + G[1] * kd).backward()
    return torch.stack((ce, kd)).detach(), student.grad


def plain(student, teacher, targets, weight, temperature, smoothing):
    ce, kd = student.sum() * 0, student.sum() * 0
    if targets is not None:
        soft = (
            F.one_hot(targets, student.shape[1]).to(op._at_least_float32(student))
            if targets.ndim == 1
            else targets.to(ce)
        )
        ce = op.soft_cross_entropy(student, op.smooth(soft, smoothing), weight)
    if teacher is not None:
        kd = op.distillation(student, teacher, temperature, weight)
    return ce, kd


def by_the_op(student, teacher, targets, weight, temperature, smoothing):
    return distillation_loss(
        student, teacher, targets, weight, temperature=temperature, smoothing=smoothing
    )


def by_the_kernels(student, teacher, targets, weight, temperature, smoothing):
    """Call the launchers directly, combined as in the op."""
    from dad_fast.kernels.distillation_loss_triton import launch, launch_backward

    class Tied(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student):
            parts, ctx.kept = launch(student, teacher, targets, weight, temperature, smoothing)
            return parts

        @staticmethod
        def backward(ctx, grad):
            return launch_backward(
                grad, ctx.kept, student.detach(), teacher, targets, weight, temperature, smoothing
            )

    return Tied.apply(student).unbind()


def exact(student, teacher, targets, weight, temperature, smoothing):
    fixed = (
        None if x is None or not x.is_floating_point() else x.double()
        for x in (teacher, targets, weight)
    )
    teacher64, targets64, weight64 = fixed
    targets64 = targets if targets64 is None else targets64
    return through_autograd(
        student.double(), teacher64, targets64, weight64, temperature, smoothing, plain
    )


def rounding_of_kd(student, teacher, temperature):
    """Return an ulp of the terms of T^2 KL, which are differences of log-probabilities."""
    if teacher is None:
        return 0.0
    spreads = [(x.amax(1) - x.amin(1)).max().item() for x in (student.float(), teacher.float())]
    log_prob = math.log(student.shape[1]) + max(spreads) / temperature
    return temperature**2 * torch.finfo(torch.float32).eps * log_prob


def compare(args, loss, slack=5e-7):
    """Assert at most twice the error of the plain form in the same dtype, plus a few ulps."""
    got, theirs, true = through_autograd(*args, loss), through_autograd(*args, plain), exact(*args)
    roundings = rounding_of_kd(args[0], args[1], args[4]), 0.0
    if loss is by_the_kernels and args[0].dtype == torch.bfloat16:
        # The interpreter truncates bfloat16, and a GPU rounds.
        slack += 2**-8
    assert got[0].dtype == torch.float32 and got[1].dtype == args[0].dtype
    for ours, them, e, rounding in zip(got, theirs, true, roundings, strict=True):
        e, size = e.double(), e.abs().max().double()
        error, allowed = ((x.double() - e).abs().max() for x in (ours, them))
        assert error <= 2 * allowed + slack * (size + 1) + rounding, (error, allowed, size)
    return got


LOSSES = [
    pytest.param(by_the_op, id="op"),
    pytest.param(by_the_kernels, id="kernel", marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "teacher, targets, weighted", [*product((True, False), ("soft", "labels", None), (True, False))]
)
def test_every_combination(loss, teacher, targets, weighted):
    student, t, probs, labels, weight = draw(3)
    y = {"soft": probs, "labels": labels, None: None}[targets]
    for smoothing in (0.0, 0.1):
        args = (student, t if teacher else None, y, weight if weighted else None, 4.0, smoothing)
        before = [None if x is None else x.clone() for x in args[:4]]
        first, second = compare(args, loss), compare(args, loss)
        # The same result twice.
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(
            a is b is None or torch.equal(a, b) for a, b in zip(before, args[:4], strict=True)
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, classes) for classes in (2, 37, 1000, 4096, 5003)]
    + list(product((torch.float16, torch.bfloat16), (37, 4096))),
)
def test_sizes_and_dtypes(loss, dtype, classes):
    student, teacher, probs, labels, weight = draw(3, classes, dtype=dtype)
    compare((student, teacher, probs, weight, 4.0, 0.0), loss)
    compare((student, teacher.to(dtype), labels, None, 2.0, 0.1), loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_22_thousand_classes(loss):
    student, teacher, _, labels, weight = draw(2, 21843, dtype=torch.bfloat16)
    compare((student, teacher, labels, weight, 4.0, 0.1), loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("temperature", "scale"),
    [(0.05, 1.0), (0.05, 100.0), (0.7, 30.0), (1.0, 30.0), (20.0, 1.0), (20.0, 100.0)],
)
def test_temperatures_and_saturated_logits(loss, temperature, scale):
    student, teacher, probs, labels, weight = draw(4, 100, scale)
    compare((student, teacher, probs, weight, temperature, 0.0), loss)
    near = student + 0.01 * torch.randn_like(student)
    compare((student, near, labels, weight, temperature, 0.0), loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_large_common_offset_keeps_precision(loss):
    student, teacher, probs, _, _ = draw(6, 100)
    compare((student + 20000, teacher - 30000, probs, None, 4.0, 0.0), loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_infinite_logits(loss):
    """Filtered samples may hold anything, labels ignore -inf of other classes, and NaN in used
    samples stays visible.
    """
    student, teacher, _, labels, _ = draw(4, 10)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    student[1, 3], student[3, 2], teacher[3, 0] = float("inf"), float("nan"), float("nan")
    got = through_autograd(student, teacher, labels, weight, 4.0, 0.0, loss)
    keep = weight > 0
    expected = through_autograd(student[keep], teacher[keep], labels[keep], None, 4.0, 0.0, plain)
    torch.testing.assert_close(got[0], expected[0] / 2)
    torch.testing.assert_close(got[1][keep], expected[1] / 2)
    assert (got[1][~keep] == 0).all()

    student, _, _, _, _ = draw(2, 10)
    student[:, 4] = float("-inf")
    labels = torch.tensor([1, 2])
    args = (student, None, labels, None, 1.0, 0.0)
    got = through_autograd(*args, loss)
    assert got[0][0] == pytest.approx(F.cross_entropy(student, labels).item(), rel=1e-6)
    assert (got[1][:, 4] == 0).all()

    for bad in ("nan", "inf"):
        student, teacher, probs, _, _ = draw(2, 10)
        student[0, 9] = float(bad)
        losses, gradient = through_autograd(student, teacher, probs, None, 4.0, 0.0, loss)
        assert losses.isnan().all() and gradient[0].isnan().all() and not gradient[1].isnan().any()


@pytest.mark.parametrize("loss", LOSSES)
def test_strided_logits_and_incoming_gradients(loss):
    student, teacher, probs, _labels, weight = draw(4, 12)
    wide = torch.zeros(4, 24)
    wide[:, ::2] = student
    tall = torch.zeros(8, 12)
    tall[::2] = student
    expected = through_autograd(student, teacher, probs, weight, 4.0, 0.0, loss)
    for view in (wide[:, ::2], tall[::2], student.T.contiguous().T):
        view = view.detach().requires_grad_(True)
        ce, kd = loss(view, teacher.T.contiguous().T, probs, weight, 4.0, 0.0)
        not_contiguous = torch.tensor((G, G)).T.contiguous()[:, 1]
        torch.stack((ce, kd)).backward(not_contiguous)
        torch.testing.assert_close(view.grad, expected[1])
    # Only one of the two losses is used.
    one = student.clone().requires_grad_(True)
    _, kd = loss(one, teacher, probs, weight, 4.0, 0.0)
    kd.expand(3).sum().backward()
    _, gradient = through_autograd(student, teacher, None, weight, 4.0, 0.0, plain)
    torch.testing.assert_close(one.grad, 3 * gradient / G[1])


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["soft", "labels", None])
def test_operator_contract(targets):
    student, teacher, probs, labels, weight = draw(3, 6)
    y = {"soft": probs, "labels": labels, None: None}[targets]
    torch.library.opcheck(
        torch.ops.dad_fast.distillation_loss.default,
        (student.requires_grad_(True), teacher, y, weight, 4.0, 0.1),
    )
    _, kept = torch.ops.dad_fast.distillation_loss(student.detach(), teacher, y, weight, 4.0, 0.1)
    arguments = (torch.tensor(G), kept, student.detach(), teacher, y, weight, 4.0, 0.1)
    torch.library.opcheck(torch.ops.dad_fast.distillation_loss_backward.default, arguments)


def test_gradcheck_and_compile():
    student, teacher, probs, _, weight = draw(3, 6)
    args = (teacher.double(), probs.double(), weight.double())
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, *args, temperature=2.0),
        student.double().requires_grad_(True),
    )
    compiled = torch.compile(by_the_op, fullgraph=True, backend="aot_eager")
    settings = (student, teacher, probs, weight, 4.0, 0.0)
    for a, b in zip(
        through_autograd(*settings, by_the_op), through_autograd(*settings, compiled), strict=True
    ):
        assert torch.equal(a, b)


def test_no_gradient_reaches_teacher_targets_or_weights():
    student, teacher, probs, _, weight = (
        x.requires_grad_(x.is_floating_point()) for x in draw(3, 6)
    )
    sum(distillation_loss(student, teacher, probs, weight)).backward()
    assert student.grad is not None and teacher.grad is probs.grad is weight.grad is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"student": torch.zeros(2, 3, 4)}, "student and teacher"),
        ({"teacher": torch.zeros(2, 4)}, "student and teacher"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets"),
        ({"weight": torch.zeros(2, 1)}, "weight"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    args = {
        "student": torch.zeros(2, 3),
        "teacher": torch.zeros(2, 3),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=words):
        distillation_loss(**args | change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 37, 1000, 21843])
def test_on_a_gpu(dtype, classes):
    """Eager, compiled and replayed from a CUDA graph, for several temperatures."""
    for temperature in (0.05, 4.0, 20.0):
        student, teacher, probs, labels, weight = (
            tensor.cuda() for tensor in draw(64, classes, dtype=dtype)
        )
        for targets in (probs, labels, None):
            args = (student, teacher, targets, weight, temperature, 0.0)
            got = compare(args, by_the_op)
            again = through_autograd(*args, torch.compile(by_the_op, fullgraph=True))
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    leaf = student.clone().requires_grad_(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ce, kd = by_the_op(leaf, *args[1:])
        (replayed,) = torch.autograd.grad(G[0] * ce + G[1] * kd, leaf)
    graph.replay()
    assert torch.equal(replayed, got[1])
