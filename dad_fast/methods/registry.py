"""Training methods: what each learns from, as a set of loss terms. Imports no torch.

A method is a `MethodSpec`. Its terms decide which images a step makes, which models run and which stores help; the
generator, the losses, the checks of settings, the report and the help texts all read this table. To add a method: a
MethodSpec in a file of its own, and a line here. docs/methods.md is made from this table.

    x' attacks the teacher, x'' attacks the student, Q is the discretizer, t the teacher and s the student, D the
    distance of --distance (by default T^2 KL):

    dad      = ce CE(s(x), y) + kd D(s(x), t(x)) + dad D(s(Q(x')), t(Q(x')))
    dat      = ce CE(s(x), y) + dat CE(s(Q(x'')), y)
    aug-only = ce CE(s(x), y) + aug CE(s(Q(x')), y)
    ard      = ce CE(s(x), y) + ard D(s(Q(x')), t(x))
    rslad    = kd D(s(x), t(x)) + ard D(s(Q(x')), t(x))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from dad_fast.registry import Registry


class Images(StrEnum):
    """The images of a batch that a term is computed on."""

    CLEAN = "clean"
    ATTACK_TEACHER = "attack-teacher"  # Q(x'), or stored adversarial images
    ATTACK_STUDENT = "attack-student"  # Q(x''), made anew in every step


class Target(StrEnum):
    """What a term compares the student's logits with."""

    LABELS = "labels"
    TEACHER = "teacher"  # the teacher's logits on the same images
    TEACHER_ON_CLEAN = "teacher-on-clean"  # the teacher's logits on the clean images


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance between the logits of student and teacher, for the terms that compare them.

    formula: of student s and teacher t, for the docs. source: of the formula.
    loss: "module:function" as in `Term.loss`; "" = T^2 KL, which has a kernel.
    uses_temperature: compares probabilities at temperature T, not logits.
    least_batch: images that it needs in a batch.
    """

    name: str
    summary: str
    formula: str
    source: str
    loss: str
    uses_temperature: bool = True
    least_batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a loss: weight * loss(student's logits on `images`, `target`), a mean over the batch.

    weight: the setting that holds the weight, such as "loss.kd", or a number.
    filtered: with `loss.filter`, samples on which the teacher's answer is not the label count 0.
    loss: "module:function" of a function (student [B, C], reference [B, C], keep [B] or None, temperature) -> scalar;
        "" = soft cross-entropy for labels, the distance of `loss.distance` for the teacher's logits.
    """

    name: str
    images: Images
    target: Target
    weight: str | float
    filtered: bool = False
    loss: str = ""

    @property
    def teacher_images(self) -> Images | None:
        """The images on which it takes the teacher's logits; None for labels."""
        if self.target == Target.LABELS:
            return None
        return Images.CLEAN if self.target == Target.TEACHER_ON_CLEAN else self.images

    @property
    def takes_distance(self) -> bool:
        """Whether `loss.distance` decides how it compares."""
        return self.target != Target.LABELS and not self.loss


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A training method.

    summary: a few words for help texts and reports. card_text: a sentence for model cards.
    terms: in the order in which they are added.
    linear_probe: trains a linear layer on the teacher's frozen encoder, by a loss of its own.
    """

    name: str
    summary: str
    card_text: str
    terms: tuple[Term, ...] = ()
    linear_probe: bool = False

    def term_names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    def uses(self, images: Images) -> bool:
        """Whether a term is computed on these images."""
        return any(term.images == images for term in self.terms)

    @property
    def attacks(self) -> bool:
        """Whether it learns from adversarial images."""
        return self.uses(Images.ATTACK_TEACHER) or self.uses(Images.ATTACK_STUDENT)

    @property
    def is_plain(self) -> bool:
        """Whether a student is trained on clean images alone."""
        return not self.attacks and not self.linear_probe

    @property
    def image_kinds(self) -> tuple[Images, ...]:
        """Clean images and those of each attack, in the order of the student's batch."""
        return tuple(kind for kind in Images if kind == Images.CLEAN or self.uses(kind))

    def teacher_logits(self, images: Images) -> bool:
        """Whether a term compares with the teacher's logits on these images."""
        return any(term.teacher_images == images for term in self.terms)

    @property
    def takes_distance(self) -> bool:
        """Whether `loss.distance` matters."""
        return any(term.takes_distance for term in self.terms)

    @property
    def learns_from_teacher(self) -> bool:
        """Whether images without labels teach it anything."""
        return self.linear_probe or any(term.teacher_images for term in self.terms)

    def without_labels(self) -> MethodSpec:
        """Return the method without the terms that compare with labels."""
        return replace(self, terms=tuple(term for term in self.terms if term.teacher_images))

    @property
    def filters(self) -> bool:
        """Whether `loss.filter` matters."""
        return any(term.filtered for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        compares = any(term.teacher_images for term in self.terms)
        return self.linear_probe or compares or self.uses(Images.ATTACK_TEACHER)

    @property
    def needs_discretizer(self) -> bool:
        return self.attacks

    @property
    def store_kinds(self) -> tuple[str, ...]:
        """Kinds of stores that it can learn from.

        Stored adversarial images are of un-augmented images, on which no store has the teacher's logits. So a term
        that compares them with the logits on clean images needs the attack in the step.
        """
        crosses = any(
            term.images == Images.ATTACK_TEACHER and term.teacher_images == Images.CLEAN
            for term in self.terms
        )
        kinds = {
            "adversarial": self.uses(Images.ATTACK_TEACHER) and not crosses,
            "targets": self.teacher_logits(Images.CLEAN),
        }
        return tuple(kind for kind, wanted in kinds.items() if wanted)


CE = Term(name="ce", images=Images.CLEAN, target=Target.LABELS, weight="loss.ce")
KD = Term(name="kd", images=Images.CLEAN, target=Target.TEACHER, weight="loss.kd")
DAD = Term(
    name="dad",
    images=Images.ATTACK_TEACHER,
    target=Target.TEACHER,
    weight="loss.dad",
    filtered=True,
)
AUG = Term(
    name="aug",
    images=Images.ATTACK_TEACHER,
    target=Target.LABELS,
    weight="loss.aug",
    filtered=True,
)
DAT = Term(name="dat", images=Images.ATTACK_STUDENT, target=Target.LABELS, weight="loss.dat")
ARD = Term(
    name="ard",
    images=Images.ATTACK_TEACHER,
    target=Target.TEACHER_ON_CLEAN,
    weight="loss.ard",
    filtered=True,
)

JOINT_TERMS = (CE, KD, DAD)  # of the method that has a joint form, loss.form = "joint"

DISTANCES: Registry[Distance] = Registry("distance", "dad_fast.distances", "--distance")
for _distance in (
    Distance(
        name="kl",
        summary="T² KL of the softmax outputs at temperature T",
        formula="T² Σ_c p_c (log p_c - log q_c), p = softmax(t/T), q = softmax(s/T)",
        source="Hinton et al. 2015, [arXiv 1503.02531](https://arxiv.org/abs/1503.02531)",
        loss="",
    ),
    Distance(
        name="l2",
        summary="squared L2 distance of the centred logits; no temperature",
        formula="1/(2C) Σ_c ((s_c - mean s) - (t_c - mean t))², the limit of kl for T → ∞",
        source="Hinton et al. 2015, [arXiv 1503.02531](https://arxiv.org/abs/1503.02531), section 2.1",
        loss="dad_fast.methods.distances:l2",
        uses_temperature=False,
    ),
    Distance(
        name="dist",
        summary="correlation of the softmax outputs between classes and within classes (DIST)",
        formula="T² (mean over images of 1 - ρ(q_i, p_i) + mean over classes of 1 - ρ(q_:c, p_:c)), "
        "ρ = Pearson's correlation",
        source="Huang et al. 2022, [arXiv 2205.10536](https://arxiv.org/abs/2205.10536)",
        loss="dad_fast.methods.distances:dist",
        least_batch=2,
    ),
):
    DISTANCES.add(_distance.name, _distance)


def with_distance(terms: tuple[Term, ...], name: str) -> tuple[Term, ...]:
    """Return `terms` with the loss of a distance where they take one. Raises UsageError for an unknown distance."""
    loss = DISTANCES[name].loss
    return tuple(replace(term, loss=loss) if term.takes_distance else term for term in terms)


BASELINE = "kd"  # what costs and gains of other methods are compared with
METHODS: Registry[MethodSpec] = Registry("method", "dad_fast.methods", "--method")
for _spec in (
    MethodSpec(
        name="ce",
        summary="cross-entropy alone, no teacher",
        card_text="cross-entropy with the labels, without a teacher",
        terms=(CE,),
    ),
    MethodSpec(
        name="kd",
        summary="cross-entropy and distillation on clean images",
        card_text="plain knowledge distillation",
        terms=(CE, KD),
    ),
    MethodSpec(
        name="aug-only",
        summary="cross-entropy on clean and on attacked, discretized images",
        card_text="cross-entropy with the labels on discrete adversarial images of the teacher, without distillation",
        terms=(CE, AUG),
    ),
    MethodSpec(
        name="dat",
        summary="cross-entropy on clean images and on discrete images that attack the student",
        card_text="discrete adversarial training ([arXiv 2209.07735](https://arxiv.org/abs/2209.07735))",
        terms=(CE, DAT),
    ),
    MethodSpec(
        name="dad",
        summary="kd, and distillation on discrete images that attack the teacher",
        card_text="discrete adversarial distillation ([arXiv 2311.01441](https://arxiv.org/abs/2311.01441))",
        terms=(CE, KD, DAD),
    ),
    MethodSpec(
        name="dat+dad",
        summary="dad, and cross-entropy on discrete images that attack the student",
        card_text="discrete adversarial distillation with discrete adversarial training (arXiv 2311.01441, 2209.07735)",
        terms=(CE, KD, DAD, DAT),
    ),
    MethodSpec(
        name="ard",
        summary="cross-entropy, and the teacher's clean logits on images that attack it",
        card_text="adversarially robust distillation ([arXiv 1905.09747](https://arxiv.org/abs/1905.09747)) on discrete adversarial images of the teacher",
        terms=(CE, ARD),
    ),
    MethodSpec(
        name="rslad",
        summary="the teacher's clean logits on clean images and on those that attack it",
        card_text="robust soft label adversarial distillation ([arXiv 2108.07969](https://arxiv.org/abs/2108.07969)) on discrete adversarial images of the teacher",
        terms=(KD, ARD),
    ),
    MethodSpec(
        name="lp-clip",
        summary="a linear probe on frozen features, by the teacher's pseudo-labels",
        card_text="a linear probe on a frozen image encoder, trained without labels ([arXiv 2309.10361](https://arxiv.org/abs/2309.10361))",
        linear_probe=True,
    ),
):
    METHODS.add(_spec.name, _spec)
