"""Hostile class maps, baselines, results, predictions and settings: one-line errors, quickly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dad_fast.cli import main as cli
from dad_fast.config import from_toml
from dad_fast.data.classes import ClassMap
from dad_fast.data.sources.index import _FORMAT, Entry, _encoded, load_index
from dad_fast.errors import DadFastError, DataError, UsageError
from dad_fast.evaluation.metrics.effective_robustness import read_baselines
from dad_fast.evaluation.metrics.predictions import FIELDS, PREDICTIONS, Records, load_records
from dad_fast.evaluation.suites.imagenet import _read_json
from dad_fast.evaluation.tables import read_record
from dad_fast.models.weights.files import write_safetensors
from tests.limits import cpu_limit

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DEEP = "[" * 100_000
HUGE = "9" * 5000


def read_or_none(read: Callable[[], Any]) -> Any:
    """Return the result of `read`, or None for one of our errors, which must be one line."""
    with cpu_limit():
        try:
            return read()
        except DadFastError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return None


@pytest.mark.parametrize(
    "row",
    [
        "²,a,b",
        f"{HUGE},a,b",
        "٠,a,b",
        "-1,a,b",
        "0x0,a,b",
        "1e1,a,b",
        "0",
        ",,",
        f"0,{'a' * 200_000},b",
        '0,"a',
        "1000000000,a,b",
    ],
    ids=lambda row: row[:12],
)
def test_malformed_class_maps_are_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "c.csv").write_text(f"id,folder,name\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.csv.*\(--class-map\)"):
        ClassMap.from_csv(tmp_path / "c.csv")


@FUZZ
@given(st.text(alphabet="012,\"'\n\r\t\0²٠a../\ufeff\x85", max_size=60))
def test_any_text_as_a_class_map(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.csv").write_text(f"id,folder,name\n{text}", encoding="utf-8", newline="")
    assert isinstance(
        read_or_none(lambda: ClassMap.from_csv(tmp_path / "c.csv")), (ClassMap, type(None))
    )


@FUZZ
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=8,
    ).map(json.dumps)
)
@example(DEEP)
@example(f'[{{"val": {HUGE}}}]')
@example(f'[{{"val": {"9" * 400}}}]')
@example('[{"val": 1e400}]')
@example('[{"\\ud800": "\\u001b[2J"}]')
@example('{"runs": 3}')
@example('{"runs": [3]}')
@example('{"runs": [{"variant": "x", "suites": {"val": 3}}]}')
def test_any_json_as_baselines_and_as_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    found = read_or_none(lambda: read_baselines(tmp_path / "x.json"))
    assert found is None or all(0 <= value <= 100 for row in found for value in row.values())
    record = read_or_none(lambda: read_record(tmp_path / "x.json"))
    assert record is None or all(isinstance(run["suites"], dict) for run in record["runs"])
    table = read_or_none(lambda: _read_json(tmp_path / "x.json"))
    assert table is None or all(isinstance(value, str) for value in table.values())


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,2,3\n", "a,b\n1,inf\n", f"a,b\n1,{'x' * 200_000}\n", "a\n\0\n", "", f"a\n{HUGE}\n"],
)
def test_malformed_csv_baselines_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.csv").write_text(text)
    assert read_or_none(lambda: read_baselines(tmp_path / "b.csv")) is None


@FUZZ
@given(st.text(alphabet='019,"\n\r\0ax-²', max_size=60))
@example("")
@example("h\n1,2\n")
@example("h\na,b,x,1,1,1,1,J,1,\n")
@example(f"h\na,b,{HUGE},1,1,1,1,J,1,\n")
@example("h\n" + "a" * 200_000)
def test_any_text_as_an_index(tmp_path: Path, text: str) -> None:
    """Builds an index again if the file has a right checksum but is no index."""
    body = text.encode()
    (tmp_path / "i.csv").write_bytes(
        _encoded(f"{_FORMAT}, sha256 of what follows {hashlib.sha256(body).hexdigest()}, x")
        + b"\n"
        + body
    )
    with cpu_limit():
        assert all(isinstance(entry, Entry) for entry in load_index(tmp_path / "i.csv", "x"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "complex64", "float32", "bool", "uint64"]
)
def test_predictions_of_any_type(tmp_path: Path, dtype: str) -> None:
    arrays = {f"v/{field}": torch.zeros(3).to(getattr(torch, dtype)) for field in FIELDS}
    write_safetensors(tmp_path / "p.safetensors", arrays, {PREDICTIONS: '{"suites": {"v": "s"}}'})
    found = read_or_none(lambda: load_records(tmp_path / "p.safetensors"))
    assert found is None or (isinstance(found[1]["v"], Records) and len(found[1]["v"]) == 3)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        f'{{"suites": {HUGE}}}',
        "[]",
        '{"suites": 3}',
        '{"suites": {"\\u001b[2J": 1}}',
        "{}",
        "\0",
    ],
)
def test_malformed_predictions_are_refused(tmp_path: Path, text: str) -> None:
    write_safetensors(tmp_path / "p.safetensors", {"v/image": torch.zeros(3)}, {PREDICTIONS: text})
    assert read_or_none(lambda: load_records(tmp_path / "p.safetensors")) is None


@pytest.mark.parametrize(
    "text",
    [
        f"{'.'.join('a' * 50_000)} = 1",
        "\n".join(f"{'.'.join('a' * 2000)} = {i}" for i in range(200)),
        "a = 1\n" * 200_000,
    ],
)
def test_settings_that_take_long_to_parse_are_refused(text: str) -> None:
    """Parsing time grows with the square of the number of parts of a key."""
    with cpu_limit(), pytest.raises(UsageError, match="not settings"):
        from_toml(text)


@pytest.mark.parametrize(
    "text",
    [
        "seed = X",
        "optim.lr = X",
        "data.data_dir = X",
        "student.model_kwargs = {a = [X]}",
        "store.dirs = [X]",
        "variants.x.seed = X",
    ],
)
def test_numbers_too_long_to_print_are_refused(text: str) -> None:
    with cpu_limit(), pytest.raises(UsageError, match="not settings"):
        from_toml(text.replace("X", "0x" + "f" * 5000))


def test_many_dots_in_values_are_allowed() -> None:
    shards = ", ".join(f'"./a.b.c/{i}.d"' for i in range(60))
    assert len(from_toml(f"[store]\ndirs = [{shards}]").store.dirs) == 60


@pytest.mark.parametrize(
    "value",
    [
        "[" * 10_000,
        "{a=" * 10_000,
        HUGE,
        f"[{HUGE}]",
        '"\\ud800"',
        "1e999",
        "0x" + "f" * 5000,
        "\0",
    ],
    ids=lambda value: value[:5],
)
@pytest.mark.parametrize(
    "key",
    [
        "student.model_kwargs",
        "data.data_dir",
        "optim.lr",
        "seed",
        "augment.mean",
        "store.dirs",
        "method",
    ],
)
def test_malformed_values_of_set_are_one_line(
    capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    code = cli.main(["train", "--print-config", "--set", f"{key}={value}"])
    error = capsys.readouterr().err
    assert code in (0, 2) and (code == 0 or error.count("\n") == 1) and "failure" not in error
