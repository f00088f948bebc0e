"""Tests of open_clip teachers: logits, gradients, class lists, one-line errors."""

import copy
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
import torch.nn.functional as F
from safetensors.torch import save, save_file
from teachers import ANIMALS, WNIDS, class_map, load, refuse
from tiny import SIDE, TOWERS, write_teacher

from dad_fast.config.schema import PrecisionConfig
from dad_fast.data.classes import ClassMap
from dad_fast.errors import DataError, EnvironmentProblem, UsageError
from dad_fast.models import clip_teacher, clip_weights, file_teacher, zeroshot
from dad_fast.models.teacher import UNKNOWN
from dad_fast.models.weights.files import sha256_file, write_safetensors
from dad_fast.models.weights.published import published_weights
from dad_fast.models.zeroshot import is_imagenet, prompt_names, resolve_templates, zero_shot_head
from tests.numerics import assert_same_function


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("clip") / "clip.safetensors")


@pytest.fixture(scope="module")
def clip(clip_file):
    """CLIP of `clip_file` as open_clip runs it."""
    from safetensors.torch import load_file

    model = open_clip.CLIP(**TOWERS).eval()
    model.load_state_dict(load_file(clip_file))
    return model


def own_logits(clip, pixels, classes=ANIMALS, templates=("a {}",), mean=0.5, std=0.5):
    """Return logits by open_clip's own forward, averaged over templates as in Radford et al."""
    tokens = open_clip.SimpleTokenizer(context_length=TOWERS["text_cfg"]["context_length"])
    with torch.no_grad():
        rows = []
        for name in classes.names:
            texts = clip.encode_text(
                tokens([template.format(name) for template in templates]), normalize=True
            )
            rows.append(F.normalize(texts.mean(dim=0), dim=0))
        images = clip.encode_image((pixels - mean) / std, normalize=True)
        return clip.logit_scale.exp() * images @ torch.stack(rows).T


# --- open_clip ------------------------------------------------------------------------------------


def test_a_file_with_its_architecture_as_metadata(clip_file, clip):
    teacher = load(clip_file)
    pixels = torch.rand(3, 3, SIDE, SIDE)
    assert (teacher.image_size, teacher.num_classes, teacher.provenance) == (SIDE, 3, "nothing")
    assert teacher.classes == ANIMALS and teacher.weights_sha256 == sha256_file(clip_file)
    logits = teacher(pixels)
    assert logits.dtype == torch.float32
    assert_same_function(logits, own_logits(clip, pixels))
    with torch.no_grad():
        assert_same_function(
            teacher.features(pixels), clip.encode_image((pixels - 0.5) / 0.5, normalize=True)
        )


def test_templates_are_averaged(clip_file, clip):
    pixels, templates = torch.rand(2, 3, SIDE, SIDE), ("a {}", "the {} itself", "{}, drawn")
    logits = load(clip_file, templates=templates)(pixels)
    assert_same_function(logits, own_logits(clip, pixels, templates=templates))
    with pytest.raises(AssertionError):
        assert_same_function(logits, own_logits(clip, pixels))


def test_half_precision_weights_run_in_float32(clip_file, clip, tmp_path):
    from safetensors import safe_open

    with safe_open(clip_file, framework="pt") as file:
        state, metadata = {key: file.get_tensor(key).half() for key in file.keys()}, file.metadata()
    write_safetensors(tmp_path / "half.safetensors", state, metadata)
    teacher, pixels = load(tmp_path / "half.safetensors"), torch.rand(2, 3, SIDE, SIDE)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    torch.testing.assert_close(teacher(pixels), own_logits(clip, pixels), rtol=1e-2, atol=1e-2)


def test_gradients_reach_the_pixels_but_no_weight(clip_file):
    """Compare with finite differences, also through the resize of an image of another size."""
    teacher = load(clip_file)
    for side in (SIDE, SIDE + 12):
        pixels = torch.rand(1, 3, side, side, requires_grad=True)
        teacher(pixels)[0, 1].backward()
        direction = F.normalize(pixels.grad.flatten(), dim=0).view_as(pixels)
        with torch.no_grad():
            ahead, behind = (teacher(pixels + step * direction)[0, 1] for step in (5e-2, -5e-2))
        assert (ahead - behind).item() / 1e-1 == pytest.approx(
            (pixels.grad * direction).sum().item(), rel=0.05
        )
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_only_other_sizes_are_resized(clip_file, monkeypatch):
    teacher, pixels = load(clip_file), torch.rand(2, 3, 50, 50)
    with torch.no_grad():
        resized = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)
        assert torch.equal(teacher(pixels), teacher(resized))
        monkeypatch.setattr(F, "interpolate", None)
        teacher(resized)


def test_stays_in_eval_mode(clip_file):
    teacher = load(clip_file)
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())


def test_mixed_precision(clip_file):
    pixels = torch.rand(4, 3, SIDE, SIDE, requires_grad=True)
    exact = load(clip_file)(pixels)
    mixed = load(clip_file, precision=PrecisionConfig(amp=True))
    logits = mixed(pixels)
    assert logits.dtype == torch.float32 and not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.1)
    logits.sum().backward()
    assert pixels.grad.isfinite().all()
    for precision in (PrecisionConfig(), PrecisionConfig(amp=True, teacher="float32")):
        teacher = load(clip_file, precision=precision)
        # What is set for the student does not reach a teacher in float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(teacher(pixels), exact)


@pytest.fixture
def known(monkeypatch, clip):
    """Register tiny architectures in open_clip, plain and with QuickGELU, and tags for them."""
    config = {**TOWERS, "embed_dim": TOWERS["embed_dim"]}
    for name, more in (("Tiny", {}), ("Tiny-quickgelu", {"quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config | more)
    quick = open_clip.pretrained._pcfg(url="https://nowhere.invalid/x.safetensors", quick_gelu=True)
    plain = open_clip.pretrained._pcfg(
        url="https://nowhere.invalid/y.safetensors", mean=(0.4,) * 3, std=(0.2,) * 3
    )
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"openai": quick, "other": plain})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-quickgelu", {"openai": quick})


@pytest.fixture
def bare_file(clip, tmp_path):
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path / "open_clip_model.safetensors"


def test_named_architecture(known, clip, bare_file, caplog):
    """Activation and normalisation are logged; an open_clip_config.json next to the file decides."""
    pixels = torch.rand(2, 3, SIDE, SIDE)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    teacher = load(f"open_clip:Tiny@{bare_file}", templates=("a {}",))
    assert "Tiny with GELU" in caplog.text
    assert "differ in mean and std" in caplog.text
    assert "randomly" not in caplog.text
    assert teacher.provenance == UNKNOWN
    # open_clip's tokenizer takes the text tower's own context length
    assert_same_function(teacher(pixels), own_logits(clip, pixels, mean=mean, std=std))

    quick = load(f"open_clip:Tiny-quickgelu@{bare_file}", templates=("a {}",))
    assert not torch.allclose(quick(pixels), teacher(pixels))

    config = bare_file.with_name("open_clip_config.json")
    config.write_text(
        json.dumps({"model_cfg": TOWERS, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}})
    )
    teacher = load(f"open_clip:Tiny@{bare_file}", templates=("a {}",))
    assert_same_function(teacher(pixels), own_logits(clip, pixels, mean=0.4, std=0.2))
    assert teacher.interpolation == "bicubic"
    assert not teacher.squashed
    as_siglip = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    config.write_text(json.dumps({"model_cfg": TOWERS, "preprocess_cfg": as_siglip}))
    teacher = load(f"open_clip:Tiny@{bare_file}", templates=("a {}",))
    assert teacher.interpolation == "bilinear"
    assert teacher.squashed
    refuse(
        UsageError, ["another activation", "write Tiny"], f"open_clip:Tiny-quickgelu@{bare_file}"
    )
    config.write_text("{")
    refuse(DataError, [str(config), "JSON"], f"open_clip:Tiny@{bare_file}")


def publish(monkeypatch, arch, tag, **settings):
    table = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(table, arch, {**table[arch], tag: open_clip.pretrained._pcfg(**settings)})


@pytest.mark.parametrize("digits", [64, 8])
def test_published_files_need_their_activation(known, monkeypatch, bare_file, digits):
    """OpenAI's addresses have the whole hash as a folder, open_clip's 8 digits in the name."""
    digest = sha256_file(bare_file)
    address = f"{digest}/Tiny.pt" if digits == 64 else f"tiny-quickgelu-e32-{digest[:8]}.pt"
    url = f"https://nowhere.invalid/{address}"
    publish(monkeypatch, "Tiny", "e32", url=url, quick_gelu=True)
    refuse(
        UsageError,
        ["Tiny/e32", "use QuickGELU", f"write open_clip:Tiny-quickgelu@{bare_file}"],
        f"open_clip:Tiny@{bare_file}",
    )
    load(f"open_clip:Tiny-quickgelu@{bare_file}")
    other = url.replace(digest[:8], "0123abcd")
    publish(monkeypatch, "Tiny", "e32", url=other, quick_gelu=True)
    load(f"open_clip:Tiny@{bare_file}")


def test_files_in_the_hubs_cache_need_their_activation(known, monkeypatch, bare_file):
    folder = bare_file.parent / "models--timm--tiny.openai" / "snapshots" / "1"
    folder.mkdir(parents=True)
    cached = bare_file.rename(folder / bare_file.name)
    publish(monkeypatch, "Tiny", "openai", hf_hub="timm/tiny.openai/", quick_gelu=True)
    refuse(UsageError, ["Tiny/openai", "use QuickGELU"], f"open_clip:Tiny@{cached}")


def test_openais_files_are_known_by_the_hash_in_their_address():
    settings = open_clip.get_pretrained_cfg("ViT-L-14", "openai")
    digest = settings["url"].split("/")[-2]
    found = published_weights(Path("renamed.pt"), digest)
    assert found is not None and (found.tag, found.teacher_arch) == (
        "openai",
        "ViT-L-14-quickgelu",
    )
    assert published_weights(Path("renamed.pt"), "0" * 64) is None


def test_files_of_older_open_clip_versions_load(known, clip, bare_file):
    """Accept extra entries of OpenAI's and older files, and logit_scale as a vector."""
    state = {f"module.{key}": value for key, value in clip.state_dict().items()}
    state |= {
        "module.logit_scale": clip.logit_scale.detach().view(1),
        "module.input_resolution": torch.tensor(SIDE),
    }
    save_file(state, bare_file)
    pixels = torch.rand(1, 3, SIDE, SIDE)
    other = load(f"open_clip:Tiny@{bare_file}")
    save_file(clip.state_dict(), bare_file)
    assert torch.equal(other(pixels), load(f"open_clip:Tiny@{bare_file}")(pixels))


def test_tags(known, clip, monkeypatch):
    """OpenAI's weights always get QuickGELU; other weights keep their activation."""
    made = []
    create = open_clip.create_model

    def offline(arch, *, pretrained, force_quick_gelu, require_pretrained):
        made.append((arch, pretrained, force_quick_gelu))
        model = create(arch, force_quick_gelu=force_quick_gelu)
        model.load_state_dict(clip.state_dict())
        return model

    monkeypatch.setattr(clip_weights.open_clip, "create_model", offline)
    pixels = torch.rand(1, 3, SIDE, SIDE)
    named, right, plain = (
        load(f"open_clip:{name}")(pixels)
        for name in ("Tiny/openai", "Tiny-quickgelu/openai", "Tiny/other")
    )
    assert torch.equal(named, right) and not torch.allclose(named, plain)
    assert made == [
        ("Tiny", "openai", True),
        ("Tiny-quickgelu", "openai", True),
        ("Tiny", "other", False),
    ]


def test_wrong_tags_are_refused(known, monkeypatch):
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED["Tiny-quickgelu"], "other", open_clip.pretrained._pcfg()
    )
    refuse(
        UsageError,
        ["these weights use GELU", "open_clip:Tiny/other"],
        "open_clip:Tiny-quickgelu/other",
    )
    refuse(UsageError, ["no weights 'opnai'", "openai"], "open_clip:Tiny/opnai")
    refuse(
        UsageError, ["no such architecture", "did you mean ViT-B-32"], "open_clip:ViT-B-23/openai"
    )
    refuse(UsageError, ["no such architecture"], "open_clip:Nonsense@nowhere.safetensors")
    refuse(DataError, ["nowhere.safetensors", "no such"], "open_clip:Tiny@nowhere.safetensors")


@pytest.mark.parametrize("name", ["", "ViT-L-14", "ViT-L-14/openai", "clip:ViT-L-14"])
def test_unknown_names_are_refused(name):
    refuse(UsageError, [f"--teacher {name!r}", "no such file", "open_clip:ARCH/TAG"], name)


def test_a_teacher_of_a_users_own_module(clip_file, monkeypatch):
    """The factory gets the argument of the name, and the context with the class list."""

    def load_scaled(argument, context):
        teacher = file_teacher.load_file(str(clip_file), context)
        teacher.head_weight *= float(argument)
        return teacher

    module = types.ModuleType("own_teachers")
    module.load_scaled = load_scaled
    monkeypatch.setitem(sys.modules, "own_teachers", module)
    pixels = torch.rand(2, 3, SIDE, SIDE)
    expected = 2 * load(clip_file)(pixels)
    teacher = load("python:own_teachers:load_scaled:2")
    assert torch.equal(teacher(pixels), expected) and teacher.classes == ANIMALS
    refuse(UsageError, ["cannot import own_teachers:other"], "python:own_teachers:other")


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for module in ("clip_teacher", "clip_weights"):
        monkeypatch.delitem(sys.modules, f"dad_fast.models.{module}")
    for name in ("open_clip:ViT-L-14/openai", "embedded:digits"):
        refuse(EnvironmentProblem, ["open_clip is missing", "pip install open_clip_torch"], name)


def test_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", offline)
    refuse(
        EnvironmentProblem,
        ["not available", "no route to host", "open_clip:ARCH@FILE"],
        "open_clip:ViT-B-32/openai",
    )
    refuse(EnvironmentProblem, ["not available", "hf-hub:some/model"], "hf-hub:some/model")


def test_an_unreachable_hub_is_named_although_open_clip_wraps_the_error(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = ["(the hub cannot be reached, and its cache lacks the file); give a local file"]
    refuse(EnvironmentProblem, expected, "open_clip:ViT-B-32/openai")


def test_a_missing_package_of_a_tokenizer_is_named(clip, bare_file, monkeypatch):
    """SigLIP's tokenizer needs transformers, which open_clip does not install."""
    text_cfg = {**TOWERS["text_cfg"], "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    config = {**TOWERS, "text_cfg": text_cfg}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "TinySigLIP", config)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuse(
        EnvironmentProblem,
        ["pip install transformers", "--teacher-head"],
        f"open_clip:TinySigLIP@{bare_file}",
    )


def test_other_weights_are_refused(known, clip, clip_file, bare_file, tmp_path):
    refuse(DataError, ["does not name its architecture", "open_clip:ARCH@"], bare_file)
    state = clip.state_dict()
    save_file({key: value for key, value in state.items() if key != "ln_final.bias"}, bare_file)
    refuse(
        DataError,
        [str(bare_file), "another architecture", "missing ln_final.bias"],
        f"open_clip:Tiny@{bare_file}",
    )
    write_safetensors(bare_file, state, {"dad_fast.teacher": '{"model_cfg": {}}'})
    refuse(DataError, [str(bare_file), "damaged"], bare_file)


# --- heads, prompts and classes -------------------------------------------------------------------


def test_fine_tuned_head(clip_file, clip, tmp_path):
    path, weight, bias = (
        tmp_path / "head.safetensors",
        torch.randn(3, TOWERS["embed_dim"]),
        torch.randn(3),
    )
    write_safetensors(
        path, {"weight": weight, "bias": bias}, {"dad_fast.classes": ANIMALS.to_json()}
    )
    pixels = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        features = clip.encode_image((pixels - 0.5) / 0.5)
    teacher = load(clip_file, head=str(path))
    assert_same_function(teacher(pixels), features @ weight.T + bias)
    assert_same_function(teacher.features(pixels), features)
    write_safetensors(path, {"weight": weight}, {})
    assert_same_function(load(clip_file, head=str(path))(pixels), features @ weight.T)


@pytest.mark.parametrize(
    "tensors, classes, words",
    [
        ({"kernel": (3, 16)}, None, ["weight [classes, features]"]),
        ({"weight": (3, 16), "bias": (2,)}, None, ["bias [classes]"]),
        ({"weight": (4, 16)}, None, ["4 outputs", "3 classes", "--class-map"]),
        ({"weight": (3, 8)}, None, ["8 features", "has 16"]),
        (
            {"weight": (3, 16)},
            class_map("ant", "cat", "queen_bee"),
            ["class 1 is 'cat'", "'queen_bee'", "--class-map"],
        ),
        ({"weight": (3, 16)}, class_map("ant", "cat"), ["2 classes", "the data 3"]),
    ],
)
def test_heads_of_another_shape_are_refused(clip_file, tmp_path, tensors, classes, words):
    path = tmp_path / "head.safetensors"
    metadata = {} if classes is None else {"dad_fast.classes": classes.to_json()}
    write_safetensors(path, {key: torch.zeros(shape) for key, shape in tensors.items()}, metadata)
    refuse(DataError, [str(path), *words], clip_file, head=str(path))


def test_prompts():
    fish = class_map(*WNIDS[:3])
    assert is_imagenet(fish)
    assert not is_imagenet(ANIMALS)
    assert not is_imagenet(class_map("n00000000"))
    # By wnid, not by position
    assert prompt_names(class_map(*WNIDS[2::-1])) == list(open_clip.IMAGENET_CLASSNAMES[2::-1])
    assert prompt_names(ANIMALS) == ["ant", "queen bee", "cat"]
    assert len(resolve_templates("auto", fish)) == 80
    assert resolve_templates("imagenet", ANIMALS)[0] == "a bad photo of a {}."
    assert resolve_templates("auto", ANIMALS) == ["a photo of a {}."]
    assert resolve_templates("auto", fish, own=["digit {}"]) == ["digit {}"]
    assert resolve_templates("simple", fish, own=["digit {}"]) == ["a photo of a {}."]


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {}\n\n  the {}. \n")
    assert resolve_templates(str(file), ANIMALS) == ["a {}", "the {}."]
    file.write_text("a photo\n")
    with pytest.raises(UsageError, match="'a photo': each prompt needs one {}"):
        resolve_templates(str(file), ANIMALS)
    with pytest.raises(UsageError, match="empty"):
        resolve_templates([], ANIMALS)
    with pytest.raises(DataError, match="no such file"):
        resolve_templates(str(tmp_path / "none.txt"), ANIMALS)


def test_zero_shot_head_equals_that_of_open_clip(clip):
    tokens = open_clip.SimpleTokenizer(context_length=TOWERS["text_cfg"]["context_length"])
    templates = ["a {}", "the {} of {{}}".replace("{{}}", "it")]
    expected = open_clip.build_zero_shot_classifier(clip, tokens, ANIMALS.names, templates)
    assert_same_function(zero_shot_head(clip, lambda: tokens, ANIMALS.names, templates), expected.T)


@pytest.mark.parametrize(
    "names",
    [
        ("crane", "crane", "cow"),
        ("Cat", "cat", "dog"),
        ("A & B", "A &amp; B", "dog"),
        ("long " * 80 + "one", "long " * 80 + "two", "dog"),
    ],
    ids=["equal", "case", "escaped", "cut"],
)
def test_classes_with_equal_prompts_are_refused(clip_file, names):
    """Otherwise the filter would drop every adversarial image of the second class."""
    classes = ClassMap(tuple((i, f"folder{i}", name) for i, name in enumerate(names)))
    with pytest.raises(DataError, match="cannot tell apart folder0 .* and folder1 .*--class-map"):
        load(clip_file, classes)


def test_equal_names_of_imagenet_are_a_warning(caplog):
    folders = ("n03773504", "n04008634", "n02124075")
    classes = ClassMap(tuple((i, folder, folder) for i, folder in enumerate(folders)))
    weight = torch.eye(3)[[0, 0, 1]]
    zeroshot.check_distinct(weight, classes)
    assert "n03773504 ('missile') and n04008634 ('missile')" in caplog.text
    zeroshot.check_distinct(torch.eye(3), classes)
    assert len(caplog.records) == 1


def test_nearly_equal_text_embeddings_are_a_warning(caplog):
    row = torch.nn.functional.normalize(torch.randn(16), dim=0)
    near = torch.nn.functional.normalize(row + 1e-3 * torch.randn(16), dim=0)
    zeroshot.check_distinct(torch.stack([row, -row, near]), ANIMALS)
    assert "hardly tell apart ant ('ant') and cat ('cat'):" in caplog.text
    zeroshot.check_distinct(torch.eye(3), ANIMALS)
    assert len(caplog.records) == 1


def test_a_cut_prompt_is_a_warning(clip, caplog):
    tokens = open_clip.SimpleTokenizer(context_length=clip.context_length)
    zero_shot_head(clip, lambda: tokens, ["cat"], ["a {}"])
    assert not caplog.records
    zero_shot_head(clip, lambda: tokens, ["cat", "a very long name " * 20], ["a {}"])
    assert f"cut after {clip.context_length} tokens" in caplog.text


def test_a_large_head_is_cached_and_recomputed_if_damaged(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DAD_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(zeroshot, "MANY_PROMPTS", 6)
    monkeypatch.setattr(zeroshot, "LINE_SECONDS", -1.0)
    templates = ["a photo of a {}.", "a drawing of a {}."]

    def tokenizer():
        return open_clip.SimpleTokenizer(context_length=clip.context_length)

    def no_tokenizer():
        raise AssertionError("the kept head needs none")

    computed = zero_shot_head(clip, tokenizer, ANIMALS.names, templates)
    assert "zero-shot head: 1 of 3 classes" in capsys.readouterr().err
    assert torch.equal(zero_shot_head(clip, no_tokenizer, ANIMALS.names, templates), computed)
    for names, prompts in ((ANIMALS.names[::-1], templates), (ANIMALS.names, templates[::-1])):
        with pytest.raises(AssertionError):
            zero_shot_head(clip, no_tokenizer, names, prompts)
    other = copy.deepcopy(clip)
    other.text_projection.data += 1
    with pytest.raises(AssertionError):
        zero_shot_head(other, no_tokenizer, ANIMALS.names, templates)
    (kept,) = tmp_path.glob("heads/*")
    whole = kept.read_bytes()
    forged = [
        save({"weight": w})
        for w in (torch.ones(3), torch.zeros(3, 16), torch.full((3, 16), torch.nan), torch.eye(2))
    ]
    for content in (whole[:50], b"", *forged):
        kept.write_bytes(content)
        assert torch.equal(zero_shot_head(clip, tokenizer, ANIMALS.names, templates), computed)
    assert torch.equal(zero_shot_head(clip, no_tokenizer, ANIMALS.names, templates), computed)


def test_logit_bias_of_siglip():
    model = SimpleNamespace(logit_scale=torch.tensor(2.0), logit_bias=torch.tensor([-10.0]))
    loaded = SimpleNamespace(tokenizer=lambda: None, templates=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_teacher, "zero_shot_head", lambda *args: torch.eye(3))
        weight, bias, unit = clip_teacher._zero_shot(loaded, model, ANIMALS, "simple")
    assert unit
    torch.testing.assert_close(weight, torch.eye(3) * torch.tensor(2.0).exp())
    assert torch.equal(bias, torch.full((3,), -10.0))
