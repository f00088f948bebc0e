"""Effect of the attack: the share of codes that it changes, and its size compared with the
encoder's rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dad_fast.data.loaders.loader import Batch
from dad_fast.engine.generator import AttackGenerator, Generator
from dad_fast.engine.learner import Learner
from dad_fast.methods.attack import perturb
from dad_fast.methods.registry import Images

NUM_MEASURED = 16  # images whose codes are compared at a log step


def share_changed(codes: Tensor, reference: Tensor) -> Tensor:
    """Return the share of codes that differ, scalar float32; both int64 [B, h, w].

    It is the attack's true strength (arXiv 2209.07735).
    """
    return (codes != reference).float().mean()


def codes_changed(generator: Generator, learner: Learner, batch: Batch) -> dict[str, float]:
    """Return the share of codes that each attack of the method changes, over a few images.

    For log steps only: it costs two more encoder passes and reads on the host.
    """
    if not isinstance(generator, AttackGenerator) or generator.discretizer is None:
        return {}
    attacked: dict[str, Callable[[Tensor], Tensor]] = {}
    if generator.teacher is not None and batch.dad_outputs is None:
        attacked["codes_changed"] = generator.teacher
    if generator.method.uses(Images.ATTACK_STUDENT):
        attacked["codes_changed_dat"] = learner.in_eval
    if not attacked:
        return {}

    batch = batch.to(learner.device)
    mixed = generator.mixed(batch)
    few = slice(0, NUM_MEASURED)
    inputs = mixed.pixels[few], mixed.targets[few], batch.seeds[few]
    shares = {}
    for name, model in attacked.items():
        how = generator.discretizer, model, generator.attack
        base, perturbed = perturb(*how, *inputs, generator.order)
        with torch.no_grad():
            before = generator.discretizer(base).codes
            after = generator.discretizer(perturbed).codes
        if before is not None and after is not None:
            shares[name] = share_changed(after, before).item()
    return shares


def attack_to_rounding(generator: Generator, learner: Learner, batch: Batch) -> float | None:
    """Return `signal_to_rounding` for a few images of a batch.

    None without an encoder, or where all attacks are stored.
    """
    if not isinstance(generator, AttackGenerator) or generator.discretizer is None:
        return None
    is_stored = batch.dad_outputs is not None and not generator.method.uses(Images.ATTACK_STUDENT)
    encoders = None if is_stored else generator.discretizer.encoders()
    if encoders is None:
        return None
    batch = batch.to(learner.device)
    mixed = generator.mixed(batch)
    few = slice(0, 2)
    model = generator.teacher or learner.in_eval
    how = generator.discretizer, model, generator.attack
    inputs = mixed.pixels[few], mixed.targets[few], batch.seeds[few]
    base, perturbed = perturb(*how, *inputs, generator.order)
    with torch.no_grad():
        return signal_to_rounding(*encoders, base, perturbed).item()


def signal_to_rounding(
    encode: Callable[[Tensor], Tensor],
    encode_exact: Callable[[Tensor], Tensor],
    pixels: Tensor,
    perturbed: Tensor,
) -> Tensor:
    """Return the root mean square of the latents' change by the attack over that of the encoder's
    rounding, scalar float32.

    encode: the encoder as the run uses it. encode_exact: the same in float64 or float32. Below
    about 1 the codes change by rounding as much as by the attack: with an L2 budget of 0.1 at 224
    px this is so in fp16, bf16 and TF32, but not in IEEE float32, which float32 is here.
    """
    exact = encode_exact(pixels).double()
    signal = encode_exact(perturbed).double() - exact
    rounding = encode(pixels).double() - exact
    tiny = torch.finfo(torch.float64).tiny
    return (signal.square().mean().sqrt() / rounding.square().mean().sqrt().clamp(min=tiny)).float()
