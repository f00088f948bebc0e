"""Non-finite steps change nothing: weights, optimizer state, batch norm, with any optimizer."""

import copy
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from dad_fast.config.schema import Config, EmaConfig, OptimConfig, PrecisionConfig
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


def snapshot(model, update):
    state = update.optimizer.state_dict()["state"]
    return copy.deepcopy(model.state_dict()), copy.deepcopy(state)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lion", "rmsprop"])
def test_non_finite_step_is_skipped_and_the_next_applied(opt):
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    model, straight = student(), student()
    cfg = config(opt=opt)
    update, reference = Update(model, cfg, CPU), Update(straight, cfg, CPU)
    assert step(update, model, x, 0)
    step(reference, straight, x, 0)
    before, state_before = snapshot(model, update)
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    assert not step(update, model, bad, 1)
    assert update.bad_in_a_row == 1
    after, state_after = snapshot(model, update)
    for name in before:
        if "num_batches" not in name:
            assert torch.equal(before[name], after[name]), name
    for index, entry in state_before.items():
        for name, value in entry.items():
            if torch.is_tensor(value):
                assert torch.equal(value, state_after[index][name]), (index, name)
    assert step(update, model, x, 2) and update.bad_in_a_row == 0
    if (
        opt == "lamb"
    ):  # counts its steps in Python, where a step that the device refused cannot be seen
        return
    step(reference, straight, x, 2)
    for a, b in zip(model.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


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
