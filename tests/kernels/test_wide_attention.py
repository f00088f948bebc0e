"""Attention of one wide head: all ways give the same result, and the table chooses one."""

import pytest

torch = pytest.importorskip("torch")

from dad_fast.kernels import tuning
from dad_fast.kernels import wide_attention as module
from dad_fast.kernels.wide_attention import WAYS, bmm, sdpa, wide_attention, xformers
from tests.numerics import assert_as_exact, error


def exact(q, k, v, scale):
    q, k, v = (tensor.double() for tensor in (q, k, v))
    return (scale * q @ k.transpose(1, 2)).softmax(dim=2) @ v


def written_out(q, k, v, scale):
    """Return the attention in plain torch and the inputs' dtype: its error is the reference."""
    return (scale * q @ k.transpose(1, 2)).softmax(dim=2) @ v


def strided(batch, tokens, width, dtype, device="cpu"):
    """Return q, k, v as from maps [B, C, H, W] in NCHW: the last dimension is not dense."""
    return torch.randn(3, batch, width, tokens, device=device).to(dtype).transpose(2, 3)


@pytest.mark.parametrize("shape", [(2, 49, 64), (1, 1, 8), (3, 33, 300)])
@pytest.mark.parametrize("way", ["sdpa", "bmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ways_agree(shape, way, dtype):
    q, k, v = strided(*shape, dtype)
    # Merged projections make one tensor of k and v.
    for key in (k, v):
        args = (q, key, v, 0.1)
        assert_as_exact(WAYS[way](*args), written_out(*args), exact(*args))


def test_table_chooses_the_way_on_cuda(monkeypatch):
    assert wide_attention(torch.device("cpu"), 512) is sdpa
    cuda = torch.device("cuda")
    monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    assert wide_attention(cuda, 512) is WAYS[tuning.entries("wide_attention", "sm_90")[-1]["way"]]
    table = {
        "wide_attention": {
            "sm_90": [{"max": {"width": 256}, "way": "bmm"}, {"max": {}, "way": "xformers"}]
        }
    }
    monkeypatch.setattr(tuning, "_table", lambda: table)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert wide_attention(cuda, 256) is bmm and wide_attention(cuda, 512) is xformers
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert wide_attention(cuda, 512) is sdpa


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda(way, dtype):
    if way == "xformers":
        pytest.importorskip("xformers.ops")
    q, k, v = strided(4, 784, 512, dtype, "cuda")
    expected = exact(q, k, v, 512**-0.5)
    assert error(WAYS[way](q, k, v, 512**-0.5), expected) < 8 * torch.finfo(dtype).eps
