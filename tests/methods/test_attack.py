"""PGD against closed forms on a linear model, and the contract of its docstring."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.discretizers.identity import Identity
from dad_fast.engine.diagnostics import share_changed, signal_to_rounding
from dad_fast.errors import UsageError
from dad_fast.methods.attack import PGD, cross_entropy_direction, discretize

SHAPE = (3, 4, 4)


class Linear(torch.nn.Module):
    """Two classes with logits +w.x and -w.x: CE's input gradient is a multiple of w, whose sign the
    label fixes.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.w = torch.nn.Parameter(
            torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        )

    def forward(self, x):
        score = (x * self.w).sum(dim=(1, 2, 3))
        return torch.stack((score, -score), dim=1)


def pixels(batch=5, low=0.3, high=0.7, seed=1):
    return low + (high - low) * torch.rand(
        batch, *SHAPE, generator=torch.Generator().manual_seed(seed)
    )


LABELS, KEYS = torch.tensor([0, 1, 0, 1, 1]), torch.arange(5) * 31


def test_an_unknown_norm_is_refused():
    with pytest.raises(UsageError, match="PGD: norm 'l3': must be l2 or linf"):
        PGD("l3")


def test_l2_step_equals_the_closed_form():
    model, x = Linear(), pixels()
    got = PGD("l2", eps=0.2, step_size=0.15, steps=1, random_start=0)(model, x, LABELS, KEYS)
    sign = torch.where(LABELS == 0, -1.0, 1.0)[:, None, None, None]
    expected = x + 0.15 * sign * model.w / model.w.norm()
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-6)


def test_several_l2_steps_stop_at_the_budget():
    model, x = Linear(), pixels()
    got = PGD("l2", eps=0.2, step_size=0.15, steps=4, random_start=0)(model, x, LABELS, KEYS)
    sign = torch.where(LABELS == 0, -1.0, 1.0)[:, None, None, None]
    torch.testing.assert_close(
        got, (x + 0.2 * sign * model.w / model.w.norm()).detach(), rtol=0, atol=1e-6
    )


def test_linf_equals_the_closed_form():
    model, x = Linear(), pixels()
    got = PGD("linf", eps=0.1, step_size=0.04, steps=2, random_start=0)(model, x, LABELS, KEYS)
    sign = torch.where(LABELS == 0, -1.0, 1.0)[:, None, None, None]
    torch.testing.assert_close(got, (x + 0.08 * sign * model.w.sign()).detach(), rtol=0, atol=1e-6)


def test_soft_labels_give_the_gradient_of_soft_cross_entropy():
    model, x = Linear(), pixels()
    soft = torch.nn.functional.one_hot(LABELS, 2).float()
    attack = PGD("l2", eps=0.2, step_size=0.2, steps=2, random_start=0.5)
    assert torch.equal(attack(model, x, LABELS, KEYS), attack(model, x, soft, KEYS))
    undecided = attack(model, x, torch.full((5, 2), 0.5), KEYS)
    assert torch.isfinite(undecided).all()


def test_random_start_has_norm_eps_and_the_right_share_of_samples():
    x, keys = torch.full((400, 3, 8, 8), 0.5), torch.arange(400)
    delta = (
        PGD("l2", eps=0.3, steps=0, random_start=0.8)(
            Linear(), x, torch.zeros(400, dtype=torch.long), keys
        )
        - x
    )
    norms = delta.flatten(1).norm(dim=1)
    started = norms > 0
    torch.testing.assert_close(
        norms[started], torch.full_like(norms[started], 0.3), rtol=1e-4, atol=0
    )
    assert 0.72 < started.float().mean() < 0.88


@pytest.mark.parametrize("scale", [1, 10, 100])
def test_a_confident_model_is_still_attacked(scale):
    """Its p_y - 1 is 0 in float32, and its gradient so small that the square of its entries
    is 0.
    """
    model, x = Linear(), pixels()
    labels = (model(x)[:, 0] < model(x)[:, 1]).long()
    expected = PGD("l2", 0.1, 0.1, 1, 0)(model, x, labels, KEYS)
    got = PGD("l2", 0.1, 0.1, 1, 0)(lambda z: model(z) * scale, x, labels, KEYS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gap", [0.0, 5.0, 20.0, 60.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_direction_of_cross_entropy_at_any_confidence(gap, dtype):
    """Against the exact gradient in 400 digits: softmax minus one-hot, by Python's fractions of
    exponentials.
    """
    from mpmath import mp, mpf

    mp.dps = 400
    logits = torch.tensor([[gap, 0.0, -1.0, -2.5], [0.3, gap, 0.0, 1.0]], dtype=dtype)
    labels = torch.tensor([0, 0])
    got = cross_entropy_direction(logits, labels)
    for row, label, found in zip(
        logits.double().tolist(), labels.tolist(), got.tolist(), strict=True
    ):
        powers = [mp.exp(mpf(v)) for v in row]
        exact = [p / sum(powers) - (i == label) for i, p in enumerate(powers)]
        largest = max(abs(v) for v in exact)
        assert found == pytest.approx(
            [float(v / largest) for v in exact], abs=1e-3 if dtype == torch.float16 else 1e-6
        )


def test_soft_targets_give_the_gradient_of_soft_cross_entropy_in_float64():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(6, 5, dtype=torch.float64).softmax(-1)
    (-(targets * logits.log_softmax(-1)).sum()).backward()
    expected = logits.grad / logits.grad.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(cross_entropy_direction(logits.detach(), targets), expected)


def test_zero_gradient_leaves_images_unchanged():
    x = pixels()
    out = PGD("l2", 0.1, 0.1, 2, 0)(
        lambda z: (z * 0).sum(dim=(1, 2, 3))[:, None].repeat(1, 2), x, LABELS, KEYS
    )
    assert torch.equal(out, x)


def test_no_weight_gradient_and_no_graph():
    model, x = Linear(), pixels()
    before = x.clone()
    out = PGD()(model, x, LABELS, KEYS)
    assert (
        model.w.grad is None
        and not out.requires_grad
        and torch.equal(x, before)
        and not x.requires_grad
    )


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["l2", "linf"]),
    eps=st.floats(0.0, 0.9),
    step=st.floats(0.0, 1.0),
    steps=st.integers(0, 3),
    start=st.floats(0, 1),
    batch=st.integers(1, 4),
)
def test_attack_stays_in_budget_and_range_for_any_batch(norm, eps, step, steps, start, batch):
    model, x, attack = Linear(), pixels(batch, 0, 1), PGD(norm, eps, step, steps, start)
    out = attack(model, x, LABELS[:batch], KEYS[:batch])
    assert out.min() >= 0 and out.max() <= 1
    delta = (out - x).flatten(1)
    size = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(dim=1)
    assert (size <= eps * (1 + 1e-5) + 1e-6).all()
    alone = attack(model, x[-1:], LABELS[batch - 1 : batch], KEYS[batch - 1 : batch])
    torch.testing.assert_close(out[-1:], alone, rtol=0, atol=1e-6)


def test_code_change_and_signal_to_rounding():
    codes = torch.tensor([[[1, 2], [3, 4]]])
    assert share_changed(codes, torch.tensor([[[1, 2], [0, 4]]])) == 0.25
    x = pixels().double()
    ratio = signal_to_rounding(lambda p: p + 0.01, lambda p: p, x, x + 0.05)
    torch.testing.assert_close(ratio, torch.tensor(5.0))


def test_authors_order_discretizes_after_every_step():
    """Against a re-computation by plain formulas; budgets as in the attack, gradients by autograd."""
    model, x, calls = Linear(), pixels(low=0.1, high=0.9), []
    eps, length, steps = 0.3, 0.2, 3

    class Posterize(Discretizer):
        def __call__(self, images):
            calls.append(images)
            return Discretized(images=(images * 20).round() / 20, codes=None)

    attack = PGD("l2", eps, length, steps, random_start=0)
    how = Posterize(), model, attack, x, LABELS, KEYS
    got = discretize(*how, order="authors").images
    assert len(calls) == 1 + steps

    def posterized(images):
        return (images * 20).round() / 20

    base = image = posterized(x)
    for _ in range(steps):
        image = image.detach().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(image), LABELS, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, image)
        direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        delta = image.detach() + length * direction - base
        norm = delta.flatten(1).norm(dim=1)[:, None, None, None]
        delta = delta * (eps / norm).clamp(max=1)
        image = posterized((base + delta).clamp(0, 1))
    assert torch.equal(got, image.detach())
    once = posterized(attack(model, base, LABELS, KEYS))
    assert not torch.equal(got, once), "Q between the steps must matter in this test"


def test_paper_order_discretizes_once_and_one_step_of_the_authors_twice():
    model, x = Linear(), pixels()
    for order, steps, passes in (("paper", 3, 1), ("authors", 1, 2), ("authors", 0, 2)):
        calls = []

        class Counted(Identity):
            def __call__(self, images, calls=calls):
                calls.append(images)
                return super().__call__(images)

        how = Counted(), model, PGD(steps=steps), x, LABELS, KEYS
        found = discretize(*how, order=order).images
        assert len(calls) == passes and not found.requires_grad
