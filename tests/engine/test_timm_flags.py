"""timm's training flags, each against the numbers of timm's own functions."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from timm import optim, scheduler

from dad_fast.config.schema import Config, DataConfig, OptimConfig, ScheduleConfig, StudentConfig
from dad_fast.config.variants import with_batch_sizes
from dad_fast.engine.optimizer import build_optimizer
from dad_fast.engine.schedule import learning_rate, make_schedule
from dad_fast.engine.update import Update
from dad_fast.errors import UsageError
from dad_fast.models.grad_checkpointing import is_checkpointed
from dad_fast.models.student import build_student, share_batch_norm

PER_EPOCH, EPOCHS, WARMUP = 3, 20, 4
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
LR = OptimConfig(lr=0.5)
TOTAL = EPOCHS * PER_EPOCH
# Name -> timm's class, its arguments in steps, and our settings of the same meaning.
SCHEDULES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tanh": ("TanhLRScheduler", {"t_initial": TOTAL, "lr_min": 0.01}, {}),
    "step": (
        "StepLRScheduler",
        {"decay_t": 5 * PER_EPOCH, "decay_rate": 0.3},
        {"decay_epochs": 5.0, "decay_rate": 0.3},
    ),
    "multistep": (
        "MultiStepLRScheduler",
        {"decay_t": [6 * PER_EPOCH, 9 * PER_EPOCH], "decay_rate": 0.1},
        {"decay_milestones": (6.0, 9.0)},
    ),
    "poly": (
        "PolyLRScheduler",
        {"t_initial": TOTAL, "power": 2.0, "lr_min": 0.01},
        {"decay_rate": 2.0},
    ),
    "constant": ("StepLRScheduler", {"decay_t": 1, "decay_rate": 1.0}, {}),
    "cosine": (
        "CosineLRScheduler",
        {"t_initial": TOTAL, "lr_min": 0.01, "k_decay": 1.5},
        {"sched_kwargs": {"k_decay": 1.5}},
    ),
    "wsd": (
        "WSDLRScheduler",
        {"t_initial": TOTAL - WARMUP * PER_EPOCH, "decay_t": 6 * PER_EPOCH, "lr_min": 0.01},
        {"decay_epochs": 6.0},
    ),
}


def schedule(**changes: Any) -> ScheduleConfig:
    given = {"warmup_prefix": False, "epochs": EPOCHS, "warmup_epochs": WARMUP, "min_lr": 0.01}
    return ScheduleConfig(**{**given, "warmup_lr": 1e-3, **changes})


@pytest.mark.parametrize("sched", SCHEDULES)
def test_sched_equals_timms_at_every_step(sched: str) -> None:
    cls, arguments, ours = SCHEDULES[sched]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR.lr)
    warm_up = {"warmup_t": WARMUP * PER_EPOCH, "warmup_lr_init": 1e-3, "t_in_epochs": False}
    if sched != "wsd":
        # Of wsd the warm-up is always a prefix.
        warm_up["warmup_prefix"] = False
    timms = getattr(scheduler, cls)(optimizer, **arguments, **warm_up)
    rate = make_schedule(PER_EPOCH, LR, schedule(sched=sched, **ours))
    rates = []
    for step in range(TOTAL):
        timms.step_update(step)
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        rates.append(rate(step))
    assert max(rates) <= LR.lr and rates[0] == pytest.approx(1e-3) and rates[0] < rates[6]
    # A resumed run asks for the same step first.
    fresh = make_schedule(PER_EPOCH, LR, schedule(sched=sched, **ours))
    assert [fresh(step) for step in (50, 17)] == [rates[50], rates[17]]


@pytest.mark.parametrize("sched", ["tanh", "poly", "wsd"])
def test_epochs_count_a_warm_up_before_the_schedule(sched: str) -> None:
    asked = schedule(sched=sched, warmup_prefix=True, decay_rate=1.0)
    rate = make_schedule(PER_EPOCH, LR, asked)
    assert rate(WARMUP * PER_EPOCH) == pytest.approx(LR.lr, rel=0.05)
    assert 0.01 <= rate(TOTAL - 1) < 0.15 and rate(TOTAL) == pytest.approx(0.01, rel=0.2)


def test_cosine_is_the_projects_own() -> None:
    asked = schedule()
    rate = make_schedule(PER_EPOCH, LR, asked)
    expected = [learning_rate(step, PER_EPOCH, LR, asked) for step in range(TOTAL)]
    assert [rate(step) for step in range(TOTAL)] == expected


def test_a_schedule_that_timm_refuses_is_one_line() -> None:
    with pytest.raises(UsageError, match="--sched wsd: wsd schedule requires .* --decay-epochs"):
        make_schedule(PER_EPOCH, LR, schedule(sched="wsd", decay_epochs=30.0))
    with pytest.raises(UsageError, match="--sched cosine: .*no_such"):
        make_schedule(PER_EPOCH, LR, schedule(sched_kwargs={"no_such": 1}))


def test_layer_decay_gives_timms_groups_and_rates() -> None:
    student = build_student(StudentConfig(name="vit_tiny_patch16_224", model_kwargs=VIT), 5, 32)
    update = Update(
        student,
        Config(optim=OptimConfig(lr=0.1, layer_decay=0.5, weight_decay=0.2)),
        torch.device("cpu"),
    )
    expected = optim.param_groups_layer_decay(
        student.model,
        weight_decay=0.2,
        layer_decay=0.5,
        no_weight_decay_list=student.model.no_weight_decay(),
    )
    update.begin(0, 0.1)
    groups = update.optimizer.param_groups
    assert len(groups) == len(expected) > 4
    for ours, timms in zip(groups, expected, strict=True):
        assert all(a is b for a, b in zip(ours["params"], timms["params"], strict=True))
        assert ours["weight_decay"] == timms["weight_decay"]
        assert float(ours["lr"]) == pytest.approx(0.1 * timms["lr_scale"])
    rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    assert rates[id(student.model.head.weight)] == pytest.approx(0.1)
    below = [rates[id(block.mlp.fc1.weight)] for block in student.model.blocks]
    assert [below[1] / below[0], below[2] / below[1]] == pytest.approx([2.0, 2.0])


def test_betas_and_eps_reach_the_optimizer() -> None:
    model = torch.nn.Linear(3, 2)
    asked = OptimConfig(opt="adamw", opt_betas=(0.8, 0.95), opt_eps=1e-5, lr=0.1)
    group = build_optimizer(model, asked, cuda=False).param_groups[0]
    timms = optim.create_optimizer_v2(model, opt="adamw", lr=0.1, betas=(0.8, 0.95), eps=1e-5)
    expected = timms.param_groups[0]
    assert (group["betas"], group["eps"]) == (expected["betas"], expected["eps"])
    assert tuple(group["betas"]) == (0.8, 0.95) and group["eps"] == 1e-5
    default = build_optimizer(model, OptimConfig(opt="adamw"), cuda=False).param_groups[0]
    assert (tuple(default["betas"]), default["eps"]) == ((0.9, 0.999), 1e-8)
    with pytest.raises(UsageError, match="--opt adamw cannot be built.*eps"):
        build_optimizer(model, replace(asked, opt_kwargs={"eps": 1e-3}), cuda=False)


@pytest.mark.parametrize(
    ("opt", "scale", "factor"),
    # timm's train.py: the square root for optimizers with "ada" or "lamb" in their name.
    [
        ("adamw", "auto", 2.0),
        ("lamb", "auto", 2.0),
        ("sgd", "auto", 4.0),
        ("lion", "auto", 4.0),
        ("adamw", "linear", 4.0),
        ("sgd", "sqrt", 2.0),
    ],
)
def test_base_rate_grows_with_the_global_batch(opt: str, scale: Any, factor: float) -> None:
    given = OptimConfig(opt=opt, lr_base=1e-3, lr_base_size=128, lr_base_scale=scale)
    cfg = with_batch_sizes(Config(optim=given, data=DataConfig(batch_size=64)), num_processes=8)
    assert cfg.data.global_batch_size == 512 and cfg.optim.lr == pytest.approx(factor * 1e-3)
    # Of a checkpoint or config.toml, which hold the resolved rate.
    assert with_batch_sizes(cfg, num_processes=4).optim.lr == cfg.optim.lr


def test_drop_block_is_timms() -> None:
    asked = StudentConfig(name="resnet18", model_kwargs=SMALL, drop_block=0.3)
    student = build_student(asked, 5, 64)
    timms = timm.create_model("resnet18", drop_block_rate=0.3, **SMALL)
    found = [getattr(module, "drop_prob", 0) for module in student.model.modules()]
    expected = [getattr(module, "drop_prob", 0) for module in timms.modules()]
    assert found == expected and 0.3 in found
    with pytest.raises(UsageError, match="drop_block_rate.*--drop-block"):
        build_student(
            StudentConfig(name="vit_tiny_patch16_224", model_kwargs=VIT, drop_block=0.1), 5, 32
        )


def test_checkpointed_gradients_are_equal_and_keep_fewer_activations() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        asked = StudentConfig(
            name="vit_tiny_patch16_224", model_kwargs=VIT, grad_checkpointing=on, drop_path=0.2
        )
        student = build_student(asked, 5, 32).train()
        kept: list[int] = []

        def keep(tensor: Any, kept: list[int] = kept) -> Any:
            kept.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = student(pixels).square().sum()
        loss.backward()
        found.append((sum(kept), [p.grad for p in student.parameters()]))
    (plain, expected), (checkpointed, gradients) = found
    assert checkpointed < plain / 2
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize(
    ("name", "bn"),
    [("test_resnet", "joint"), ("test_resnet", "aux"), ("test_efficientnet", "joint")],
)
def test_checkpointing_counts_a_batch_once(name: str, bn: Any) -> None:
    """Weights and running statistics equal those of a run without it, bit for bit."""
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        asked = StudentConfig(name=name, grad_checkpointing=on, drop_path=0.2, bn=bn)
        student = copy.deepcopy(build_student(asked, 5, 32, 2)).train()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for seed in range(2):
            pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            student(pixels).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(student.state_dict())
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert any("running_mean" in key for key in plain)
    for key, value in plain.items():
        assert torch.equal(value, checkpointed[key]), key


def test_synchronized_batch_norms_stay_checkpointed() -> None:
    asked = StudentConfig(name="test_resnet", grad_checkpointing=True)
    student = build_student(asked, 5, 32)
    share_batch_norm(student, torch.device("cuda"))
    norms = [m for m in student.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert norms and all(is_checkpointed(norm) for norm in norms)


def test_a_model_without_checkpointing_is_one_line() -> None:
    asked = StudentConfig(name="vgg11", grad_checkpointing=True)
    with pytest.raises(UsageError, match="--student vgg11: timm cannot checkpoint its gradients"):
        with torch.device("meta"):
            build_student(asked, 5, 32)
