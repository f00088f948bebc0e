"""Trial of torch.compile: right code passes, planted faults leave a run in eager.

`aot_eager` stands for inductor, which takes seconds for each model: the same tracing and the same
split into forward and backward, without code generation. The slow test runs inductor.
"""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from torch import nn

from dad_fast.checkpoint.state import run_state
from dad_fast.config import expand
from dad_fast.config.resolve import gather
from dad_fast.config.schema import EngineConfig, LossConfig, PrecisionConfig
from dad_fast.engine import build, choices, compiling
from dad_fast.engine.build import Builder
from dad_fast.engine.choices import COMPILE, Choice, DeviceFacts, choose
from dad_fast.engine.compiling import forms_of, no_compiler, try_compiling
from dad_fast.engine.lockstep import Lockstep
from dad_fast.engine.preflight import check_backend
from dad_fast.engine.trainer import Trainer
from dad_fast.errors import EnvironmentProblem, UsageError
from dad_fast.methods.registry import METHODS
from dad_fast.models.student import build_student
from tests.engine.test_step import BATCH_NORM, LAYER_NORM, SIDE, B, C, LinearTeacher, make_config

CPU = torch.device("cpu")
TEACHER, ATTACKED, STUDENT = "the teacher", "the teacher under attack", "the student"


def use_backend(monkeypatch, backend):
    compile_with = lambda model, name: torch.compile(model, backend=backend)  # noqa: E731
    monkeypatch.setattr(compiling, "compiled", compile_with)


@pytest.fixture
def traced(monkeypatch):
    use_backend(monkeypatch, "aot_eager")
    yield
    torch._dynamo.reset()


def settings(method, student=LAYER_NORM, **changes):
    cfg = make_config(method, student, **changes)
    return replace(cfg, data=replace(cfg.data, batch_size=B))


def warnings(caplog):
    """Lines of this project; torch logs what it traces."""
    return [record.getMessage() for record in caplog.records if record.name == "dad_fast.engine"]


def made(cfg):
    torch.manual_seed(0)
    return build_student(cfg.student, C, SIDE, len(METHODS[cfg.method].image_kinds))


def trial(cfg, student=None, teacher=None, wanted=False):
    forms = forms_of(cfg, student or made(cfg), teacher or LinearTeacher(), False, False)
    return try_compiling(forms, cfg, CPU, wanted)


@pytest.mark.parametrize(
    ("method", "stored", "names"),
    [
        ("ce", False, [STUDENT]),
        ("kd", False, [TEACHER, STUDENT]),
        ("dad", False, [TEACHER, ATTACKED, STUDENT]),
        ("dad", True, [TEACHER, STUDENT]),
        ("dat", False, [STUDENT, "the student under attack"]),
    ],
)
def test_forms_are_those_of_the_step(method, stored, names):
    cfg = settings(method)
    teacher = LinearTeacher() if METHODS[method].needs_teacher else None
    assert [form.name for form in forms_of(cfg, made(cfg), teacher, stored, False)] == names


def test_right_code_passes_and_leaves_no_trace(traced, caplog):
    cfg = settings("dad", BATCH_NORM)
    model, teacher = made(cfg), LinearTeacher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    choice = trial(cfg, model, teacher)
    assert choice.value and "compared with eager" in choice.reason and not warnings(caplog)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(weight.grad is None for weight in model.parameters())


class Wrong(nn.Module):
    """Stands for compiled code with a fault in its output, or in its gradient alone."""

    def __init__(self, model, output=1.0, gradient=1.0):
        super().__init__()
        self.model = model
        self.output = output
        self.gradient = gradient

    def forward(self, pixels):
        logits = self.model(pixels)
        return self.output * (logits.detach() + self.gradient * (logits - logits.detach()))


class Raises(nn.Module):
    def __init__(self, model, backend=""):
        super().__init__()

    def forward(self, pixels):
        raise RuntimeError("inductor: LoweringException\nmore")


class Slow(nn.Module):
    def __init__(self, model):
        super().__init__()

    def forward(self, pixels):
        time.sleep(10)


FAULTS = {
    "raises": (Raises, "the teacher cannot be compiled: RuntimeError: inductor: LoweringException"),
    "output": (lambda model: Wrong(model, output=1.001), "the teacher compiled is 1.0e-03 from"),
    "NaN": (lambda model: Wrong(model, output=float("nan")), "the teacher compiled is nan from"),
    "gradient": (lambda model: Wrong(model, gradient=1.001), "the teacher under attack compiled"),
    "slow": (Slow, "compiling took longer than 0 s"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_the_run_in_eager(monkeypatch, caplog, name):
    fault, words = FAULTS[name]
    monkeypatch.setattr(compiling, "compiled", lambda model, backend: fault(model))
    monkeypatch.setattr(compiling, "TIME_LIMIT", 0.2)
    choice = trial(settings("dad"))
    assert choice.value is False and choice.reason.startswith(words) and "\n" not in choice.reason
    (line,) = warnings(caplog)
    assert line == f"torch.compile is off: {choice.reason}"


def test_on_refuses_a_fault(monkeypatch):
    monkeypatch.setattr(compiling, "compiled", Raises)
    with pytest.raises(EnvironmentProblem, match="--torchcompile on: the teacher cannot .* auto"):
        trial(settings("dad"), wanted=True)


@pytest.mark.parametrize("asked", ["aot_eager", "cudagraphs"])
def test_a_backend_by_name_compiles(monkeypatch, asked):
    """Other backends than inductor need no compiler of C++."""
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    used = []
    real = torch.compile

    def compile_with(model, backend, **options):
        used.append(backend)
        return real(model, backend="eager", dynamic=False)

    monkeypatch.setattr(torch, "compile", compile_with)
    cfg = settings("ce", engine=EngineConfig(torchcompile=asked))
    assert choose(DeviceFacts("cpu")).settled(cfg).engine.torchcompile == asked
    assert trial(cfg, wanted=True).value and set(used) == {asked}
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "words"),
    [("inductr", "did you mean inductor"), ("xyz", "such as cudagraphs, inductor")],
)
def test_an_unknown_backend_is_refused(name, words):
    check_backend(settings("ce", engine=EngineConfig(torchcompile="inductor")))
    with pytest.raises(UsageError, match=f"--torchcompile {name}: torch has no .*{words}"):
        check_backend(settings("ce", engine=EngineConfig(torchcompile=name)))


def test_a_fault_of_another_process_counts_here(monkeypatch):
    monkeypatch.setattr(compiling, "compiled", lambda model, backend: model)
    gather_two = lambda value: [value, "the student cannot be compiled"]  # noqa: E731
    monkeypatch.setattr(compiling.distributed, "all_gather_json", gather_two)
    assert trial(settings("ce")) == Choice(False, "the student cannot be compiled")


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "compiled", Raises)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    assert "no C++ compiler" in trial(settings("ce")).reason
    assert "no C compiler" in no_compiler(torch.device("cuda"))


def test_the_limit_of_time_keeps_a_timer_that_runs():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    timer = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with compiling._time_limit(5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100 and not rung
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def demo(num_steps):
    """A run on the embedded digits, with EMA and NHWC."""
    sets = ["device=cpu", "data.batch_size=8", "data.workers=0", f"max_steps={num_steps}"]
    sets += ["ema.model_ema=true", "precision.channels_last=on"]
    sets += ["student.name=vit_tiny_patch16_224"]
    sets += ["student.model_kwargs={patch_size=14,depth=1,embed_dim=24,num_heads=2}"]
    ((_, _, cfg),) = expand(gather("demo", None, sets, {"method": "ce"}))
    return cfg


def train(builder, cfg, folder, resume=""):
    trainer = Trainer(cfg, builder.build(cfg), folder, "test", resume)
    trainer.start()
    Lockstep([trainer]).train()
    return trainer


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Auto asks for a trial."""
    monkeypatch.setattr(choices, "_compile", lambda facts, steps: Choice(True, "as on a GPU"))


def test_a_compiled_run_resumes_in_eager(monkeypatch, tmp_path, traced, as_on_a_gpu):
    for package in ("mlxtend", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.setattr(build, "compiled", compiling.compiled)
    builder = Builder()
    checked = builder.build(demo(2))
    first = train(builder, demo(2), tmp_path / "run")
    assert isinstance(first.learner.forward, torch._dynamo.OptimizedModule)
    # One trial serves both.
    assert first.choices["torchcompile"] is checked.choices.autos[COMPILE]

    monkeypatch.setattr(compiling, "compiled", Raises)
    second = train(Builder(), demo(3), tmp_path / "run", "auto")
    assert second.learner.forward is second.parts.student and second.next_step == 3
    assert "cannot be compiled" in second.choices["torchcompile"].reason
    assert run_state(first)[0].keys() == run_state(second)[0].keys()
    first.log.close()
    second.log.close()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "engine.torchcompile was on where the run began and is off here" in log


def test_auto_tries_long_runs_on_a_gpu_alone():
    gpu = DeviceFacts("cuda", bfloat16=True)
    for facts, steps, expected in (
        (gpu, 5000, True),
        (gpu, 4999, False),
        (gpu, None, True),
        (DeviceFacts("cpu"), 10**6, False),
    ):
        assert choose(facts, None, steps).autos[COMPILE].value is expected


@pytest.mark.slow  # compiles for a minute
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("student", [LAYER_NORM, BATCH_NORM], ids=["LayerNorm", "BatchNorm"])
def test_inductor_passes(student, amp):
    precision = PrecisionConfig(amp=amp)
    student = replace(student, drop_path=0.5)
    choice = trial(settings("dad", student, precision=precision, loss=LossConfig(filter=True)))
    assert choice.value, choice.reason
