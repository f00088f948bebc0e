"""Fuzzing of readers: a damaged or forged file gives one of our errors or a well-formed result.

Each reader gets two kinds of files: bytes changed, cut or added anywhere, and well-formed content
with right checksums but arbitrary values.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
pytest.importorskip("timm")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dad_fast.checkpoint.folder import FORMAT, STATE, Checkpoint, CheckpointFolder, _digest
from dad_fast.config import Config, from_toml
from dad_fast.config.fields import settings as known_settings
from dad_fast.data.sources.decode import DecodeError, read_rgb
from dad_fast.errors import DadFastError, DataError, UsageError
from dad_fast.models.load_student import load_student
from dad_fast.models.weights.files import read_state_dict, sha256_file, write_safetensors
from dad_fast.store.manifest import Manifest, _canonical
from dad_fast.store.reader import AdversarialStore, open_store
from tests.limits import cpu_limit
from tests.models.test_declared import SMALL, SPEC
from tests.store_data import make_manifest, write

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# CPU time for one file.

plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
damages = st.tuples(
    st.sampled_from(["change", "cut", "add", "zero"]),
    st.floats(0, 1),
    st.binary(min_size=1, max_size=12),
)


def damaged(content: bytes, damage: tuple[str, float, bytes]) -> bytes:
    kind, where, new = damage
    at = int(where * len(content))
    if kind == "cut":
        return content[:at]
    if kind == "add":
        return content[:at] + new + content[at:]
    middle = bytes(len(new)) if kind == "zero" else new
    return content[:at] + middle + content[at + len(new) :]


def assert_one_line(error: DadFastError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 2000


# --- settings -------------------------------------------------------------------------------------


@FUZZ
@given(st.text() | st.text(alphabet="[]{}=\"'.,#\n 019abt_-\\", max_size=200))
def test_any_text_as_settings(text: str) -> None:
    with cpu_limit():
        try:
            assert isinstance(from_toml(text), Config)
        except UsageError as error:
            assert_one_line(error)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(sorted(known_settings())), anything), max_size=4))
def test_any_value_of_any_setting(pairs: list[tuple[str, Any]]) -> None:
    def toml(value: Any) -> str:
        if isinstance(value, dict):
            items = ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items())
            return f"{{{items}}}"
        if isinstance(value, list):
            return "[" + ", ".join(map(toml, value)) + "]"
        if isinstance(value, float):
            return repr(value)
        return json.dumps(value if value is not None else "")

    text = "\n".join(f"{path} = {toml(value)}" for path, value in pairs)
    with cpu_limit():
        try:
            assert isinstance(from_toml(text), Config)
        except UsageError as error:
            assert_one_line(error)


# --- a store --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["raw", "webp"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / request.param
    write(folder, make_manifest(images=request.param))
    return folder


def read_all(folder: Path) -> None:
    found = open_store(folder)
    assert isinstance(found, AdversarialStore)
    rows = np.arange(len(found))[:16]
    for view in range(found.num_views):
        assert found.kept(rows, view).shape == found.changed(rows, view).shape == rows.shape
        if found.manifest.code_bytes:
            assert found.codes(rows, view).shape == (len(rows), found.manifest.code_bytes)
        assert found.images(rows, view).shape == (len(rows), *found.manifest.image_size, 3)


@FUZZ
@given(data=st.data(), damage=damages)
def test_damaged_store(store: Path, tmp_path: Path, data: Any, damage: Any) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    name = data.draw(st.sampled_from(sorted(path.name for path in copy.iterdir())))
    (copy / name).write_bytes(damaged((copy / name).read_bytes(), damage))
    with cpu_limit():
        try:
            read_all(copy)
        except (DataError, UsageError) as error:
            assert_one_line(error)


@FUZZ
@given(data=st.data(), value=anything)
def test_forged_manifest(store: Path, data: Any, value: Any) -> None:
    """Any value in any place, with a right checksum."""
    document = json.loads((store / "manifest.json").read_text())
    document.pop("checksum")
    place, keys = document, sorted(document)
    key = data.draw(st.sampled_from(keys))
    if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place, key = place[key], data.draw(st.sampled_from(sorted(place[key])))
    place[key] = value
    try:
        sealed = _canonical(
            {**document, "checksum": hashlib.sha256(_canonical(document)).hexdigest()}
        )
    except ValueError:
        # The canonical form has no NaN.
        return
    with cpu_limit():
        try:
            assert isinstance(Manifest.from_json(sealed), Manifest)
        except DataError as error:
            assert_one_line(error)


# --- a checkpoint ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    state = {
        "config": "seed = 1\n",
        "optimizer": {"param_groups": [{"lr": 0.1}], "numbers": {}},
        "best_top1": 3.5,
    }

    def write_model(path: Path) -> None:
        write_safetensors(path, {"w": torch.zeros(3)}, {})

    CheckpointFolder(root, keep=2).save(
        5,
        {"student.w": torch.arange(6.0), "generator.torch": torch.get_rng_state()},
        state,
        write_model,
        best=False,
    )
    return root


@FUZZ
@given(
    name=st.sampled_from(["model.safetensors", "train.safetensors", "state.json"]), damage=damages
)
def test_damaged_checkpoint(checkpoint: Path, tmp_path: Path, name: str, damage: Any) -> None:
    """Damage is detected, or the loaded checkpoint equals the written one."""
    copy = tmp_path / "checkpoints"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, symlinks=True)
    path = copy / "step-5" / name
    path.write_bytes(damaged(path.read_bytes(), damage))
    lines: list[str] = []
    with cpu_limit():
        try:
            found = CheckpointFolder(copy, keep=2).load("auto", lines.append)
        except DataError as error:
            assert_one_line(error)
        else:
            assert isinstance(found, Checkpoint)
            assert torch.equal(found.tensors["student.w"], torch.arange(6.0))
            assert found.state["best_top1"] == 3.5 and found.state["step"] == 5


@FUZZ
@given(state=anything)
def test_forged_state(checkpoint: Path, tmp_path: Path, state: Any) -> None:
    """Arbitrary content with right checksums."""
    copy = tmp_path / "checkpoints"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, symlinks=True)
    folder = copy / "step-5"
    if isinstance(state, dict):
        own = json.loads(json.dumps({**state, "format": FORMAT}))
        files = {
            name: sha256_file(folder / name) for name in ("model.safetensors", "train.safetensors")
        }
        state = {**own, "sha256": files | {STATE: _digest(own)}}
    (folder / STATE).write_text(json.dumps(state))
    with cpu_limit():
        try:
            CheckpointFolder(copy, keep=2).load("auto", lambda line: None)
        except DataError as error:
            assert_one_line(error)


# --- weights --------------------------------------------------------------------------------------


def weights_files() -> dict[str, bytes]:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.int64)}
    found = {}
    for name, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        file = io.BytesIO()
        torch.save({"state_dict": state, "epoch": 3}, file, **options)
        found[name] = file.getvalue()
    from safetensors.torch import save

    return {**found, "safetensors": save(state, {"dad_fast.student": json.dumps(SPEC)})}


FILES = weights_files()


@FUZZ
@pytest.mark.filterwarnings("ignore")
@given(form=st.sampled_from(sorted(FILES)), damage=damages)
def test_damaged_weights(tmp_path: Path, form: str, damage: Any) -> None:
    (tmp_path / "w").write_bytes(damaged(FILES[form], damage))
    with cpu_limit():
        for read in (read_state_dict, load_student):
            try:
                state, _ = read(tmp_path / "w")
                if read is read_state_dict:
                    assert sum(tensor.numel() for tensor in state.values()) < 1_000_000
            except DadFastError as error:
                assert_one_line(error)


@settings(FUZZ, max_examples=20)
@given(
    key=st.sampled_from(
        [*SPEC, "model_kwargs.layers", "model_kwargs.channels", "model_kwargs.more"]
    ),
    value=anything,
)
def test_forged_description_of_a_student(tmp_path: Path, key: str, value: Any) -> None:
    spec = {**SPEC, "model_kwargs": {**SMALL}}
    table, _, name = key.rpartition(".")
    (spec["model_kwargs"] if table else spec)[name] = value
    write_safetensors(
        tmp_path / "m.safetensors", {"w": torch.zeros(3)}, {"dad_fast.student": json.dumps(spec)}
    )
    with cpu_limit(), pytest.raises(DataError) as caught:
        load_student(tmp_path / "m.safetensors")
    assert_one_line(caught.value)


# --- images ---------------------------------------------------------------------------------------


def image_files() -> dict[str, bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    found = {}
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        file = io.BytesIO()
        image.save(file, form)
        found[form] = file.getvalue()
    return found


IMAGES = image_files()


@FUZZ
@pytest.mark.filterwarnings("ignore")
@given(form=st.sampled_from(sorted(IMAGES)), damage=damages)
def test_damaged_images(form: str, damage: Any) -> None:
    with cpu_limit():
        try:
            assert read_rgb(io.BytesIO(damaged(IMAGES[form], damage)), "x").mode == "RGB"
        except DecodeError as error:
            assert_one_line(error)
