"""The cells of a sweep: names, equal runs, shared stores, and mistakes in one line."""

from pathlib import Path

import pytest

from dad_fast.config import expand, from_toml, to_toml
from dad_fast.config.fields import with_values
from dad_fast.config.resolve import gather
from dad_fast.errors import UsageError
from dad_fast.methods.settings import check
from dad_fast.sweep.ablation import AXES, identity, make_plan, papers_axis
from dad_fast.sweep.runs import make_sweep


def plan_of(axes, values=None, vary=(), preset="demo", **flags):
    cfg = gather(
        preset, None, [], {path.replace("__", "."): value for path, value in flags.items()}
    )
    return make_plan(cfg, axes, values or {}, vary)


def changes(plan, name):
    return plan.config.variants[name]


def test_the_base_is_shared_by_all_axes_and_comes_first():
    plan = plan_of(["components", "filter", "order", "start"])
    assert plan.axes == {
        "components": ["dad", "ce", "kd", "aug-only"],
        "filter": ["dad", "filter=off"],
        "order": ["dad", "order=authors"],
        # "start=1" is the demo's own setting.
        "start": [
            "dad",
            "start=0",
            "start=0.8",
            "noise-only",
            "Q-only",
        ],
    }
    assert next(iter(plan.config.variants)) == "dad" and changes(plan, "dad") == {}
    assert len(expand(plan.config)) == 10
    assert changes(plan, "Q-only") == {"attack.steps": 0, "attack.random_start": 0.0}


def test_a_budget_keeps_the_ratio_of_its_step():
    plan = plan_of([], {"budget": ["0.1", "0.2"]})
    assert plan.axes == {"budget": ["dad", "eps=0.1"]}
    assert changes(plan, "eps=0.1") == {"attack.eps": 0.1, "attack.step_size": 0.075}
    assert changes(plan_of(["budget"]), "eps=0.4") == {"attack.eps": 0.4, "attack.step_size": 0.3}


def test_the_weights_are_a_grid_around_the_base():
    plan = plan_of(["weights"])
    assert len(plan.axes["weights"]) == 9 and "kd=0.5_dad=0.5" not in plan.axes["weights"]
    assert changes(plan, "kd=0.25_dad=1") == {"loss.kd": 0.25, "loss.dad": 1.0}
    assert plan_of([], {"weights": ["0", "1"]}).axes["weights"] == [
        "dad",
        "kd=0_dad=0",
        "kd=0_dad=1",
        "kd=1_dad=0",
        "kd=1_dad=1",
    ]


def test_equal_runs_are_one_cell_under_any_name():
    """The demo's own variants have kd and dad too; kd from stores is another run."""
    plan = plan_of(["components", "variants"])
    assert plan.axes["variants"] == ["dad", "ce", "kd", "kd-stored", "dad-stored"]
    assert len(plan.config.variants) == 6
    # A setting that the method does not use changes nothing.
    plan = plan_of(["components"], vary=["loss.filter=true,false"], method="aug-only")
    assert plan.axes["loss.filter"] == ["aug-only", "filter=false"]
    with pytest.raises(
        UsageError, match="axis filter: no cell of it differs from the base, whose method is kd"
    ):
        plan_of(["filter"], method="kd")


def test_models_get_short_unique_names():
    names = [
        "open_clip:ViT-B-32/openai",
        "open_clip:ViT-L-14@/data/w.safetensors",
        "/models/mine.safetensors",
        "hf-hub:org/m",
    ]
    plan = plan_of([], {"teacher": names})
    assert plan.axes["teacher"][1:] == [
        "teacher=ViT-B-32-openai",
        "teacher=ViT-L-14",
        "teacher=mine",
        "teacher=org-m",
    ]
    assert changes(plan, "teacher=mine") == {"teacher.name": "/models/mine.safetensors"}
    plan = plan_of([], {"discretizer": ["/a/vqgan.ckpt", "/b/vqgan.ckpt", "jpeg:30"]})
    assert plan.axes["discretizer"][1:] == [
        "discretizer=a-vqgan.ckpt",
        "discretizer=b-vqgan.ckpt",
        "discretizer=jpeg-30",
    ]
    assert plan_of(["discretizer"]).axes["discretizer"][1:] == [
        "discretizer=identity",
        "discretizer=jpeg-75",
        "discretizer=webp-75",
        "discretizer=blur-4",
    ]


def test_any_setting_can_be_an_axis():
    plan = plan_of(
        [],
        vary=["loss.temperature=1,4,8", "augment.scale=[0.5,1];[0.7,1.0]", "student.bn=split,aux"],
    )
    assert plan.axes["loss.temperature"] == ["dad", "temperature=1", "temperature=8"]
    assert plan.axes["augment.scale"] == ["dad", "scale=0.5-1"]
    assert changes(plan, "scale=0.5-1") == {"augment.scale": (0.5, 1.0)}
    assert plan.axes["student.bn"] == ["dad", "bn=split", "bn=aux"]


def test_distances_and_methods_are_axes():
    plan = plan_of(["methods", "distance"])
    assert plan.axes["methods"] == ["dad", "dat", "dat+dad", "ard", "rslad"]
    assert plan.axes["distance"] == ["dad", "distance=l2", "distance=dist"]
    assert plan_of([], {"distance": ["l2"]}).axes["distance"] == ["dad", "distance=l2"]
    with pytest.raises(UsageError, match="axis distance: no cell of it differs"):
        plan_of(["distance"], method="dat")
    with pytest.raises(UsageError, match="--distance cosine: no such distance .known: kl, l2"):
        sweep_of(plan_of([], {"distance": ["cosine"]}), ())


def test_augmentations_are_an_axis():
    plan = plan_of(["augmentation"])
    names = ["none", "rand-m9-mstd0.5-inc1", "v0", "ta", "3a", "augmix-m3-w3"]
    names += ["pixmix-k4-b4", "prime"]
    assert {f"aa={name}" for name in names} >= set(plan.axes["augmentation"][1:])
    assert len(plan.axes["augmentation"]) >= len(names)
    assert changes(plan, "aa=ta") == {"augment.aa": "ta"}
    check(plan.config)
    plan = plan_of([], {"augmentation": ["none", "original"]}, augment__aa="rand-m9")
    assert plan.axes["augmentation"] == ["dad", "aa=none", "aa=original"]
    with pytest.raises(UsageError, match="variant aa=tb: --aa tb: no such policy"):
        sweep_of(plan_of([], {"augmentation": ["tb"]}), ())


def test_a_sweep_is_written_as_variants_and_read_again():
    plan = plan_of(
        [name for name in AXES if name not in ("lp-clip", "threshold")], {"teacher": ["timm:x"]}
    )
    again = from_toml(to_toml(plan.config))
    assert expand(again) == expand(plan.config)


def test_identity_ignores_settings_that_the_method_does_not_use():
    dad, kd, ce = (gather("demo", None, [], {"method": name}) for name in ("dad", "kd", "ce"))

    def uses(cfg, **changes):
        return identity(cfg) != identity(with_values(cfg, changes))

    assert uses(dad, **{"loss.dad": 9.0}) and not uses(kd, **{"loss.dad": 9.0})
    assert uses(kd, **{"loss.temperature": 9.0}) and not uses(ce, **{"loss.temperature": 9.0})
    assert uses(dad, **{"loss.filter": False}) and not uses(kd, **{"loss.filter": False})
    assert uses(dad, **{"student.bn": "split"}) and not uses(kd, **{"student.bn": "split"})
    assert uses(ce, **{"loss.ce": 9.0}) and not uses(ce, **{"attack.eps": 9.0})
    assert uses(dad, **{"loss.distance": "l2"}) and not uses(ce, **{"loss.distance": "l2"})
    l2 = with_values(dad, {"loss.distance": "l2"})
    assert not uses(l2, **{"loss.temperature": 9.0})
    rslad = gather("demo", None, [], {"method": "rslad"})
    assert uses(rslad, **{"loss.ard": 9.0}) and not uses(rslad, **{"loss.ce": 9.0})
    assert uses(dad, **{"augment.smoothing": 0.2}) and not uses(rslad, **{"augment.smoothing": 0.2})


def test_identity_of_a_run_ignores_its_seed():
    cfg = gather("demo", None, [], {})
    other = gather("demo", None, [], {"seed": "3", "data.workers": "2", "eval.suites": ["test"]})
    longer = gather("demo", None, [], {"max_steps": "3"})
    assert identity(cfg) == identity(other) != identity(longer)


def sweep_of(plan, stores):
    config = with_values(plan.config, {"store.make": stores})
    check(config)
    return make_sweep(config, Path("out"), plan)


def test_cells_share_stores_of_equal_content():
    sweep = sweep_of(plan_of(["components", "filter", "weights", "budget"]), ("adversarial",))
    dirs = {run.variant: run.cfg.store.dirs for run in sweep.runs}
    assert dirs["ce"] == dirs["kd"] == ()
    shared = {
        dirs[name] for name in dirs if not name.startswith(("ce", "eps", "kd")) or "_" in name
    }
    assert len(shared) == 1 and len({dirs[name] for name in dirs if name.startswith("eps")}) == 3
    assert len(sweep.stores) == 4
    assert all(
        store.folder.startswith("out/stores/adversarial-") and store.launch.views == 1
        for store in sweep.stores
    )


def test_each_kind_of_store_has_its_number_of_views():
    plan = plan_of(["components"], schedule__epochs="7", seeds="2")
    for stores, views in (
        (("adversarial", "targets"), (1, 7)),
        (("adversarial:4", "targets:16"), (4, 16)),
    ):
        sweep = sweep_of(plan, stores)
        forms = [(store.kind, store.launch.views, store.launch.images) for store in sweep.stores]
        assert forms == [("adversarial", views[0], "raw"), ("targets", views[1], "none")]
        assert {run.variant: len(run.cfg.store.dirs) for run in sweep.runs} == {
            "dad": 2,
            "ce": 0,
            "kd": 1,
            "aug-only": 1,
        }
        assert all(not run.cfg.store.make and run.cfg.seed == run.seed for run in sweep.runs)
        assert all(store.config.seed == 0 and not store.config.store.dirs for store in sweep.stores)


MISTAKES = {
    "an unknown axis": (
        lambda: plan_of(["component"]),
        "--axes component: no such axis; did you mean components?",
    ),
    "no teachers": (
        lambda: plan_of(["teacher"]),
        "--axes teacher: name the values: --teachers A B",
    ),
    "a word for a number": (
        lambda: plan_of([], {"budget": ["big"]}),
        "--budgets: attack.eps .* must be a number, or auto, got 'big'",
    ),
    "a strength": (
        lambda: plan_of([], {"strength": ["-1"]}),
        "--strengths -1: a number, 0 or more",
    ),
    "a negative weight": (
        lambda: plan_of([], {"weights": ["-1"]}),
        "--weights: .* must be 0 or more",
    ),
    "an unknown setting": (
        lambda: plan_of([], vary=["loss.temp=1,2"]),
        "--vary loss.temp=1,2: unknown key loss.temp",
    ),
    "no values": (
        lambda: plan_of([], vary=["loss.temperature"]),
        "write --vary section.key=VALUE,VALUE",
    ),
    "an empty value": (
        lambda: plan_of([], vary=["loss.temperature=1,"]),
        "write --vary section.key=VALUE,VALUE",
    ),
    "seeds as a factor": (
        lambda: plan_of([], vary=["seed=1,2"]),
        "no factor of a sweep; use --seeds",
    ),
    "a section": (lambda: plan_of([], vary=["loss=1"]), "loss is a section"),
    "only the base's own value": (
        lambda: plan_of([], vary=["loss.temperature=4"]),
        "no cell of it differs",
    ),
    "a store": (lambda: plan_of(["components"], store__dirs=["x"]), "use --stores"),
    "no variants": (
        lambda: plan_of(["variants"], preset="dad-vitb16"),
        "there are no \\[variants\\]",
    ),
    "no number of views": (
        lambda: sweep_of(plan_of(["filter"]), ("adversarial:0",)),
        "--stores adversarial:0: views are",
    ),
    "stores of a kind that the method does not use": (
        lambda: sweep_of(plan_of(["lp-clip"], preset="lp-clip-demo"), ("targets",)),
        "--stores targets: --method lp-clip learns from no",
    ),
    "a cell that does not fit": (
        lambda: sweep_of(plan_of([], {"discretizer": ["jpeg:101"]}), ()),
        "variant discretizer=jpeg-101: .* from 1 to 100",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(what):
    make, words = MISTAKES[what]
    with pytest.raises(UsageError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_linear_probes_have_axes_of_their_own():
    plan = plan_of(["lp-clip", "strength"], {"threshold": ["0.9"]}, preset="lp-clip-demo")
    assert plan.axes["lp-clip"] == ["lp-clip", "no-weight", "no-strong", "supervised"]
    assert plan.axes["threshold"] == ["lp-clip", "threshold=0.9"]
    assert plan.axes["strength"] == [
        "lp-clip",
        "m=2",
        "m=9",
        "m=15",
    ]
    assert changes(plan, "m=15") == {"augment.aa": "rand-m15-n2-mstd0.5-inc1"}
    assert changes(plan, "no-strong") == {"augment.aa": "", "augment.reprob": 0.0}
    assert papers_axis(plan.config) == "lp-clip"
    assert papers_axis(gather("demo", None, [], {})) == "components"
    with pytest.raises(
        UsageError, match="axis threshold: no cell of it differs from the base, whose method is dad"
    ):
        plan_of(["threshold"])
