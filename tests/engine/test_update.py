"""Non-finite steps change nothing: weights, optimizer state, batch norm, with any optimizer."""

import copy
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from torch.utils._pytree import tree_leaves

from dad_fast.config.schema import Config, EmaConfig, OptimConfig, PrecisionConfig
from dad_fast.engine.notices import ema_lag
from dad_fast.engine.update import Update
from dad_fast.errors import UsageError

CPU = torch.device("cpu")


def student():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    )


def config(**optim):
    return Config(optim=OptimConfig(**{"lr": 0.1, **optim}))


def step(update, model, x, number, lr=0.1):
    update.begin(number, lr)
    update.backward(model(x).square().mean())
    return update.apply()


BATCH = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
NAN = torch.where(torch.arange(4).view(4, 1, 1, 1) == 2, float("nan"), BATCH)
# Of every way to keep state: on the device, in Python, made in the first step from its gradient.
OPTIMIZERS = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adafactorbv",
    "adagrad",
    "adam",
    "adamax",
    "adamp",
    "adamuon",
    "adamw",
    "adan",
    "adopt",
    "lamb",
    "lars",
    "laprop",
    "lion",
    "madgrad",
    "mars",
    "momentum",
    "muon",
    "nadam",
    "nadamlegacy",
    "nadamw",
    "novograd",
    "radam",
    "rmsprop",
    "rmsproptf",
    "sgd",
    "sgdp",
    "sgdw",
    "lookahead_adamw",
    "lookahead_sgd",
]


def assert_state_equals(one, other):
    """Compare parameters and all that the optimizers keep."""
    states = [
        tree_leaves((update.parameters, update.optimizer.state_dict())) for update in (one, other)
    ]
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_bad_batches_leave_no_trace(cfg, order="bgbgg"):
    """Train on good and bad batches, and on the good ones alone."""
    model, straight = student(), student()
    update, reference = Update(model, cfg, CPU), Update(straight, cfg, CPU)
    for number, kind in enumerate(order):
        batch = BATCH * (1 + number / 8)
        if kind == "b":
            weights = copy.deepcopy([*model.parameters(), *update.buffers])
            assert not step(update, model, NAN, number)
            for before, after in zip(weights, [*model.parameters(), *update.buffers], strict=True):
                assert torch.equal(before, after)
            continue
        assert step(update, model, batch, number) and step(reference, straight, batch, number)
        assert_state_equals(update, reference)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_non_finite_steps_leave_no_trace(opt):
    """In the first step, when an optimizer makes its state, and in a later one."""
    assert_bad_batches_leave_no_trace(config(opt=opt))


@pytest.mark.parametrize(
    "opt, kwargs",
    [
        ("sgd", {"dampening": 0.5, "nesterov": False}),
        ("sgd", {"dampening": 0.5, "nesterov": False, "fused": True}),
        ("sgd", {"foreach": False}),
        ("adamw", {"amsgrad": True}),
        ("adamw", {"foreach": True}),
        ("adagrad", {"fused": True}),
        ("lookahead_adamw", {"fused": True}),
    ],
)
def test_non_finite_steps_leave_no_trace_with_arguments(opt, kwargs):
    assert_bad_batches_leave_no_trace(config(opt=opt, opt_kwargs=kwargs))


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb"])
def test_overflow_at_the_initial_scale_leaves_no_trace(opt):
    cfg = replace(config(opt=opt), precision=PrecisionConfig(amp=True, student="float16"))
    assert_bad_batches_leave_no_trace(cfg, "bbgbg")


@pytest.mark.parametrize("momentum, kwargs", [(0.9, {}), (0.9, {"nesterov": False}), (0.0, {})])
def test_sgd_equals_torch_from_the_first_step(momentum, kwargs):
    model, plain = student(), student()
    cfg = config(opt="momentum", momentum=momentum, weight_decay=0.0, opt_kwargs=kwargs)
    update = Update(model, cfg, CPU)
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=0.1, momentum=momentum, nesterov=False, fused=True
    )
    for number in range(3):
        step(update, model, BATCH, number)
        optimizer.zero_grad()
        plain(BATCH).square().mean().backward()
        optimizer.step()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)


def test_clipping_and_decay_equal_torch():
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 100
    # No bias before a batch norm here: its true gradient is 0, and Adam makes a full step out of
    # rounding.
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)
    )
    plain = copy.deepcopy(model)
    update = Update(model, config(clip_grad=0.5, weight_decay=0.3), CPU)
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    rest = [p for p in plain.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.3}], lr=0.1
    )
    for i in range(3):
        step(update, model, x, i, lr=0.05)
        optimizer.zero_grad()
        plain(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(list(plain.parameters()), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ema_equals_its_recurrence():
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    model = student()
    update = Update(
        model, replace(config(), ema=EmaConfig(model_ema=True, decay=0.9, warmup=False)), CPU
    )
    expected = model[0].weight.detach().clone()
    for i in range(5):
        step(update, model, x, i)
        decay = 0.9 if i > 1 else 0.0  # timm's: the first two updates copy
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(update.ema.module[0].weight, expected)


def test_a_run_too_short_for_a_constant_decay_is_warned_of():
    recipe = EmaConfig(model_ema=True, decay=0.99992, warmup=False)
    assert ema_lag(recipe, 200_000) is None
    warning = ema_lag(recipe, 1600)
    assert warning is not None and "keeps 88% of" in warning and "--model-ema-warmup" in warning
    assert ema_lag(replace(recipe, warmup=True), 1600) is None
    assert ema_lag(replace(recipe, model_ema=False), 1600) is None


def test_fp16_overflow_halves_the_scale_and_continues():
    model = student()
    update = Update(
        model, replace(config(), precision=PrecisionConfig(amp=True, student="float16")), CPU
    )
    x = torch.randn(4, 3, 4, 4)
    before = update.scaler.get_scale()
    step(update, model, x, 0)
    step(update, model, x * float("inf"), 1)
    assert update.scaler.get_scale() == before / 2
    assert update.bad_in_a_row == 1 <= update.tolerated


def test_unknown_optimizer_is_a_usage_error():
    with pytest.raises(UsageError, match="--opt adamx"):
        Update(student(), config(opt="adamx"), CPU)
