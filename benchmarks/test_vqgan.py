"""VQGAN: plain, each optimization of the fused form, all of them, torch.compile; its group norm,
upsampling, attention.

At size tiny the embedded VQGAN on 28-px digits, and f8 with random weights on a 48-px image; else
f8 or f16 with random weights at 224 px.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import Bench
from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.fused_layers import Recipe, Sum, Up, VQGANOptimizations
from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN, Upsample
from dad_fast.kernels.group_norm_silu import add_group_norm_silu
from dad_fast.kernels.wide_attention import WAYS
from dad_fast.models.weights.files import asset

# On a GPU; CPUs have fast bfloat16 at best.
DTYPES = {
    "encode": torch.float16,
    "decode": torch.bfloat16,
}


def _model(bench: Bench, which: str) -> tuple[str, VQGAN, int, int]:
    """Return name, model, batch and side."""
    if which == "embedded":
        if bench.size != "tiny":
            pytest.skip("size tiny")
        return (
            "embedded",
            VQGAN.load(asset("digits-vqgan.safetensors"))
            .to(bench.device)
            .eval()
            .requires_grad_(False),
            100,
            28,
        )
    name = {"tiny": "f8-16384", "base": "f16-1024", "paper": "f8-16384"}[bench.size]
    torch.manual_seed(0)
    vqgan = VQGAN(PRESETS[name]).to(bench.device).eval().requires_grad_(False)
    return (name, vqgan, 1, 48) if bench.size == "tiny" else (name, vqgan, 64, 224)


def _count(model: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """Count FLOP per image on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model(inputs[:1].to("meta"))
    return float(counter.get_total_flops())


@pytest.mark.parametrize("what", ["encode", "decode"])
@pytest.mark.parametrize("precision", ["16 bits", "float32"])  # runs on a GPU use 16 bits
@pytest.mark.parametrize("which", ["embedded", "published"])
def test_vqgan(bench: Bench, which: str, precision: str, what: str) -> None:
    if precision == "16 bits" and bench.size == "tiny":
        pytest.skip("not at size tiny, whose CPU says little of 16 bits on a GPU")
    name, vqgan, batch, side = _model(bench, which)
    dtype = (
        torch.float32
        if precision == "float32"
        else DTYPES[what]
        if bench.device.type == "cuda"
        else torch.bfloat16
    )
    pixels = torch.rand(batch, 3, side, side, device=bench.device)
    codes = torch.randint(
        vqgan.config.n_embed,
        (batch, side // vqgan.downsample, side // vqgan.downsample),
        device=bench.device,
    )
    inputs = pixels if what == "encode" else codes

    def autocast() -> AbstractContextManager[None]:
        return torch.autocast(
            bench.device.type,
            torch.bfloat16 if dtype == torch.float32 else dtype,
            enabled=dtype != torch.float32,
        )

    def run(model: Callable[[Tensor], Tensor], inputs: Tensor = inputs) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad(), autocast():
                return model(inputs)

        return call

    names = [field.name for field in fields(VQGANOptimizations)]
    if bench.device.type == "cpu":
        names.remove("norm_kernel")  # on a CPU it equals the composition
    forms = {
        name: replace(VQGANOptimizations.none(), **{name: True})
        for name in names
        if name != "cast" or dtype != torch.float32
    }
    forms["fused"] = VQGANOptimizations()
    if "norm_kernel" in names:
        forms["fused + norm_kernel"] = VQGANOptimizations(norm_kernel=True)
    plain: Callable[[Tensor], Tensor] = getattr(vqgan, what)
    functions, flops = {"plain": run(plain)}, {}
    with torch.device("meta"):
        shape = VQGAN(vqgan.config)
    flops["plain"] = _count(getattr(shape, what), inputs)
    for form, savings in forms.items():
        fused = FusedVQGAN(vqgan, savings, encoder=dtype, decoder=dtype)
        functions[form] = run(getattr(fused, what))
        counted = FusedVQGAN(shape, replace(savings, norm_kernel=False))
        flops[form] = _count(getattr(counted, what), inputs)
    # Compiling takes minutes, on a CPU many.
    if bench.device.type == "cuda" and dtype != torch.float32:
        fused = FusedVQGAN(vqgan, VQGANOptimizations(), encoder=dtype, decoder=dtype)
        functions["torch.compile(plain)"] = run(torch.compile(plain))
        functions["torch.compile(fused)"] = run(torch.compile(getattr(fused, what)))
        flops |= {"torch.compile(plain)": flops["plain"], "torch.compile(fused)": flops["fused"]}
    bench.compare(
        f"{name}, {what}, {str(dtype)[6:]}",
        functions,
        baseline="plain",
        work=batch,
        config={
            "batch_size": batch,
            "img_size": side,
            "dtype": str(dtype)[6:],
            "weights": "trained" if which == "embedded" else "random",
        },
        flops=flops,
        graph=True,
        seconds=15,
    )


@pytest.mark.parametrize("channels", [128, 256, 512])
def test_group_norm(bench: Bench, channels: int) -> None:
    """Convolution bias, residual, group norm, SiLU on the maps of f8 at 224 px."""
    batch, side = (1 if bench.size == "tiny" else 64), {128: 224, 256: 112, 512: 28}[channels]
    dtype = torch.float16 if bench.device.type == "cuda" else torch.bfloat16
    x, residual = (
        torch.randn(batch, channels, side, side, device=bench.device, dtype=dtype).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    weight, bias, channel_bias = torch.randn(3, channels, device=bench.device)
    half = [tensor.to(dtype) for tensor in (weight, bias, channel_bias)]

    def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + half[2].view(1, -1, 1, 1) + residual
        return F.silu(F.group_norm(total, 32, half[0], half[1], 1e-6)), total

    compiled = torch.compile(plain)
    functions: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(x, residual),
        "torch.compile": lambda: compiled(x, residual),
    }
    predicted = {"torch.compile": 10 / 22}  # bytes an element: see group_norm_silu.py
    if bench.device.type == "cuda":
        functions["triton"] = lambda: add_group_norm_silu(
            x, residual, weight, bias, 32, 1e-6, channel_bias=channel_bias
        )
        predicted["triton"] = predicted["torch.compile"]
    config = {"batch_size": batch, "channels": channels, "side": side, "dtype": str(dtype)[6:]}
    bench.compare(
        f"bias + residual + group norm + SiLU, {channels} channels",
        functions,
        baseline="plain",
        work=batch,
        predicted=predicted,
        config=config,
        graph=True,
    )


@pytest.mark.parametrize("channels", [256, 512])
def test_upsample(bench: Bench, channels: int) -> None:
    batch, side = (1 if bench.size == "tiny" else 64), {256: 56, 512: 28}[channels]
    dtype = torch.bfloat16
    x = torch.randn(batch, channels, side, side, device=bench.device, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    plain = Upsample(channels).to(bench.device).requires_grad_(False)
    forms = {
        name: Up(plain, Recipe(VQGANOptimizations(upsample=on), dtype))
        for name, on in (("plain", False), ("transposed", True))
    }
    functions = {name: lambda form=form: form(Sum(x)).total() for name, form in forms.items()}
    flops = {
        name: 2.0 * taps * channels**2 * (2 * side) ** 2
        for name, taps in (("plain", 9), ("transposed", 4))
    }
    config = {"batch_size": batch, "channels": channels, "side": side, "dtype": str(dtype)[6:]}
    bench.compare(
        f"upsample, {channels} channels",
        functions,
        baseline="plain",
        work=batch,
        config=config,
        flops=flops,
        graph=True,
    )


@pytest.mark.parametrize("tokens", [196, 784])
def test_attention(bench: Bench, tokens: int) -> None:
    """One head of width 512, with k = v."""
    batch = 2 if bench.size == "tiny" else 64
    dtype = torch.float16 if bench.device.type == "cuda" else torch.bfloat16
    q, h = torch.randn(2, batch, tokens, 512, device=bench.device, dtype=dtype)
    ways = dict(WAYS)
    # Not installed, or not built for this torch: xformers raises each of the three.
    try:
        if bench.device.type != "cuda":
            raise ImportError("needs CUDA")
        ways["xformers"](q, h, h, 512**-0.5)
    except (ImportError, ValueError, NotImplementedError):
        del ways["xformers"]
    functions = {name: lambda way=way: way(q, h, h, 512**-0.5) for name, way in ways.items()}
    flops = dict.fromkeys(ways, 4.0 * tokens**2 * 512)
    config = {"batch_size": batch, "tokens": tokens, "width": 512, "dtype": str(dtype)[6:]}
    bench.compare(
        f"attention, {tokens} tokens",
        functions,
        baseline="sdpa",
        work=batch,
        config=config,
        flops=flops,
        graph=True,
    )
