"""Training step: the formula of every method, no reads on the host, every form of batch norm."""

import gc
import os
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from torch.utils._python_dispatch import TorchDispatchMode

from dad_fast.config.schema import (
    AttackConfig,
    AugmentConfig,
    Config,
    EngineConfig,
    LossConfig,
    PrecisionConfig,
    StudentConfig,
)
from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.codec import Codec
from dad_fast.discretizers.identity import Identity
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.model import VQGAN, VQGANConfig
from dad_fast.distributed.device import resolve_device
from dad_fast.engine.build import make_step
from dad_fast.engine.diagnostics import attack_effects, codes_changed
from dad_fast.engine.memory import collections_between_steps
from dad_fast.engine.meter import Meter
from dad_fast.engine.notices import Advice
from dad_fast.engine.step import TrainStep
from dad_fast.engine.update import Update
from dad_fast.errors import EnvironmentProblem
from dad_fast.methods.attack import PGD
from dad_fast.methods.registry import METHODS
from dad_fast.models.student import build_student
from tests.numerics import assert_same_function
from tests.steps import learner_of, loss_of, run

METHOD_NAMES = [name for name in METHODS if METHODS[name].terms]
B, C, SIDE = 8, 4, 16
CPU = torch.device("cpu")
FLOAT32 = PrecisionConfig()
LAYER_NORM = StudentConfig(
    name="vit_tiny_patch16_224",
    model_kwargs={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
)
BATCH_NORM = StudentConfig(
    name="resnet18", model_kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
)


class LinearTeacher(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.head = torch.nn.Linear(3 * SIDE * SIDE, C).requires_grad_(False)

    def forward(self, pixels):
        return self.head(pixels.flatten(1)) * 20


def discretizer(device=CPU, precision=FLOAT32):
    """Build a VQGAN on `device`; fused layers are copies, which a later move would leave behind."""
    torch.manual_seed(4)
    vqgan = VQGAN(
        VQGANConfig(
            ch=8,
            ch_mult=(1, 2),
            num_res_blocks=1,
            attn_levels=(),
            z_channels=4,
            embed_dim=4,
            n_embed=32,
        )
    )
    return VQGANDiscretizer(vqgan.to(device), precision)


def batch(kinds=(0, 1, 2, 1)):
    g = torch.Generator().manual_seed(5)
    return Batch(
        images=torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=g, dtype=torch.uint8),
        labels=torch.randint(0, C, (B,), generator=g),
        samples=torch.arange(B),
        seeds=torch.arange(B) * 977,
        mix_kind=torch.tensor(kinds).repeat_interleave(2),
        mix_lam=torch.tensor([1.0, 0.7, 0.75, 0.4]).repeat_interleave(2),
        mix_box=torch.tensor(
            [[0, 0, 0, 0], [0, 0, 0, 0], [4, 12, 4, 12], [0, 0, 0, 0]]
        ).repeat_interleave(2, dim=0),
        epoch=0,
        step=0,
        replaced=(),
    )


def make_config(method, student=LAYER_NORM, **changes):
    cfg = Config(
        method=method,
        student=student,
        augment=AugmentConfig(smoothing=0.1),
        attack=AttackConfig(norm="l2", eps=0.5, step_size=0.4, steps=2),
        loss=LossConfig(
            ce=1.0, kd=0.5, dad=0.25, dat=2.0, aug=3.0, ard=0.4, filter=changes.pop("filter", True)
        ),
    )
    return replace(cfg, **changes)


def make(method, student=LAYER_NORM, **changes):
    cfg = make_config(method, student, **changes)
    torch.manual_seed(0)
    model = build_student(cfg.student, C, SIDE)
    return make_step(cfg, model, LinearTeacher(), discretizer(), Update(model, cfg, CPU))


@pytest.mark.parametrize("order", ["paper", "authors"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_loss_equals_its_definition(method, order):
    step, data = (
        make(method, attack=AttackConfig(eps=0.5, step_size=0.4, steps=2, order=order)),
        batch(),
    )
    student, teacher, q = (
        learner_of(step).student.train(),
        step.generator.teacher,
        step.generator.discretizer,
    )
    loss, _ = loss_of(step, data)

    x, y, second, _ = step.generator.mixed(data)
    base, between = x, None
    if order == "authors":
        base, between = q(x).images, lambda images: q(images).images
    attack = PGD("l2", 0.5, 0.4, 2, 0.8)
    dad = q(attack(teacher, base, y, data.seeds, between)).images
    dat = q(attack(student, base, y, data.seeds, between)).images
    predicted = teacher(dad).argmax(-1)
    keep = ((predicted == data.labels) | (predicted == second)).double()
    assert 0 < keep.sum() < B
    smoothed = y * 0.9 + 0.1 / C

    def ce(images, weight=1.0):
        return (-(smoothed * student(images).double().log_softmax(-1)).sum(-1) * weight).sum() / B

    def kd(images, weight=1.0, taught=None):
        p, log_q = (
            (teacher(images if taught is None else taught).double() / 4).softmax(-1),
            (student(images).double() / 4).log_softmax(-1),
        )
        return 16 * ((p * (p.log() - log_q)).sum(-1) * weight).sum() / B

    weighted = {
        "ce": lambda: 1.0 * ce(x),
        "kd": lambda: 0.5 * kd(x),
        "dad": lambda: 0.25 * kd(dad, keep),
        "aug": lambda: 3.0 * ce(dad, keep),
        "dat": lambda: 2.0 * ce(dat),
        "ard": lambda: 0.4 * kd(dad, keep, taught=x),
    }
    expected = sum(weighted[term]() for term in METHODS[method].term_names())
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)


class Reads(TorchDispatchMode):
    """Records operations that would make the host wait for a device."""

    WAITS = (
        "_local_scalar_dense",
        "is_nonzero",
        "nonzero",
        "equal.default",
        "masked_select",
        "unique",
        "allclose",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in self.WAITS):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["kd", "dad", "dat+dad"])
def test_a_step_reads_nothing_on_the_host(method):
    step = make(
        method,
        optim=replace(Config().optim, clip_grad=1.0),
        ema=replace(Config().ema, model_ema=True),
    )
    step(batch(), 0, 1e-3)
    with Reads() as reads:
        step(batch(), 1, 1e-3)
    assert reads.seen == []


@pytest.mark.parametrize("method", ["kd", "dad"])
def test_micro_batches_equal_the_whole_batch(method):
    """Without batch statistics; CE's and KL's mean over the whole batch is the mean of the
    micro-batches' means.
    """
    whole, parts = make(method), make(method, engine=EngineConfig(grad_accum_steps=4))
    for number in range(2):
        a = run(whole, batch(), number, 1e-3)
        b = run(parts, batch(), number, 1e-3)
        assert a.keys() == b.keys()
        assert_same_function(a["loss"], b["loss"])
        grads = [
            torch.stack([p.grad.abs().max() for p in learner_of(step).update.parameters])
            for step in (whole, parts)
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_compiled_models_are_the_ones_that_a_step_calls():
    """Making a step compiles nothing; torch 2.15 refuses the truth value of a compiled module."""
    step = make("dad", engine=EngineConfig(torchcompile=True))
    assert isinstance(learner_of(step).forward, torch._dynamo.OptimizedModule)
    assert isinstance(step.generator.teacher, torch._dynamo.OptimizedModule)


@pytest.mark.slow  # compiles for half a minute
@pytest.mark.parametrize("method", ["dad", "dat"])
def test_compiled_step_equals_plain_step(method):
    plain, compiled = make(method), make(method, engine=EngineConfig(torchcompile=True))
    for number in range(3):
        a = run(plain, batch(), number, 1e-3)
        b = run(compiled, batch(), number, 1e-3)
        assert_same_function(a["loss"], b["loss"])
    assert (
        learner_of(compiled).student.state_dict().keys()
        == learner_of(plain).student.state_dict().keys()
    )


def test_cuda_graphs_on_needs_a_gpu():
    assert make("ce").graphs is None
    with pytest.raises(EnvironmentProblem, match="--cuda-graphs on"):
        make("ce", engine=EngineConfig(cuda_graphs="on"))


def resident_kib():
    return int(
        next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_flat(steps):
    """Without garbage collection, as in training, a step leaves nothing behind, not even a reference
    cycle.
    """
    tiny = replace(
        LAYER_NORM, model_kwargs={"patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 1}
    )
    step, data = make("dad", tiny, ema=replace(Config().ema, model_ema=True)), batch()
    meter = Meter()
    with collections_between_steps():
        for number in range(100):
            meter.add(run(step, data, number, 1e-3))
        before, objects = resident_kib(), len(gc.get_objects())
        for number in range(steps):
            meter.add(run(step, data, number, 1e-3))
        grown, left = resident_kib() - before, len(gc.get_objects()) - objects
    assert left < 50 and grown < 4096, (left, grown)


@pytest.mark.parametrize("bn", ["joint", "split", "aux"])
def test_every_form_of_batch_norm_trains(bn):
    step = make("dad", replace(BATCH_NORM, bn=bn))
    losses = [run(step, batch(), i, 1e-3)["loss"].item() for i in range(3)]
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]


def test_joint_equals_split_without_batch_statistics():
    joint, split = make("dad"), make("dad", replace(LAYER_NORM, bn="split"))
    assert_same_function(*(loss_of(step, batch())[0] for step in (joint, split)))


def measured(step):
    return codes_changed(step.generator, learner_of(step), batch(), {})


def test_the_share_of_changed_codes_grows_with_the_budget():
    weak, strong = (
        measured(make("dad", attack=AttackConfig(eps=size, step_size=size)))["codes_changed"]
        for size in (0.01, 5.0)
    )
    assert 0 <= weak < strong <= 1


def effects(method, discretizer=None, **attack):
    step = make(method, attack=AttackConfig(**attack))
    if discretizer is not None:
        step.generator.discretizer = discretizer
    return attack_effects(step.generator, learner_of(step), batch(kinds=(0, 0, 0, 0)))


def advised(effect, **attack):
    cfg = replace(make_config("dad", attack=AttackConfig(**attack)), max_steps=1)
    said = []
    Advice(cfg, None, "pil").on_effect(effect, said.append)
    return said


@pytest.mark.parametrize("make_discretizer", [lambda: Codec("JPEG", 75), Identity, discretizer])
def test_an_attack_that_changes_next_to_nothing_is_warned_of(make_discretizer):
    weak = {"eps": 0.002, "step_size": 0.002}
    effect = effects("dad", make_discretizer(), **weak)[""]
    assert effect.changed < 0.01 and effect.answers == 0
    (warning,) = advised(effect, **weak)
    assert effect.unit in warning and "--attack-eps and --attack-step-size" in warning
    strong = {"eps": 8.0, "step_size": 8.0}
    effect = effects("dad", make_discretizer(), **strong)[""]
    assert effect.changed > 0.1 and effect.stronger is None
    assert advised(effect, **strong) == []


def test_the_warning_names_a_budget_that_is_enough():
    weak = {"eps": 0.01, "step_size": 0.01}
    eps, changed = effects("dad", Identity(), **weak)[""].stronger
    assert changed >= 0.04
    enough = effects("dad", Identity(), eps=eps, step_size=eps)[""]
    assert enough.changed == pytest.approx(changed)
    assert f"to {eps:g} and {eps:g}" in advised(effects("dad", Identity(), **weak)[""], **weak)[0]


def test_effects_are_of_every_model_that_is_attacked():
    assert effects("dat+dad").keys() == {"", "_dat"}
    assert effects("dat").keys() == {"_dat"}
    assert effects("kd") == {}


def test_measuring_changes_nothing():
    step = make("dat+dad", BATCH_NORM)
    before = {k: v.clone() for k, v in learner_of(step).student.state_dict().items()}
    generator = torch.get_rng_state()
    measured(step)
    attack_effects(step.generator, learner_of(step), batch())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in learner_of(step).student.state_dict().items())


@pytest.mark.parametrize(
    ("name", "number"), [("cuda:1", 1), ("cuda", 0), ("auto", 0)], ids=["number", "cuda", "auto"]
)
def test_a_gpu_has_a_number_and_becomes_the_current_one(monkeypatch, name, number):
    """Streams, events and Triton's launches go by the current device, not by their tensors'."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    expected = torch.device("cuda", number)
    assert resolve_device(name) == expected and current == [expected]


def test_two_learners_in_one_step_train_as_in_two_steps():
    def student_of(seed):
        cfg = replace(make_config("dad"), seed=seed)
        torch.manual_seed(seed)
        model = build_student(cfg.student, C, SIDE)
        return make_step(cfg, model, LinearTeacher(), discretizer(), Update(model, cfg, CPU))

    separate = [student_of(seed) for seed in (0, 1)]
    joined = [student_of(seed) for seed in (0, 1)]
    together = TrainStep(
        joined[0].generator,
        [learner_of(step) for step in joined],
        num_micro_batches=1,
        tf32=True,
        cuda_graphs="off",
    )

    for number in range(2):
        expected = [run(step, batch(), number, 1e-3) for step in separate]
        assert together(batch(), number, 1e-3) == expected

    weights = [learner.student.state_dict() for learner in together.learners]
    for step, found in zip(separate, weights, strict=True):
        for name, value in learner_of(step).student.state_dict().items():
            assert torch.equal(value, found[name])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
