"""Recorded launches: the variants that the report compiles are those that a run compiles."""

import functools
import os

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from dad_fast.discretizers.vqgan.fused import FusedVQGAN
from dad_fast.discretizers.vqgan.gpu_forms import norm_maps
from dad_fast.discretizers.vqgan.model import PRESETS, VQGAN
from dad_fast.kernels.launches import recorded, variants

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm_launches(name):
    """Yield the launches of every norm of a published VQGAN at 224 px."""
    from dad_fast.kernels.group_norm_silu_triton import launch

    with torch.device("meta"):
        fused = FusedVQGAN(VQGAN(PRESETS[name]), encoder=torch.float16, decoder=torch.bfloat16)
    for shape in norm_maps(fused, PRESETS[name], 224):
        size = 2, shape.height, shape.width, shape.channels
        x = empty(*size, dtype=shape.dtype).permute(0, 3, 1, 2)
        weight, bias = empty(shape.channels), empty(shape.channels, dtype=shape.dtype)
        residual, before = x if shape.has_residual else None, bias if shape.has_bias else None
        arguments = x, residual, weight, weight, shape.groups, shape.eps, shape.silu, before
        yield "norm", functools.partial(launch, *arguments)


@pytest.mark.parametrize("name", [pytest.param("f8-16384", marks=pytest.mark.slow), "f16-16384"])
def test_norms_of_a_vqgan_share_their_variants(name):
    """Sizes of maps make no variants: the first step would compile each."""
    found = variants("sm_90", norm_launches(name))
    assert len(found) <= 34
    assert {spec.divisible for spec in found if "merge" in spec.name} == {
        ("partial_ptr", "weight_ptr", "moments_ptr")
    }


def test_a_record_has_what_triton_specializes_on():
    """Pointers and sizes that 16 divides, and ones; compared with Triton's own binder where it has
    a name that is known here."""
    from dad_fast.kernels import pgd_update_triton

    images = empty(1, 3, 32, 32)
    odd = empty(2, 1, 5, 5)
    with recorded("sm_90") as specs:
        pgd_update_triton.launch(images, images, images, "l2", 0.1, 0.1)
        pgd_update_triton.launch(odd, odd, odd, "l2", 0.1, 0.1)
    reduce, _, odd_reduce, _ = specs
    assert reduce.types["delta_ptr"] == "*fp32" and "n" in reduce.divisible
    assert reduce.constants["num_parts"] == 1 and "num_parts" not in reduce.types
    assert "n" not in odd_reduce.divisible and odd_reduce.types["n"] == "i32"
    assert reduce.options == {"num_warps": 8, "enable_fp_fusion": True}
    assert reduce.key != odd_reduce.key


def test_recording_leaves_triton_as_it_was():
    before = triton.JITFunction.run
    with pytest.raises(ZeroDivisionError), recorded("sm_80"):
        raise ZeroDivisionError
    assert triton.JITFunction.run is before


def test_aligned_images_load_128_bits():
    """The variant of a launch at 224 px; an unspecialized one would load 32 bits at a time."""
    pytest.importorskip("triton.backends.nvidia")
    from dad_fast.kernels.cross_compile import compile_triton
    from dad_fast.kernels.pgd_update_triton import report_launches

    (apply,) = (spec for spec in variants("sm_90", report_launches("sm_90")) if "linf" in spec.name)
    text = compile_triton(apply, "sm_90").asm["ptx"]
    loads = [line for line in text.splitlines() if "ld.global" in line]
    assert loads and all(".v4." in line for line in loads)
