"""Configuration: layers, types, messages, TOML round trip, variants."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dad_fast.config import Config, differences, expand, from_toml, preset_names, to_toml
from dad_fast.config.fields import get, settings, with_values
from dad_fast.config.resolve import Layers, gather, preset_text
from dad_fast.config.variants import RESUME_SAFE
from dad_fast.errors import UsageError
from dad_fast.evaluation.public_models import table
from dad_fast.methods.settings import check, resolve

FITS = {
    "data.data_dir": "embedded:digits",
    "student.name": "resnet10t",
    "teacher.name": "embedded:digits",
    "discretizer.name": "identity",
}
ON_EMBEDDED_DATA = {"demo", "lp-clip-demo", "lp-clip-sweep"}
# Presets of our own, which follow no paper.
FOR_OWN_IMAGES = {"finetune", "dad-clip-vitb16", "dad-swsl-rn50", "dad-small"}
PRESETS = {
    *ON_EMBEDDED_DATA,
    "dad-vitb16",
    "dad-dist-vitb16",
    "dad-rn50",
    "ard-vitb16",
    "rslad-vitb16",
    "kd-vitb16",
    "dat-vitb16",
    "dad-authors-online",
    "lp-clip-head",
    "lp-clip-vitl14",
}


def config(*sets: str, **values: object) -> Config:
    return resolve(
        None,
        None,
        list(sets),
        {**FITS, **{path.replace("__", "."): value for path, value in values.items()}},
    )


def error(*sets: str, **values: object) -> str:
    with pytest.raises(UsageError) as caught:
        config(*sets, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_precedence_defaults_preset_file_set_flag(tmp_path: Path) -> None:
    file = write(tmp_path, "[optim]\nlr = 0.02\nweight_decay = 0.2\nclip_grad = 2\n")
    cfg = gather(
        "dad-vitb16",
        file,
        ["optim.weight_decay=0.3", "optim.clip_grad=3"],
        {"optim.clip_grad": "4"},
    )
    # From the defaults, from the preset, and from file, --set and flag.
    assert cfg.optim.momentum == Config().optim.momentum
    assert cfg.schedule.epochs == 30
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.clip_grad) == (0.02, 0.3, 4.0)


def test_later_presets_and_files_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[optim]\nlr = 0.02\nclip_grad = 2.0\n")
    second.write_text("[optim]\nlr = 0.03\n")
    cfg = gather(["dad-vitb16", "dad-rn50"], [first, second], [], {})
    # Of the first preset nothing is left that the second sets.
    assert cfg.student.name == gather("dad-rn50", None, [], {}).student.name
    assert (cfg.optim.lr, cfg.optim.clip_grad) == (0.03, 2.0)
    assert gather(None, [second, first], [], {}).optim.lr == 0.02


def test_the_later_of_lr_and_lr_base_decides(tmp_path: Path) -> None:
    file = write(tmp_path, "[optim]\nlr_base = 0.02\n[variants.a]\noptim.lr = 0.5\n")
    of_file = gather("dad-vitb16", file, [], {})
    assert of_file.optim.lr_base == 0.02
    assert [run.optim.lr_base for _, _, run in expand(of_file)] == [0.0]
    later = gather("dad-vitb16", file, [], {"optim.lr": "0.1"})
    assert (later.optim.lr, later.optim.lr_base, later.variants["a"]) == (0.1, 0.0, {})
    base = gather("dad-vitb16", file, [], {"optim.lr_base": "0.1"})
    assert [run.optim.lr_base for _, _, run in expand(base)] == [0.1]
    # A run's config.toml holds both.
    assert from_toml(to_toml(base)).optim.lr_base == 0.1


def test_the_last_set_wins() -> None:
    assert config("optim.lr=1", "optim.lr=2").optim.lr == 2.0


def test_types_from_text() -> None:
    cfg = config(
        *(
            "optim.lr=3e-4",
            "data.batch_size=1_000",
            "eval.suites=test,optdigits",
            "augment.scale=0.5,1",
            "precision.amp=yes",
        ),
        *(
            "student.model_kwargs={a = 1, b = 'x'}",
            "student.model_kwargs.c=true",
            "student.model_kwargs.d=text",
            "teacher.templates=['a {}']",
        ),
        *('augment.aa="rand-m9"', "data.class_map=/a b/c=d.csv"),
    )
    assert (cfg.optim.lr, cfg.data.batch_size) == (3e-4, 1000)
    assert (cfg.eval.suites, cfg.augment.scale) == (("test", "optdigits"), (0.5, 1.0))
    assert cfg.student.model_kwargs == {"a": 1, "b": "x", "c": True, "d": "text"}
    assert cfg.teacher.templates == ("a {}",)
    assert cfg.precision.amp
    assert (cfg.augment.aa, cfg.data.class_map) == ("rand-m9", "/a b/c=d.csv")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", "on"), ("false", "off"), ("'on'", "on"), ("'off'", "off"), ("'auto'", "auto")],
)
def test_switches_read_files_of_earlier_versions(text: str, expected: str) -> None:
    cfg = from_toml(f"[precision]\namp = {text}\n[engine]\ntorchcompile = {text}")
    assert cfg.precision.amp == cfg.engine.torchcompile == expected
    assert bool(cfg.precision.amp) == (expected == "on")
    assert from_toml(to_toml(cfg)) == cfg


def test_torchcompile_takes_the_name_of_a_backend() -> None:
    cfg = from_toml("[engine]\ntorchcompile = 'aot_eager'")
    assert cfg.engine.torchcompile == "aot_eager" and from_toml(to_toml(cfg)) == cfg
    for value in ("'a b'", "2.5", "''"):
        with pytest.raises(UsageError, match="--torchcompile.*auto, on, off, or a name, got"):
            from_toml(f"[engine]\ntorchcompile = {value}")


def test_types_from_toml(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "eval.suites = []\noptim.lr = 1\n"
        '[teacher]\ntemplates = ["a {}", "b {}"]\n[augment]\nscale = [1, 1]\n',
    )
    cfg = resolve(None, file, [], FITS)
    assert isinstance(cfg.optim.lr, float)
    assert (cfg.teacher.templates, cfg.augment.scale) == (("a {}", "b {}"), (1.0, 1.0))


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[data]\nbatch_size = 2.5",
            "data.batch_size (--batch-size) must be a whole number, or auto, got 2.5",
        ),
        ("[data]\nbatch_size = true", "must be a whole number"),
        ("[data]\ndata_dir = 3", "must be text"),
        ("[precision]\namp = 1", "must be one of auto, on, off"),
        ("[optim]\nlr = nan", "must be a finite number"),
        ("[augment]\nscale = [0.1]", "needs 2 values"),
        ("[augment]\nscale = 0.1", "must be a list"),
        ("[eval]\nsuites = [1]", "must be text"),
        ("[student]\nmodel_kwargs = 1", "must be a table"),
        ("[attack]\norder = 'ours'", "must be one of paper, authors"),
        ("data = 3", "data is a section"),
        ("[optimizer]\nlr = 1", "unknown section [optimizer]; did you mean optim"),
        ("[optim]\nlearning_rate = 1", "unknown key optim.learning_rate; did you mean --lr?"),
        (
            "[optim]\nwieght_decay = 1",
            "unknown key optim.wieght_decay; did you mean optim.weight_decay?",
        ),
        ("[data]\nepochs = 1", "unknown key data.epochs; did you mean schedule.epochs?"),
        ("seed = 1\nlr = ]", "not valid TOML: invalid value (at line 2"),
        ("variants = 3", "variants holds tables"),
        ("[variants.a]\nseed = 3", "seed cannot differ between variants"),
        (
            "[variants.a]\noptim.lrr = 3",
            "variants.a: unknown key optim.lrr; did you mean optim.lr?",
        ),
        ("[variants.'a/b']\nmethod = 'ce'", "'a/b' cannot be a variant's name"),
    ],
)
def test_wrong_file_is_named_with_the_key(tmp_path: Path, toml: str, message: str) -> None:
    file = write(tmp_path, toml)
    with pytest.raises(UsageError) as caught:
        resolve(None, file, [], FITS)
    assert str(caught.value).startswith(str(file)) and message in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "x.toml", "no such file"),
        (Path("demo"), "no such file; did you mean --preset demo?"),
    ]:
        with pytest.raises(UsageError) as caught:
            resolve(None, path)
        assert message in str(caught.value)
    (tmp_path / "latin.toml").write_bytes(b"data.data_dir = '\xe9'")
    with pytest.raises(UsageError, match="cannot be read as text"):
        resolve(None, tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.batch_size", "0", "--batch-size must be 1 or more"),
        ("optim.lr", "0", "--lr must be above 0"),
        ("loss.temperature", "0", "--temperature must be above 0"),
        ("augment.hflip", "1.5", "--hflip must be between 0 and 1"),
        ("attack.eps", "-0.1", "--attack-eps must be 0 or more"),
        ("attack.steps", "-1", "--attack-steps must be 0 or more"),
        ("attack.random_start", "2", "--attack-random-start must be between 0 and 1"),
        ("schedule.epochs", "0", "--epochs must be 1 or more"),
        ("augment.scale", ["0.5", "0.1"], "--scale must be two numbers above 0"),
        ("seeds", "0", "--seeds must be 1 or more"),
        ("method", "dda", "--method dda: no such method; did you mean"),
        ("teacher.name", "", "--method dad needs a teacher: add --teacher"),
        ("discretizer.name", "", "--method dad needs a discretizer: add --discretizer"),
        ("data.data_dir", "", "add --data-dir"),
        ("student.name", "", "add --student"),
        ("data.data_dir", "embedded:cats", "use embedded:digits"),
        ("teacher.name", "openclip:ViT-B-32/x", "unknown kind openclip:; did you mean open_clip?"),
        ("teacher.name", "timm:", "a name is missing"),
        ("discretizer.name", "jpeg:0", "from 1 to 100"),
        ("device", "gpu", "--device gpu: must be auto, cpu"),
        ("schedule.warmup_epochs", "400", "--warmup-epochs 400 is more than --epochs 300"),
    ],
)
def test_wrong_value_is_reported_with_its_flag(path: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(None, None, [], {**FITS, path: value})
    assert message in str(caught.value)


def test_methods_require_only_used_components() -> None:
    alone = {key: value for key, value in FITS.items() if key.startswith(("data", "student"))}
    assert resolve(None, None, [], {**alone, "method": "ce"}).method == "ce"
    with pytest.raises(UsageError, match="dat needs a discretizer"):
        resolve(None, None, [], {**alone, "method": "dat"})
    with_discretizer = {**alone, "discretizer.name": "jpeg:75"}
    assert resolve(None, None, [], {**with_discretizer, "method": "dat"}).method == "dat"
    with pytest.raises(UsageError, match="kd needs a teacher"):
        resolve(None, None, [], {**alone, "method": "kd"})


def test_mixing_needs_an_even_batch() -> None:
    assert "--batch-size 5: must be even" in error("data.batch_size=5", "augment.mixup=0.8")
    assert config("data.batch_size=5").data.batch_size == 5


def test_set_messages() -> None:
    assert "write --set section.key=value" in error("optim.lr")
    assert "did you mean optim.lr?" in error("optim.lrr=1")
    assert "is not a TOML value" in error("student.model_kwargs={a")
    assert "write --set variants.NAME" in error("variants.a=1")


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean dad-vitb16"):
        resolve("dad-vitb-16")


def test_keys_of_earlier_versions_are_read() -> None:
    for old, new in (("true", "on"), ("false", "off")):
        text = f"[engine]\nstep_kernels = {old}\n"
        assert from_toml(text).engine.kernels == new
        assert from_toml(f"[variants.a.engine]\nstep_kernels = {old}\n").variants == {
            "a": {"engine.kernels": new}
        }
        assert gather(None, None, [f"engine.step_kernels={old}"], {}).engine.kernels == new
    assert "step_kernels" not in to_toml(Config())


def test_to_toml_round_trips_exactly() -> None:
    cfg = config(
        *(
            "teacher.templates=['a \"photo\" of a {}', 'été {}\\n']",
            "student.model_kwargs={a = [1, 2.5], 'b c' = {d = false}}",
            "optim.lr=1e-7",
        ),
        *(
            "variants.a.method=ce",
            "variants.b.student.model_kwargs={x=1}",
            "variants.b+c.eval.suites=test,val",
            "variants.b.augment.scale=0.5,1",
        ),
    )
    text = to_toml(cfg)
    assert from_toml(text) == cfg
    assert to_toml(from_toml(text)) == text


def test_any_config_round_trips() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    text = some.text(some.characters(exclude_categories=["Cs"], exclude_characters="\0"))
    number = some.floats(allow_nan=False, allow_infinity=False)
    leaf = some.booleans() | some.integers(-(2**63), 2**63 - 1) | number | text
    value = some.recursive(
        leaf,
        lambda inner: some.lists(inner, max_size=3) | some.dictionaries(text, inner, max_size=3),
        max_leaves=6,
    )

    @hypothesis.given(
        name=text,
        lr=some.floats(1e-300, 1e300),
        suites=some.lists(text),
        kwargs=some.dictionaries(text, value, max_size=4),
    )
    def round_trip(name: str, lr: float, suites: list[str], kwargs: dict[str, object]) -> None:
        variants = {"a": {"student.model_kwargs": kwargs, "optim.lr": lr}}
        values = {
            "teacher.name": name,
            "optim.lr": lr,
            "eval.suites": tuple(suites),
            "student.model_kwargs": kwargs,
            "variants": variants,
        }
        cfg = with_values(Config(), values)
        assert from_toml(to_toml(cfg)) == cfg

    round_trip()


def test_to_toml_writes_every_setting_with_its_help() -> None:
    text = to_toml(Config())
    for path, setting in settings().items():
        assert f"\n{path.rpartition('.')[2]} = " in "\n" + text and setting.help in text
    assert from_toml(text) == Config()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_resolve_and_list_what_to_add(name: str) -> None:
    cfg = resolve(
        name, None, [], {key: value for key, value in FITS.items() if key != "student.name"}
    )
    assert from_toml(to_toml(cfg)) == cfg
    assert preset_text(name).startswith("# ")
    if name not in ON_EMBEDDED_DATA:
        assert "# Add:" in preset_text(name) and "Source:" in preset_text(name)
        assert name.startswith(cfg.method)
    if name not in ON_EMBEDDED_DATA and cfg.method != "lp-clip":
        assert (cfg.schedule.epochs, cfg.schedule.cooldown_epochs) == (30, 10.0)
        assert (cfg.data.batch_size, cfg.optim.lr) == (256, 1e-4)


@pytest.mark.parametrize("name", sorted(FOR_OWN_IMAGES - {"finetune"}))
def test_presets_for_own_images_change_only_the_student_and_its_learning_rate(name: str) -> None:
    base = gather("finetune", None, [], {})
    cfg = gather(name, None, [], {})
    changed = {path for path in settings() if get(cfg, path) != get(base, path)}
    assert "student.name" in changed
    assert changed <= {"student.name", "student.drop_path", "optim.lr", "optim.layer_decay"}
    header = preset_text(name).partition("extends")[0]
    for part in ("# Why:", "Our choice", "Run:", "Not run:", "# Add:"):
        assert part in header, part


def test_public_starts_beat_the_papers_students_as_their_presets_say() -> None:
    # Top-1 of DAD's students in arXiv 2311.01441, in the order of the suites below.
    paper = {
        "dad-clip-vitb16": (79.6, 69.9, 31.8, 65.1, 46.1),
        "dad-swsl-rn50": (75.7, 65.0, 7.7, 51.6, 35.8),
    }
    suites = ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch")
    assert table().suites == suites
    for preset, of_dad in paper.items():
        student = gather(preset, None, [], {}).student.name
        (public,) = (model for model in table().models if model.name == student)
        assert all(public.top1[suite] > dad for suite, dad in zip(suites, of_dad, strict=True))


def test_presets_leave_speed_to_the_defaults() -> None:
    for name in (PRESETS | FOR_OWN_IMAGES) - {"dad-authors-online", "demo"}:
        cfg = gather(name, None, [], {})
        assert (cfg.precision, cfg.engine) == (Config().precision, Config().engine)
    # The authors' code computes in float32.
    assert gather("dad-authors-online", None, [], {}).precision.amp == "off"


def test_file_extends_presets_and_files(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        "extends = 'dad-vitb16'\n[optim]\nlr = 0.5\nclip_grad = 7.0\n"
        "[variants.a]\n[variants.b]\noptim.clip_grad = 3.0\n"
    )
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "run.toml"
    file.write_text("extends = '../base.toml'\n[optim]\nlr = 0.25\n")
    cfg = gather("demo", file, ["optim.weight_decay=0.5"], {})
    assert (cfg.optim.lr, cfg.optim.clip_grad, cfg.optim.weight_decay) == (0.25, 7.0, 0.5)
    assert cfg.student.name.startswith("vit_base") and cfg.data.data_dir == "embedded:digits"
    assert {"a", "b"} <= set(cfg.variants)
    assert "extends" not in to_toml(cfg)

    # The variants of a file replace those of what it extends.
    file.write_text("extends = '../base.toml'\n[variants.c]\noptim.lr = 1.0\n")
    assert gather(None, file, [], {}).variants == {"c": {"optim.lr": 1.0}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends = 'dad-vitb61'", "extends dad-vitb61: no such preset; did you mean dad-vitb16?"),
        ("extends = 'other.toml'", "extends other.toml: "),
        ("extends = 3", "extends names one preset or file"),
        ("extends = './run.toml'", "extends in a loop: "),
        ("[optim]\nextends = 'demo'", "unknown key optim.extends"),
    ],
)
def test_wrong_extends_is_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        gather(None, file, [], {})
    assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loop_of_two_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("extends = 'run.toml'")
    with pytest.raises(UsageError, match="extends in a loop: .*run.toml → .*other.toml → "):
        gather(None, write(tmp_path, "extends = 'other.toml'"), [], {})


def test_settings_of_a_checkpoint_extend_nothing() -> None:
    with pytest.raises(UsageError, match="unknown key extends"):
        from_toml("extends = 'demo'")


def test_preset_list() -> None:
    assert set(preset_names()) == PRESETS | FOR_OWN_IMAGES


def test_demo_is_complete() -> None:
    names = {name: cfg for name, _, cfg in expand(resolve("demo"))}
    assert list(names) == ["ce", "kd", "dad", "kd-stored", "dad-stored"]
    assert [cfg.method for cfg in names.values()] == ["ce", "kd", "dad", "kd", "dad"]
    epochs = [names[name].schedule.epochs for name in ("kd-stored", "dad-stored", "dad")]
    assert epochs[0] > epochs[1] > epochs[2]
    # They share the teacher's outputs.
    assert names["kd-stored"].store.make == names["dad-stored"].store.make[1:]


def test_presets_of_linear_probes_are_complete() -> None:
    for preset in ("lp-clip-demo", "lp-clip-sweep"):
        runs = expand(resolve(preset))
        assert {cfg.method for _, _, cfg in runs} == {"lp-clip"}
        assert {cfg.student.name for _, _, cfg in runs} == {""}
    runs = expand(resolve("lp-clip-demo"))
    assert [name for name, _, cfg in runs if cfg.lp_clip.labels == "true"] == ["supervised"]


def test_expand_without_variants_is_named_by_the_method() -> None:
    assert [(name, seed) for name, seed, _ in expand(config("seeds=2", "seed=5"))] == [
        ("dad", 5),
        ("dad", 6),
    ]
    cfg = config()
    assert [(name, seed, run) for name, seed, run in expand(cfg)] == [("dad", 0, cfg)]


def test_expand_accepts_nested_tables_and_dotted_keys(tmp_path: Path) -> None:
    nested = write(
        tmp_path,
        "seeds = 2\n[variants.a]\nmethod = 'ce'\n[variants.a.attack]\neps = 3\n"
        "[variants.b]\nattack.eps = 4",
    )
    runs = expand(resolve(None, nested, [], FITS))
    assert [(name, seed, run.method, run.attack.eps) for name, seed, run in runs] == [
        ("a", 0, "ce", 3.0),
        ("a", 1, "ce", 3.0),
        ("b", 0, "dad", 4.0),
        ("b", 1, "dad", 4.0),
    ]
    assert all(run.seeds == 1 and not run.variants and run.seed == seed for _, seed, run in runs)
    assert expand(Config(variants={"a": {"attack": {"eps": 3}}}))[0][2].attack.eps == 3.0


def test_every_variant_is_checked() -> None:
    assert error("variants.a.method=ce", "variants.b.data.data_dir=").startswith(
        "variant b: no data"
    )
    base = {key: value for key, value in FITS.items() if key != "teacher.name"}
    # No variant needs a teacher.
    assert resolve(None, None, ["variants.a.method=ce"], base)
    with pytest.raises(UsageError, match="variant b: --method kd needs a teacher"):
        resolve(None, None, ["variants.a.method=ce", "variants.b.method=kd"], base)


def test_later_layers_override_variants_of_earlier_ones(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "[schedule]\nepochs = 9\nwarmup_epochs = 0\n"
        "[variants.long]\nschedule.epochs = 99\nattack.eps = 1\n[variants.short]\n",
    )
    epochs = {name: run.schedule.epochs for name, _, run in expand(resolve(None, file, [], FITS))}
    # Within a layer the variant wins.
    assert epochs == {"long": 99, "short": 9}
    runs = {name: run for name, _, run in expand(resolve(None, file, ["schedule.epochs=2"], FITS))}
    assert {run.schedule.epochs for run in runs.values()} == {2} and runs["long"].attack.eps == 1.0
    runs = {
        name: run
        for name, _, run in expand(
            resolve(None, file, ["variants.long.schedule.epochs=3", "schedule.epochs=2"], FITS)
        )
    }
    assert (runs["long"].schedule.epochs, runs["short"].schedule.epochs) == (3, 2)


def test_later_method_selects_the_variants_of_that_method() -> None:
    assert [name for name, _, _ in expand(resolve("demo", None, [], {"method": "kd"}))] == ["kd"]
    # Variants and method are in one layer.
    several = ["variants.a.method=kd", "variants.b.method=kd", "variants.c.method=ce"]
    cfg = resolve(None, None, several, {**FITS, "method": "kd"})
    assert [name for name, _, _ in expand(cfg)] == ["a", "b", "c"]

    cfg = resolve("lp-clip-demo", None, [], {"method": "lp-clip"})
    assert expand(cfg)[0][0] != "dad"
    for method in ("dad", "aug-only"):
        cfg = resolve("demo", None, [f"method={method}"])
        assert [name for name, _, _ in expand(cfg)] == [method]
    assert resolve("demo", None, ["variants={}"]).variants == {}


def test_differences_list_only_what_changes_the_result() -> None:
    cfg = config()
    assert differences(cfg, cfg) == []
    assert differences(cfg, config("optim.lr=1", "attack.order=authors")) == [
        "attack.order: 'paper' → 'authors'",
        "optim.lr: 0.001 → 1.0",
    ]
    harmless = config(
        "data.workers=9",
        "log_every=1",
        "checkpoint.keep=7",
        "eval.batch_size=3",
        "device=cpu",
        "max_steps=3",
    )
    assert differences(cfg, harmless) == []
    assert differences(cfg, config("variants.a.method=ce")) == ["variants: a differ"]
    assert set(settings()) >= RESUME_SAFE


def test_check_guards_configs_made_in_python() -> None:
    good = config()
    check(good)
    with pytest.raises(UsageError, match="optim.lr"):
        check(with_values(good, {"optim.lr": -1.0}))


def test_every_setting_has_a_help_and_flags_are_unique() -> None:
    flags = [setting.flag for setting in settings().values() if setting.flag]
    assert len(flags) == len(set(flags)) and all(flag.startswith("--") for flag in flags)
    assert all(setting.help and not setting.help.endswith(".") for setting in settings().values())
    assert all(get(Config(), path) == setting.default for path, setting in settings().items())


def test_config_is_frozen_and_mutable_defaults_are_not_shared() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]
    assert Layers().config().variants is not Config().variants
