"""Learning rate at the ends of its phases, and against timm's scheduler."""

import pytest

torch = pytest.importorskip("torch")
from dad_fast.config.resolve import gather
from dad_fast.config.schema import OptimConfig, ScheduleConfig
from dad_fast.engine.schedule import learning_rate, total_epochs


def test_learning_rate_at_the_ends_of_warmup_cosine_and_cooldown():
    optim = OptimConfig(lr=1.0)
    schedule = ScheduleConfig(
        epochs=30, warmup_epochs=5, cooldown_epochs=10, warmup_lr=0.1, min_lr=0.01
    )

    def lr(epoch):
        return learning_rate(int(epoch * 100), 100, optim, schedule)

    assert total_epochs(schedule) == 40
    assert (
        lr(0) == pytest.approx(0.1)
        and lr(2.5) == pytest.approx(0.55)
        and lr(5) == pytest.approx(1.0)
    )
    assert lr(17.5) == pytest.approx(0.505) and lr(30) == lr(39.99) == 0.01
    assert lr(4.99) < lr(5) > lr(5.01)
    assert all(lr(e) >= lr(e + 1) for e in range(5, 39))


def test_learning_rate_without_warmup():
    assert (
        learning_rate(0, 10, OptimConfig(lr=0.3), ScheduleConfig(epochs=2, warmup_epochs=0)) == 0.3
    )


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("warmup_epochs", [0, 1, 5])
def test_learning_rate_equals_timms_cosine(prefix, warmup_epochs):
    scheduler = pytest.importorskip("timm.scheduler")
    optim = OptimConfig(lr=1e-4)
    schedule = ScheduleConfig(
        epochs=30,
        warmup_epochs=warmup_epochs,
        cooldown_epochs=10,
        warmup_prefix=prefix,
        warmup_lr=1e-6,
        min_lr=1e-5,
    )
    per_epoch = 3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    # timm adds a prefix to its epochs; here --epochs counts the warm-up.
    cosine_epochs = schedule.epochs - (warmup_epochs if prefix else 0)
    timms = scheduler.CosineLRScheduler(
        optimizer,
        t_initial=cosine_epochs * per_epoch,
        lr_min=schedule.min_lr,
        warmup_t=warmup_epochs * per_epoch,
        warmup_lr_init=schedule.warmup_lr,
        warmup_prefix=prefix,
        t_in_epochs=False,
    )
    for step in range(40 * per_epoch):
        timms.step_update(step)
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, per_epoch, optim, schedule) == pytest.approx(expected)


def test_presets_of_the_papers_follow_the_recipes_schedule_and_ema():
    vit_b = ("kd-vitb16", "dad-vitb16", "dat-vitb16", "ard-vitb16", "rslad-vitb16")
    for name in (*vit_b, "dad-dist-vitb16", "dad-rn50", "dad-authors-online"):
        cfg = gather(name, None, [], {})
        assert not cfg.schedule.warmup_prefix
        assert (cfg.ema.decay, cfg.ema.warmup) == (0.99992, False)
        # At the end of the warm-up: a sixth of the cosine is over.
        after = learning_rate(5, 1, cfg.optim, cfg.schedule)
        assert after == pytest.approx(1e-5 + 0.5 * 9e-5 * (1 + 3**0.5 / 2))
