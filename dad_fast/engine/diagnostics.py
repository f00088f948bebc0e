"""Effect of the attack: the share of codes, pixels and predictions that it changes, and its size
compared with the encoder's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dad_fast.config.schema import AttackConfig
from dad_fast.data.loaders.loader import Batch
from dad_fast.discretizers.base import Discretized, Discretizer
from dad_fast.distributed import process_group as distributed
from dad_fast.engine.fidelity import Fidelity, measure_fidelity
from dad_fast.engine.generator import AttackGenerator, Generator
from dad_fast.engine.learner import Learner
from dad_fast.methods.attack import PGD, perturb
from dad_fast.methods.registry import Images

NUM_MEASURED = 16  # images whose codes are compared at a log step
HALF_LEVEL = 0.5 / 255
# An attack that changes smaller shares of codes or pixels, and of predictions (one of 16 may be a
# tie), is worth a warning. A budget that changes at least ENOUGH is then named: the paper's attack
# changes 4 % of a VQGAN's codes.
NEXT_TO_NOTHING, FEW_ANSWERS, ENOUGH = 0.01, 0.1, 0.04
STRONGER = (2, 4, 8, 16, 32, 64)


def share_changed(codes: Tensor, reference: Tensor) -> Tensor:
    """Return the share of codes that differ, scalar float32; both int64 [B, h, w].

    It is the attack's true strength (arXiv 2209.07735).
    """
    return (codes != reference).float().mean()


def codes_changed(
    generator: Generator, learner: Learner, batch: Batch, known: dict[str, float]
) -> dict[str, float]:
    """Return the share of codes that each attack of the method changes, over a few images.

    For log steps only: it costs two more encoder passes and reads on the host. known: shares of
    attacks on the teacher for this batch, which do not depend on the learner; filled here.
    """
    shares = {}
    for suffix, attacked in _attacks(generator, learner, batch).items():
        name = f"codes_changed{suffix}"
        if name not in known:
            before, after = attacked.discretized(attacked.attack)
            if before.codes is None or after.codes is None:
                continue
            shares[name] = share_changed(after.codes, before.codes).item()
            if not suffix:
                known[name] = shares[name]
        else:
            shares[name] = known[name]
    return shares


class Effect(NamedTuple):
    """Effect of an attack on a few images, against the same images without it."""

    changed: float  # share of codes, or of values by half a level of 8 bits or more
    unit: str  # "codes" or "pixel values"
    answers: float  # share of images whose predicted class changes
    stronger: tuple[float, float] | None  # a budget that changes more, and its share of changes

    @property
    def is_weak(self) -> bool:
        """True if Q(x') is practically Q(x), also to the attacked model."""
        return self.changed < NEXT_TO_NOTHING and self.answers < FEW_ANSWERS


def attack_effects(generator: Generator, learner: Learner, batch: Batch) -> dict[str, Effect]:
    """Return the effect of each attack of the method on a few images, by its suffix in the log.

    Empty where all attacks are stored. For the first step only: it tries stronger attacks where one
    changes next to nothing.
    """
    attacks = _attacks(generator, learner, batch)
    return {suffix: attacked.measure() for suffix, attacked in attacks.items()}


def discretizer_fidelity(generator: Generator, learner: Learner, batch: Batch) -> Fidelity | None:
    """Compare a few images before and after the discretizer; None where all attacks are stored."""
    for attacked in _attacks(generator, learner, batch).values():
        return measure_fidelity(attacked.discretizer, attacked.inputs[0])
    return None


def warning_of_weakness(effect: Effect, attack: AttackConfig, discretizer: str) -> str | None:
    """Return a warning if the attack leaves the discretized images practically as they are."""
    # A budget of 0 is a choice: Q alone.
    if not effect.is_weak or attack.eps == 0:
        return None
    fix = "raise --attack-eps and --attack-step-size"
    if effect.stronger is not None:
        eps, changed = effect.stronger
        step_size = attack.step_size * eps / attack.eps
        fix += f", for instance to {eps:g} and {step_size:g}, which change {changed:.0%}"
    return (
        f"the attack ({attack.norm}, --attack-eps {attack.eps:g}) changes next to nothing after "
        f"{discretizer}: {effect.changed:.2%} of the {effect.unit} and {effect.answers:.0%} of the "
        f"predictions on the first images; {fix}"
    )


@dataclass(frozen=True)
class Attacked:
    """Images of a batch, and a model that is attacked on a few of them."""

    discretizer: Discretizer
    model: Callable[[Tensor], Tensor]
    attack: PGD
    order: Literal["paper", "authors"]
    inputs: tuple[Tensor, Tensor, Tensor]  # pixels, targets, keys

    def perturbed(self, attack: PGD, count: int = NUM_MEASURED) -> tuple[Tensor, Tensor]:
        """Return `count` images before and after the attack, not discretized."""
        pixels, targets, keys = (given[:count] for given in self.inputs)
        return perturb(self.discretizer, self.model, attack, pixels, targets, keys, self.order)

    @torch.no_grad()
    def discretized(self, attack: PGD) -> tuple[Discretized, Discretized]:
        """Return the images before and after the attack, discretized."""
        base, perturbed = self.perturbed(attack)
        return self.discretizer(base), self.discretizer(perturbed)

    def measure(self) -> Effect:
        """Return the effect of the attack; with a budget that changes more where it is weak."""
        effect = self._effect(self.attack)
        return effect._replace(stronger=self._visible_budget()) if effect.is_weak else effect

    @torch.no_grad()
    def _effect(self, attack: PGD) -> Effect:
        before, after = self.discretized(attack)
        if before.codes is not None and after.codes is not None:
            unit, changed = "codes", share_changed(after.codes, before.codes)
        else:
            difference = (after.images - before.images).abs()
            unit, changed = "pixel values", (difference >= HALF_LEVEL).float().mean()
        predicted = [self.model(found.images).argmax(dim=-1) for found in (before, after)]
        answers = (predicted[0] != predicted[1]).float().mean()
        return Effect(changed.item(), unit, answers.item(), stronger=None)

    def _visible_budget(self) -> tuple[float, float] | None:
        """Return the first of doubled budgets that changes enough, and its share of changes."""
        for factor in STRONGER:
            eps, step_size = self.attack.eps * factor, self.attack.step_size * factor
            changed = self._effect(replace(self.attack, eps=eps, step_size=step_size)).changed
            if changed >= ENOUGH:
                return eps, changed
        return None


def _attacks(generator: Generator, learner: Learner, batch: Batch) -> dict[str, Attacked]:
    """Return the attacks that the method makes online, by their suffix in the log."""
    if not isinstance(generator, AttackGenerator) or generator.discretizer is None:
        return {}
    models: dict[str, Callable[[Tensor], Tensor]] = {}
    attacks_teacher = generator.method.uses(Images.ATTACK_TEACHER) and batch.dad_outputs is None
    if attacks_teacher and generator.teacher is not None:
        models[""] = generator.teacher
    if generator.method.uses(Images.ATTACK_STUDENT):
        models["_dat"] = learner.in_eval
    if not models:
        return {}

    batch = batch.to(learner.device)
    mixed = generator.clean(batch).mixed
    inputs = mixed.pixels, mixed.targets, batch.seeds
    how = generator.attack, generator.order, inputs
    return {
        suffix: Attacked(generator.discretizer, model, *how) for suffix, model in models.items()
    }


def cause_of_non_finite(generator: Generator, learner: Learner, batch: Batch | None) -> str:
    """Describe why a loss or gradient is not finite, and what to do. A collective.

    batch: that of the last step, whose inputs are made again.
    """
    found = None if batch is None else _non_finite_part(generator, learner, batch)
    causes = filter(None, distributed.all_gather_json(found))
    return next(causes, "lower --lr, set --clip-grad, or check the data and the weights")


def _non_finite_part(generator: Generator, learner: Learner, batch: Batch) -> str | None:
    """Describe what is not finite before the student's forward pass: its weights, the teacher's
    logits or the images. None where all are finite.
    """
    for name, tensor in learner.student.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"the student's {name} is not finite: check the weights that it started from"

    batch = batch.to(learner.device).split(learner.num_micro_batches)[0]
    inputs = generator(batch)
    stored = {
        Images.CLEAN: batch.clean_outputs is not None,
        Images.ATTACK_TEACHER: batch.dad_outputs is not None,
    }
    for kind, logits in inputs.teacher.items():
        if bad := _num_non_finite(logits):
            source, fix = "the teacher's outputs", "check the weights of --teacher"
            if stored[kind]:
                source, fix = "the stored teacher's outputs", "check it with dad-fast store verify"
            on = "clean images" if kind is Images.CLEAN else "attacked images"
            return f"{source} on {bad} of {len(logits)} {on} are not finite: {fix}"
    for kind, images in inputs.images.items():
        if bad := _num_non_finite(images):
            # Pixels are 8-bit: not clean images, but a linear probe's features.
            what = "features of clean images" if kind is Images.CLEAN else "attacked images"
            fix = "check the weights of --teacher and --discretizer"
            return f"{bad} of {len(images)} {what} are not finite: {fix}"
    return None


def _num_non_finite(rows: Tensor) -> int:
    return int((~rows.isfinite()).flatten(1).any(dim=1).sum())


def attack_to_rounding(generator: Generator, learner: Learner, batch: Batch) -> float | None:
    """Return `signal_to_rounding` for a few images of a batch.

    None without an encoder, or where all attacks are stored.
    """
    for attacked in _attacks(generator, learner, batch).values():
        encoders = attacked.discretizer.encoders()
        if encoders is not None:
            pair = attacked.perturbed(attacked.attack, count=2)
            with torch.no_grad():
                return signal_to_rounding(*encoders, *pair).item()
    return None


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
