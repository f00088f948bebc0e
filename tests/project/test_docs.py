"""What the documents say is there: links, anchors, files, tests, flags; and what `-h` prints fits a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dad_fast.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for where in ("", "docs", "benchmarks", "kernels") for path in (ROOT / where).glob("*.md")
)
COMMANDS = (
    "train",
    "ablate",
    "eval",
    "analyze",
    "predict",
    "export",
    "precompute",
    "store",
    "report",
    "profile",
    "doctor",
)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", text, re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_of_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`((?:tests|scripts|benchmarks|docs|csrc|dad_fast)/[\w./*-]+)`", text):
        assert "OP" in name or list(ROOT.glob(name)), name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list(ROOT.glob(f"tests/**/{name}")) or list(ROOT.glob(f"benchmarks/{name}")), name


@pytest.fixture(scope="module")
def helps():
    """What -h prints, by verb; of train --help-all, since other verbs take its settings."""
    import contextlib
    import io

    found = {}
    for arguments in ([], *([verb] for verb in COMMANDS), ["train", "--help-all"]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main([*arguments, *(() if "--help-all" in arguments else ("-h",))]) == 0
        found[" ".join(arguments)] = out.getvalue()
    return found


def test_help_fits_a_terminal(helps):
    for verb, text in helps.items():
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100, (verb, max(lines, key=len))
        assert len(lines) <= 50 or verb == "train --help-all", (verb, len(lines))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_command_lines(page, helps):
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S)).replace("\\\n", " ")
    for line in re.findall(r"^(?:dad-fast|\S.*-m dad_fast) .*$", blocks, re.M):
        verb = re.search(r"(?:dad-fast|dad_fast) (\w+)", line)
        assert verb and verb[1] in COMMANDS, line
        known = set(
            re.findall(
                r"--[\w-]+", (helps[verb[1]] + helps["train --help-all"]).replace("--[no-]", "--")
            )
        )
        for flag in re.findall(r" (--[a-z][\w-]*)", line[line.index(verb[0]) :].partition(" #")[0]):
            assert flag in known or flag.replace("--no-", "--") in known, (line, flag)


def test_the_table_of_the_demo_is_what_its_record_says():
    from dad_fast.evaluate.tables import markdown, read_record

    shown = (ROOT / "README.md").read_text()
    lines = markdown(read_record(ROOT / "docs" / "records" / "demo-5-seeds.json")).splitlines()
    for line in lines[:7]:
        name, _, *cells = line.split("|")[1:]  # without the number of seeds
        assert (
            "|".join(["", name.replace(" teacher embedded:digits", " teacher"), *cells]) in shown
        ), line
