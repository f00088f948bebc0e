"""Training step on a pretended CUDA device: its tensors have no data, so a host wait is an error.

FakeTensorMode raises where a value is read (`item`, a branch, `nonzero`, `equal`); copies between
host and device are noted. Autograd's engine needs a true device, so that gradients are zeros here:
our backward passes have no code on the host. So does autocast, which is off.
"""

import traceback
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("open_clip")
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dad_fast.config.schema import Config, DataConfig, EngineConfig, LossConfig, StoreConfig
from dad_fast.engine.build import make_step
from dad_fast.engine.update import Update
from dad_fast.kernels.pack_codes import packed_bytes
from dad_fast.methods.registry import METHODS

METHOD_NAMES = [name for name in METHODS if METHODS[name].terms]
from dad_fast.models.optimizations import Optimizations, optimize_student, optimize_teacher
from dad_fast.models.student import build_student
from tests.engine.test_step import BATCH_NORM, LAYER_NORM, SIDE, B, C, batch, discretizer
from tests.models.test_optimizations import timm_teacher

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
CUDA = torch.device("cuda")
CONFIG = Config()


class Crossings(TorchDispatchMode):
    """Records operations whose tensors are on both sides, with their place in the code."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        # A Python number becomes a tensor of no dimension, which a kernel takes as an argument.
        if len({t.device.type for t in tensors if t.dim() or "copy" in str(func)}) > 1:
            ours = [
                f"{f.filename}:{f.lineno}"
                for f in traceback.extract_stack()
                if "/dad_fast/" in f.filename
            ]
            self.seen.append((str(func), ours[-1:]))
        return out


@pytest.fixture
def pretended_cuda(monkeypatch):
    """Add what FakeTensorMode lacks: generators of CUDA, the engine of autograd, shapes of the fused
    optimizers.
    """
    generator = torch.Generator

    class HostGenerator(generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(
        torch.autograd, "grad", lambda outputs, inputs, *_: (torch.zeros_like(inputs),)
    )
    library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_adamw_", "_fused_adam_", "_fused_sgd_"):
        for overload in ("", ".tensor_lr"):
            library.impl(
                name + overload, lambda *args, **kwargs: None, "Meta", allow_override=True
            )  # torch 2.11 has some
    yield
    library._destroy()


def move(module):
    """Move tensors to the pretended device: shapes without data."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(p, device=CUDA), requires_grad=p.requires_grad
                )
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty_like(b, device=CUDA)
    return module


def stored(codes=False, outputs=False):
    """Return `batch()` with what stores add to it."""
    found = {"dad_outputs": torch.zeros(B, C).half(), "dad_kept": torch.ones(B)}
    if codes:
        found["dad_codes"] = torch.zeros(B, packed_bytes(SIDE * SIDE // 4, 5), dtype=torch.uint8)
    else:
        found["dad_images"] = torch.zeros(B, SIDE, SIDE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    if outputs:
        found["clean_outputs"] = torch.zeros(B, C).half()
    return replace(batch(), **found)


def crossings(monkeypatch, method, student_config, fused=False, given=None, **sections):
    cfg = Config(
        method=method, student=student_config, engine=EngineConfig(cuda_graphs="off"), **sections
    )
    student, vqgan = build_student(cfg.student, C, SIDE, 3), discretizer()
    teacher = timm_teacher(img_size=SIDE, num_classes=C)
    teacher.image_size = SIDE
    optimize_student(student, Optimizations())
    optimize_teacher(teacher, Optimizations())

    def backward(loss, *_):
        for p in student.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (
            student,
            teacher,
            *(part for part in vars(vqgan).values() if isinstance(part, torch.nn.Module)),
        ):
            move(module)
        step = make_step(cfg, student, teacher, vqgan, Update(student, cfg, CUDA))
        step.generator.attack = replace(step.generator.attack, fused=fused)
        data = (given or batch()).to(CUDA)
        step(data, 0, 1e-3)  # optimizers make their state in the first step
        with Crossings() as found:
            (scalars,) = step(data, 1, 1e-3)
    assert all(value.device.type == "cuda" for value in scalars.values())
    return found.seen


EMA = replace(CONFIG.ema, model_ema=True)
CLIP = replace(CONFIG.optim, clip_grad=1.0)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_no_method_makes_the_host_wait(pretended_cuda, monkeypatch, method):
    assert crossings(monkeypatch, method, LAYER_NORM, optim=CLIP, ema=EMA) == []


@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_no_fused_optimizer_makes_the_host_wait(pretended_cuda, monkeypatch, opt):
    assert crossings(monkeypatch, "kd", BATCH_NORM, optim=replace(CLIP, opt=opt), ema=EMA) == []


@pytest.mark.parametrize("opt", ["lamb", "lion", "rmsprop", "adafactor", "nadamw", "adan"])
def test_other_optimizers_wait_for_the_finite_check_alone(pretended_cuda, monkeypatch, opt):
    item, waits = torch.Tensor.item, []

    def read(tensor):
        if tensor.device.type != "cuda":
            return item(tensor)
        waits.append(tensor.dtype)
        return True

    monkeypatch.setattr(torch.Tensor, "item", read)
    assert crossings(monkeypatch, "kd", BATCH_NORM, optim=replace(CLIP, opt=opt), ema=EMA) == []
    assert waits == [torch.bool] * 2  # two steps


def test_no_other_setting_makes_the_host_wait(pretended_cuda, monkeypatch):
    attack = replace(CONFIG.attack, norm="linf", steps=2, order="authors")
    split = replace(BATCH_NORM, bn="split")
    assert crossings(monkeypatch, "dat+dad", split, fused=True, optim=CLIP, attack=attack) == []
    assert crossings(monkeypatch, "dad", replace(LAYER_NORM, drop_path=0.2), fused=True) == []
    for distance in ("l2", "dist"):
        loss = LossConfig(distance=distance)
        assert crossings(monkeypatch, "kd", LAYER_NORM, loss=loss) == []


@pytest.mark.parametrize("codes", [False, True], ids=["images", "codes"])
@pytest.mark.parametrize("outputs", [False, True], ids=["teacher", "outputs"])
def test_no_store_makes_the_host_wait(pretended_cuda, monkeypatch, codes, outputs):
    """Codes are unpacked and decoded, and outputs mixed, inside the step that CUDA graphs
    capture.
    """
    data, dirs = stored(codes, outputs), ("a store",)
    store = StoreConfig(dirs=dirs, mix_outputs=outputs)
    assert crossings(monkeypatch, "dad", LAYER_NORM, given=data, store=store) == []
    assert (
        crossings(
            monkeypatch,
            "dad",
            LAYER_NORM,
            given=data,
            store=store,
            loss=LossConfig(form="joint"),
            fused=True,
        )
        == []
    )


def test_no_missing_label_makes_the_host_wait(pretended_cuda, monkeypatch):
    given = replace(batch(), labels=torch.tensor([1, -1] * (B // 2)))
    for data in (DataConfig(labels="teacher"), DataConfig(extra_data="a folder")):
        how = {"given": given, "fused": True, "data": data}
        assert crossings(monkeypatch, "dad", LAYER_NORM, **how) == []


def test_a_host_wait_is_detected(pretended_cuda, monkeypatch):
    from torch._subclasses.fake_tensor import DataDependentOutputException

    with FakeTensorMode():
        x = torch.zeros(3, device=CUDA)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DataDependentOutputException):
            bool(x.sum() > 0)
        with Crossings() as found:
            x.cpu()
            x.copy_(torch.zeros(3))
            x.fill_(2.0)
            torch.where(x > 0, x, 0.0)
        assert [name for name, _ in found.seen] == ["aten._to_copy.default", "aten.copy_.default"]


@pytest.mark.parametrize(
    "opt, captured", [("adamw", True), ("sgd", True), ("lamb", False), ("rmsprop", False)]
)
def test_capture_needs_learning_rates_on_the_device(pretended_cuda, opt, captured):
    from dad_fast.engine.cuda_graph import StepGraphs
    from dad_fast.errors import EnvironmentProblem

    student = build_student(LAYER_NORM, C, SIDE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        update = Update(move(student), Config(optim=replace(CONFIG.optim, opt=opt)), CUDA)
        assert update.capturable == captured
        if not captured:
            learners = [SimpleNamespace(update=update)]
            assert StepGraphs.if_wanted("auto", CUDA, None, None, learners) is None
            with pytest.raises(EnvironmentProblem, match="--cuda-graphs on: .*learning rate"):
                StepGraphs.if_wanted("on", CUDA, None, None, learners)
