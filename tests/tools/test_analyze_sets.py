"""Image sets of `dad-fast analyze` and their comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip")


from dad_fast.config import Config
from dad_fast.config.schema import AttackConfig, PrecisionConfig
from dad_fast.discretizers.identity import Identity
from dad_fast.discretizers.registry import load_discretizer
from dad_fast.errors import DataError
from dad_fast.methods.attack import PGD
from dad_fast.tools.analyze.compare import compare
from dad_fast.tools.analyze.measure import TITLES, Generators, choice, moves
from tests import tiny

CPU = torch.device("cpu")
OPTIONS = {"projections": 32, "resamples": 50, "seed": 0, "progress": lambda done, total: None}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_compare_finds_the_nearer_set_and_zero_for_one_distribution():
    sets = {
        "clean": normal(400, 4, seed=1),
        "near": normal(300, 4, seed=2) + 0.2,
        "far": 2 * normal(350, 4, seed=3),
    }
    found = compare(sets, {"test": normal(500, 4, seed=4) + 0.2}, **OPTIONS)
    assert (found["size"], found["half"]) == (300, 150)
    of = found["tests"]["test"]["sets"]
    floor = found["tests"]["test"]["floor"]
    for measure in ("sw2_squared_corrected", "mmd2"):
        low, high = of["near"][measure]["interval"]
        assert low < 0 < high
        assert (
            of["near"][measure]["value"]
            < of["clean"][measure]["value"]
            < of["far"][measure]["value"]
        )
    # Between N(0, I), N(0.2, I) and N(0, 4 I) in 4 dimensions: 0.2^2 on each axis; and that plus
    # (2 - 1)^2.
    assert of["clean"]["sw2_squared_corrected"]["value"] == pytest.approx(0.04, abs=0.02)
    assert of["far"]["sw2_squared_corrected"]["value"] == pytest.approx(1.04, rel=0.15)
    assert (
        of["near"]["sw2"]["value"] == pytest.approx(floor["sw2"]["value"], rel=0.3)
        and floor["sw2"]["value"] > 0.05
    )
    assert floor["mmd2"]["interval"][0] < 0 < floor["mmd2"]["interval"][1]
    low, high = of["near"]["minus_clean"]["interval"]
    assert high < 0 and of["clean"]["minus_clean"]["value"] == 0
    assert found == compare(sets, {"test": normal(500, 4, seed=4) + 0.2}, **OPTIONS)


@pytest.mark.slow
def test_interval_coverage():
    held: dict[str, list[bool]] = {"clean": [], "near": [], "far": [], "nearer": [], "mmd": []}
    for trial in range(60):
        sets = {
            "clean": normal(200, 4, seed=10 * trial),
            "near": normal(200, 4, seed=10 * trial + 1) + 0.2,
        }
        sets["far"] = 1.5 * normal(200, 4, seed=10 * trial + 2)
        options = {
            "projections": 24,
            "resamples": 60,
            "seed": trial,
            "progress": lambda done, total: None,
        }
        found = compare(sets, {"test": normal(200, 4, seed=10 * trial + 3) + 0.2}, **options)[
            "tests"
        ]["test"]["sets"]
        for name, truth in (("clean", 0.04), ("near", 0.0), ("far", 0.29)):
            low, high = found[name]["sw2_squared_corrected"]["interval"]
            held[name].append(low <= truth <= high)
        held["nearer"].append(
            found["near"]["minus_clean"]["interval"][0]
            <= -0.04
            <= found["near"]["minus_clean"]["interval"][1]
        )
        held["mmd"].append(
            found["near"]["mmd2"]["interval"][0] <= 0 <= found["near"]["mmd2"]["interval"][1]
        )
    assert all(np.mean(one) >= 0.85 for one in held.values()), {
        name: np.mean(one) for name, one in held.items()
    }


def test_compare_refuses_small_and_constant_sets():
    with pytest.raises(DataError, match="few has only 7 images"):
        compare(
            {"clean": normal(30, 2, seed=1), "few": normal(7, 2, seed=1)},
            {"test": normal(30, 2, seed=2)},
            **OPTIONS,
        )
    with pytest.raises(DataError, match="the same"):
        compare({"clean": torch.ones(30, 2)}, {"test": normal(30, 2, seed=2)}, **OPTIONS)


class Line(torch.nn.Module):
    """Linear classifier of pixels with features, like a teacher."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 16 * 16, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels.flatten(1))


def vqgan(folder: Path):
    return load_discretizer(str(tiny.write_vqgan(folder / "vqgan.ckpt")), PrecisionConfig(), CPU)


def test_generators_make_their_sets(tmp_path):
    teacher, student = Line().eval(), Line().eval()
    discretizer = vqgan(tmp_path)
    cfg = Config(attack=AttackConfig(norm="linf", eps=0.3, step_size=0.3, random_start=0.5))
    pixels, labels, keys = (
        torch.rand(6, 3, 16, 16),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.arange(6),
    )
    assert Generators(cfg, teacher, discretizer, None).names == [
        "clean",
        "q_clean",
        "random_q",
        "dad",
    ]
    made = Generators(cfg, teacher, discretizer, student)(pixels, labels, keys)
    assert list(made) == ["clean", "q_clean", "random_q", "dat", "dad"] == list(TITLES)
    assert made["clean"].images is pixels and made["clean"].changed is None
    plain = discretizer(pixels)
    assert made["q_clean"].images.equal(plain.images)
    noise = PGD("linf", 0.3, 0.3, steps=0, random_start=1.0)(teacher, pixels, labels, keys)
    assert made["random_q"].images.equal(discretizer(noise).images) and not noise.equal(pixels)
    for name, model in (("dat", student), ("dad", teacher)):
        attacked = discretizer(PGD.from_config(cfg.attack)(model, pixels, labels, keys))
        assert made[name].images.equal(attacked.images)
        assert made[name].changed.allclose((attacked.codes != plain.codes).float().mean(dim=(1, 2)))
    assert not made["dat"].images.equal(made["dad"].images)


def test_in_the_authors_order_the_second_pass_alone_changes_no_code(tmp_path):
    discretizer = vqgan(tmp_path)
    cfg = Config(attack=AttackConfig(eps=0.0, order="authors"))
    made = Generators(cfg, Line().eval(), discretizer, None)(
        torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), torch.arange(2)
    )
    assert made["random_q"].changed.sum() == 0 and made["dad"].changed.sum() == 0


def test_discretizer_without_codes_has_no_changed_share():
    made = Generators(Config(), Line().eval(), Identity(), None)(
        torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), torch.arange(2)
    )
    assert made["dad"].changed is None and made["q_clean"].images.equal(made["clean"].images)


def test_choice_and_moves():
    ok = np.array([True, False, True, True, False, True])
    assert sorted(choice(ok, 10, 0)) == [0, 2, 3, 5] and len(choice(ok, 2, 0)) == 2
    assert not np.array_equal(choice(np.ones(50, bool), 50, 0), np.arange(50))
    before, after = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 2, 1, 1, 2])
    assert moves(before, after, ("a", "b", "c")) == [("c", "b", 2), ("a", "b", 1), ("b", "c", 1)]
    assert (
        moves(before, after, ("a", "b", "c"), most=1) == [("c", "b", 2)]
        and moves(before, before, "abc") == []
    )
