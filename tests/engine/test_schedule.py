"""Learning rate at the ends of its phases."""

import pytest

pytest.importorskip("torch")
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
