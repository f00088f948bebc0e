"""Self-test of the kernels at the start of a run: right ones pass, planted faults are replaced.

The kernels themselves run under Triton's interpreter, in a process of their own. Elsewhere torch
stands for them, so that a fault can be planted in each.
"""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from dad_fast.config.schema import AttackConfig, EngineConfig, PrecisionConfig
from dad_fast.discretizers.vqgan.discretizer import VQGANDiscretizer
from dad_fast.discretizers.vqgan.model import VQGANConfig
from dad_fast.engine import self_test
from dad_fast.engine.self_test import Kernels, choose_kernels, faults, step_cases
from dad_fast.errors import EnvironmentProblem
from dad_fast.kernels import (
    cases,
    distillation_loss_triton,
    group_norm_silu,
    group_norm_silu_triton,
    pack_codes_triton,
    pgd_update,
    pgd_update_triton,
)
from dad_fast.kernels import distillation_loss as loss_module
from dad_fast.kernels.pack_codes import pack_torch, unpack_torch, use_triton
from tests.discretizers.test_vqgan import random_vqgan

CPU, SIDE = torch.device("cpu"), 8
SMALLEST = VQGANConfig(
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_levels=(1,),
    z_channels=4,
    embed_dim=4,
    n_embed=32,
    norm_groups=4,
)
AMP = PrecisionConfig(amp=True)


def own():
    return step_cases(CPU, SIDE, 10, AttackConfig(), torch.bfloat16, 4.0)


@pytest.fixture
def discretizer():
    yield VQGANDiscretizer(random_vqgan(SMALLEST), AMP)
    use_triton(True)


@pytest.mark.interpreter
def test_kernels_pass_under_the_interpreter(discretizer):
    # The search, packing, and three norms: the interpreter takes seconds for each.
    some = itertools.islice(discretizer.kernel_cases(SIDE), 5)
    found = faults(itertools.chain(own(), some))
    assert found == dict.fromkeys(found, "") and set(found) == set(cases.NAMES)


# --- torch in place of the kernels ----------------------------------------------------------------


def norm(x, residual, weight, bias, groups, eps, silu, channel_bias, meta=None):
    """As the launcher: float32 inside, NHWC outside."""
    if residual is None:
        arguments = (x, weight, bias, groups, eps)
        return group_norm_silu.group_norm_silu(*arguments, silu=silu, channel_bias=channel_bias), x
    return group_norm_silu.add_group_norm_silu(
        x, residual, weight, bias, groups, eps, silu=silu, channel_bias=channel_bias
    )


LAUNCHERS = {
    cases.PGD_UPDATE: (pgd_update_triton, "launch", pgd_update.reference),
    cases.DISTILLATION_LOSS: (distillation_loss_triton, "launch", loss_module.reference),
    cases.GROUP_NORM_SILU: (group_norm_silu_triton, "launch", norm),
    cases.PACK_CODES: (
        pack_codes_triton,
        "pack",
        lambda codes, bits, counter: (pack_torch(codes, bits),),
    ),
}
BACKWARD = distillation_loss_triton, "launch_backward", loss_module.reference_backward
UNPACK = pack_codes_triton, "unpack", unpack_torch


def raises(outputs):
    raise RuntimeError("Triton Error [CUDA]: misaligned address\nmore")


def nan(outputs):
    first = outputs[0].clone()
    first.view(-1)[-1:] = float("nan") if first.is_floating_point() else first.view(-1)[-1:] + 1
    return first, *outputs[1:]


def slightly_wrong(outputs):
    """One value, 2 % off the largest."""
    first = outputs[0].contiguous().clone()
    last = first.view(-1)[-1:]
    last += 0.02 * first.abs().max() if first.is_floating_point() else 1
    return first, *outputs[1:]


def wrong_dtype(outputs):
    return outputs[0].double(), *outputs[1:]


@pytest.fixture
def launched(monkeypatch):
    """Torch stands for each kernel. Returns a function that plants a fault in one."""

    def put(kernel, fault=None):
        module, name, function = LAUNCHERS[kernel]

        def launch(*args):
            outputs = function(*args)
            outputs = outputs if fault is None else fault(outputs)
            return outputs[0] if kernel == cases.PACK_CODES else outputs

        monkeypatch.setattr(module, name, launch)

    for kernel in LAUNCHERS:
        put(kernel)
    for module, name, function in (BACKWARD, UNPACK):
        monkeypatch.setattr(module, name, function)
    return put


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(self_test, "unavailable", lambda device: "")


def choose(discretizer, kernels="auto"):
    return choose_kernels(EngineConfig(kernels=kernels), CPU, own(), discretizer, SIDE, 8)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_right_kernels_are_used(discretizer, launched, on_gpu, caplog, mode):
    found = choose(discretizer, mode)
    assert found.reasons == dict.fromkeys(found.reasons, "")
    assert set(found.reasons) == set(cases.NAMES) and not caplog.records
    assert discretizer.fused.encoder.conv_in.norm_kernel
    assert found.record()[cases.PGD_UPDATE] == ("kernel", "passed its self-test")


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        *((kernel, slightly_wrong) for kernel in LAUNCHERS),
        (cases.PGD_UPDATE, nan),
        (cases.GROUP_NORM_SILU, raises),
        (cases.DISTILLATION_LOSS, wrong_dtype),
    ],
)
def test_a_wrong_kernel_is_replaced_alone(discretizer, launched, on_gpu, caplog, kernel, fault):
    launched(kernel, fault)
    found = choose(discretizer)
    assert [name for name in cases.NAMES if not found.uses(name)] == [kernel]
    assert found.record()[kernel][0] == "torch" and "\n" not in found.reasons[kernel]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"kernel {kernel} failed its self-test, torch takes its place: ")
    assert discretizer.fused.encoder.conv_in.norm_kernel == (kernel != cases.GROUP_NORM_SILU)


def test_on_refuses_a_wrong_kernel(discretizer, launched, on_gpu):
    launched(cases.PGD_UPDATE, nan)
    with pytest.raises(EnvironmentProblem, match="--kernels on: pgd_update failed its self-test"):
        choose(discretizer, "on")


def test_a_wrong_search_is_replaced(discretizer, launched, on_gpu, monkeypatch):
    search = discretizer.vqgan.search()
    right = search.run

    def off_by_one(latents, *rest):
        codes = right(latents, *rest)
        return torch.cat([codes[:-1], (codes[-1:] + 1) % len(search.codebook)])

    monkeypatch.setattr(search, "run", off_by_one)
    assert not choose(discretizer).uses(cases.CODEBOOK_SEARCH)
    assert discretizer.backend == "torch"


def test_fallbacks_compute_the_same(discretizer, launched, on_gpu):
    pixels = torch.rand(2, 3, SIDE, SIDE)
    before = discretizer(pixels)
    choose(discretizer, "off")
    images, codes = discretizer(pixels)
    assert torch.equal(codes, before.codes) and torch.equal(images, before.images)


def test_off_launches_nothing(discretizer, launched, on_gpu):
    for kernel in LAUNCHERS:
        launched(kernel, raises)
    found = choose(discretizer, "off")
    assert set(found.reasons.values()) == {"--kernels off"} and discretizer.backend == "torch"


def test_a_cpu_uses_torch_and_refuses_on(discretizer):
    backend = discretizer.backend
    found = choose(discretizer)
    assert not any(map(found.uses, cases.NAMES)) and discretizer.backend == backend
    assert "kernels need a CUDA GPU" in str(found.record())
    with pytest.raises(EnvironmentProblem, match="--kernels on: kernels need a CUDA GPU"):
        choose(discretizer, "on")


def test_a_fault_of_another_process_counts_here(discretizer, launched, on_gpu, monkeypatch):
    monkeypatch.setattr(
        self_test.distributed,
        "all_gather_json",
        lambda value: [value, value | {cases.PGD_UPDATE: "wrong on another GPU"}],
    )
    assert choose(discretizer).reasons[cases.PGD_UPDATE] == "wrong on another GPU"


def test_a_step_without_a_self_test_uses_no_kernel():
    assert not any(map(Kernels().uses, cases.NAMES))


@pytest.mark.gpu
def test_cuda_kernels_pass_within_seconds():
    from dad_fast.tools.doctor.numerics import published_cases

    found = faults(published_cases(torch.device("cuda")))
    assert found == dict.fromkeys(found, "") and set(found) == set(cases.NAMES)
