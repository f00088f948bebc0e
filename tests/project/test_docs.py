"""Documents match the repository: links, anchors, files, flags, tables and examples; and help fits a terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dad_fast.cli.main import main

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "records"
FOLDERS = ("", "docs", "benchmarks", "kernels")
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
COMMANDS = (
    "train",
    "ablate",
    "eval",
    "average",
    "analyze",
    "predict",
    "export",
    "precompute",
    "store",
    "fit-discretizer",
    "report",
    "profile",
    "doctor",
)
NAMED_FILE = re.compile(r"`((?:tests|scripts|benchmarks|docs|csrc|kernels|dad_fast)/[\w./*-]+)`")
COMMAND_LINE = re.compile(r"^(?:dad-fast|\S.*-m dad_fast) .*$", re.M)


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_file_names_exist(page):
    text = without_code(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link

    for name in NAMED_FILE.findall(text):
        assert "OP" in name or list(ROOT.glob(name)), name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list(ROOT.glob(f"tests/**/{name}")) or list(ROOT.glob(f"benchmarks/{name}")), name


def test_every_saving_is_explained():
    from dad_fast.config.schema import MODEL_SAVINGS, VQGAN_SAVINGS

    text = (ROOT / "docs" / "savings.md").read_text(encoding="utf-8")
    names = [*MODEL_SAVINGS, *(f"vqgan_{name}" for name in VQGAN_SAVINGS)]
    assert not [name for name in names if f"`{name}`" not in text]


def test_tables_of_methods_and_teachers_match_the_registries():
    tables = script("registry_tables")
    for page in tables.PAGES:
        is_current = tables.with_tables(page) == page.read_text(encoding="utf-8")
        assert is_current, "run python scripts/registry_tables.py"


def test_every_teacher_has_a_form_that_starts_with_its_name():
    from dad_fast.models.registry import FORMS, TEACHERS

    assert set(FORMS) == set(TEACHERS.own_names())
    # Files are named by their path; modules are passed by Python code.
    for name in set(FORMS) - {"file", "module"}:
        assert FORMS[name] and all(form.text.startswith(f"{name}:") for form in FORMS[name])


@pytest.fixture(scope="module")
def helps():
    """Output of -h by command; train has --help-all, since other commands take its settings."""
    found = {}
    for arguments in ([], *([command] for command in COMMANDS), ["train", "--help-all"]):
        asked = arguments if "--help-all" in arguments else [*arguments, "-h"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(asked) == 0
        found[" ".join(arguments)] = out.getvalue()
    return found


def test_help_fits_a_terminal(helps):
    for command, text in helps.items():
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100, (command, max(lines, key=len))
        assert len(lines) <= 50 or command == "train --help-all", (command, len(lines))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_command_lines_exist(page, helps):
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    for line in COMMAND_LINE.findall(text):
        command = re.search(r"(?:dad-fast|dad_fast) ([\w-]+)", line)
        assert command and command[1] in COMMANDS, line

        documented = helps[command[1]] + helps["train --help-all"]
        known = set(re.findall(r"--[\w-]+", documented.replace("--[no-]", "--")))
        call = line[command.start() :].partition(" #")[0]
        for flag in re.findall(r" (--[a-z][\w-]*)", call):
            assert flag in known or flag.replace("--no-", "--") in known, (line, flag)


def recipes() -> list[list[str]]:
    """Arguments of `dad-fast train` in docs/recipes.md, under Slurm and torchrun too."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?:dad-fast train|torchrun.* train|sbatch.*slurm\.sh) (.*)$", page, re.M)
    return [line.split() for line in found]


def test_settings_of_every_recipe_would_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (students,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    (tmp_path / "students.toml").write_text(students, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    assert len(recipes()) >= 8
    for arguments in recipes():
        assert main(["train", *arguments, "--print-config"]) == 0, arguments
        out, problems = capsys.readouterr()
        assert "would stop" not in problems, (arguments, problems)
        output = arguments[arguments.index("-o") + 1]
        assert output.startswith("runs/") and "[student]" in out


def test_table_of_discretizers_is_made_from_the_registry():
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    from dad_fast.discretizers import overview
    from dad_fast.discretizers.vqgan.config import OTHER_LAYOUTS, PRESETS

    page = overview.PAGE.read_text(encoding="utf-8")
    assert set(overview.PUBLISHED) == {*PRESETS, *OTHER_LAYOUTS}
    # By hand: 172.0 + 360.1 GFLOP, 784 codes of 14 bits.
    assert "| VQGAN f8-16384 | `FILE.ckpt` | 28x28 codes of 14 bits | 532 |" in page
    for row in overview.built_in_rows():
        assert f"\n{row}\n" in page


@pytest.mark.slow
def test_table_of_discretizers_is_what_the_code_gives_today():
    pytest.importorskip("torch")
    from dad_fast.discretizers.overview import PAGE, with_table

    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page


def test_demo_table_matches_its_record():
    from dad_fast.evaluation.tables import markdown, read_record

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in markdown(read_record(RECORDS / "demo-5-seeds.json")).splitlines()[:7]:
        name, _num_seeds, *cells = line.split("|")[1:]
        row = "|".join(["", name.replace(" teacher embedded:digits", " teacher"), *cells])
        assert row in readme, line


def script(name: str) -> Any:
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_desk_model_tables_match_their_record():
    record = json.loads((RECORDS / "desk-model.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert script("desk_model").with_tables(page, record) == page
    rates = tomllib.loads((ROOT / "dad_fast/tools/dry_run/rates.toml").read_text(encoding="utf-8"))
    assert record["rates"] == {"name": "H200", **rates["H200"]}


def test_readme_says_what_the_desk_model_says():
    record = json.loads((RECORDS / "desk-model.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^H200 .*$", readme, re.M)
    images_per_second, hours = map(float, row.split()[-2:])
    assert images_per_second == record["forms"]["bf16, kernels, compiled"]["images_per_second"]
    images_per_hour = images_per_second * 3600
    # 40 epochs of ImageNet-1k
    assert hours == pytest.approx(40 * 1_281_167 / images_per_hour, rel=0.01)


@pytest.mark.slow
def test_desk_model_is_what_the_code_gives_today():
    for package in ("torch", "timm", "open_clip"):
        pytest.importorskip(package)
    record = json.loads((RECORDS / "desk-model.json").read_text(encoding="utf-8"))
    for name, form in script("desk_model").make_record()["forms"].items():
        assert form["ms"] == pytest.approx(record["forms"][name]["ms"], rel=0.05), name
        assert form["peak_GiB"] == pytest.approx(record["forms"][name]["peak_GiB"], rel=0.05), name


@pytest.mark.parametrize("record", sorted(RECORDS.glob("*.json")), ids=lambda path: path.name)
def test_records_are_compact(record):
    assert record.read_text(encoding="utf-8").count("\n") <= 1


def test_api_page_is_made_from_the_docstrings():
    for package in ("torch", "timm", "open_clip"):
        pytest.importorskip(package)
    import dad_fast as df

    module = script("api_page")
    is_current = module.PAGE.read_text(encoding="utf-8") == module.markdown()
    assert is_current, "run python scripts/api_page.py"
    named = [name for group in module.GROUPS.values() for name in group]
    assert {*named, "__version__"} == set(df.__all__)


def run_code(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run code in an empty folder, and return the names that it defines."""
    for package in ("torch", "timm", "open_clip", "mlxtend", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "example", "exec"), names)
    return names


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "examples" / "digits.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = run_code("\n".join(cells), tmp_path, monkeypatch)
    assert names["results"]["test"]["top1"] > 20
    assert (tmp_path / "runs" / "notebook-export" / "model.pt2").exists()


def test_readme_example_runs(tmp_path, monkeypatch):
    (code,) = python_blocks(ROOT / "README.md")
    names = run_code(code, tmp_path, monkeypatch)
    assert names["attacked"].images.shape == (8, 3, 28, 28)
    assert all(p.grad is not None for p in names["student"].parameters())


@pytest.mark.slow
def test_commands_for_tables_run_as_pasted(tmp_path, monkeypatch, cache):
    pytest.importorskip("datasets")
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("\n## Hugging Face data sets and Parquet\n")[2].partition("\n## ")[0]
    _, code, _, commands, _ = section.split("```")
    run_code(code.removeprefix("python"), tmp_path, monkeypatch)
    for line in commands.strip().splitlines():
        program, *arguments = line.split()
        assert program == "dad-fast" and main(arguments) == 0, line
    assert (tmp_path / "runs" / "parquet" / "results.json").is_file()
