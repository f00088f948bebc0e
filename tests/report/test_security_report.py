"""Reports of untrusted run folders: markup is inert, any numbers and nesting still make a page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("numpy")

from dad_fast.cli import main as cli
from tests.limits import cpu_limit

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[2J'=cmd()|`x`[a](javascript:b)"
RECORD = json.dumps(
    {
        "variant": EVIL,
        "method": EVIL,
        "seed": 1,
        "epochs": 1,
        "seconds": 1,
        "discretizer": {"name": EVIL},
    }
    | {
        "suites": {EVIL: {"top1": 50, "ece": 1, "nll": 1, "num_images": 10}},
        "teacher": {"name": EVIL, "seen": EVIL, "suites": {}},
    }
)
FACTS = json.dumps(
    {
        "gpus": [{"name": EVIL}],
        "cpu": EVIL,
        "threads": EVIL,
        "git": EVIL,
        "versions": {EVIL: EVIL},
        "weights": {EVIL: EVIL},
    }
)
KINDS = ("train", "validation", "epoch", "end", "start", EVIL)
DEEP = "[" * 10**5
ODD = [
    json.dumps(
        {
            "kind": kind,
            "step": step,
            "seconds": value,
            "loss": value,
            "gpu": value,
            "suites": value,
            "top1": value,
        }
    )
    for kind in KINDS
    for step, value in ((0, []), ("x", {}), (None, EVIL), ([], -1), (1, True))
]
FOLDERS = {
    "names": {
        "results.json": RECORD,
        "run.json": FACTS,
        "config.toml": f"method = {json.dumps(EVIL)}\n",
        "metrics.jsonl": "\n".join(ODD),
    },
    "not a number": {
        "results.json": RECORD.replace("50", "1e999").replace('"ece": 1', '"ece": NaN'),
        "metrics.jsonl": '{"kind": "train", "step": 1e999, "loss": NaN}\n{"kind": "train", "step": -1, "loss": 1e308}\n'
        + '{"kind": "train", "step": '
        + "9" * 400
        + "}\n",
    },
    "nesting": {
        "results.json": DEEP,
        "run.json": '{"a":' * 10**5,
        "config.toml": "a=" + DEEP,
        "metrics.jsonl": DEEP + "\n",
    },
    "a key of many parts": {"results.json": RECORD, "config.toml": f"{'.'.join('a' * 20_000)} = 1"},
    "a number that cannot be printed": {
        "results.json": RECORD,
        "config.toml": "seed = 0x" + "f" * 5000,
    },
    "other types": {
        "results.json": json.dumps(
            {"runs": [{"variant": 1, "suites": {"v": {"top1": 5}}}, 3, None], "ablation": 3}
        )
    },
    "surrogates": {"results.json": '{"suites": {"\\ud800": {"top1": 1}}, "method": "\\udfff"}'},
    "a sheet": {
        "results.json": RECORD,
        "sheet.safetensors": "x" * 100,
    },
}


class Acts(HTMLParser):
    """Collect the tags and attributes of a page that would run or fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.found = 0, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += 1
        self.found += (
            [tag] if tag in ("script", "iframe", "object", "embed", "base", "form") else []
        )
        for name, value in attrs:
            if name.startswith("on") or (
                name in ("href", "src") and not (value or "").startswith(("#", "data:"))
            ):
                self.found.append(f"{tag} {name}={value}")


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_page_of_an_untrusted_run_is_inert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str]
) -> None:
    (tmp_path / "run").mkdir()
    for name, content in files.items():
        (tmp_path / "run" / name).write_bytes(content.encode())
    with cpu_limit():
        assert cli.main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    printed = capsys.readouterr()
    acts = Acts()
    acts.feed(page)
    assert acts.seen > 10 and not acts.found and "default-src 'none'" in page
    assert not set("\u202e\x1b") & set(page + printed.out + printed.err)
