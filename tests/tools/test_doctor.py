"""`dad-fast doctor` on this machine and on simulated machines with the wrong packages."""

from __future__ import annotations

import getpass
import importlib.util
import json
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dad_fast.cli import main as cli
from dad_fast.tools.doctor import packages
from dad_fast.tools.doctor import run as doctor
from dad_fast.tools.doctor.row import Row

pytest.importorskip("timm")


def only(rows: object, component: str) -> Row:
    (row,) = [row for row in rows if row.component == component]  # type: ignore[attr-defined]
    return row


def make_package(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def make_distribution(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[1]: line.split()[0] for line in lines if line and line[0] != " "}
    assert states["python"] == states["torch"] == states["timm"] == "ok"
    assert {"csrc", "apex", "dali", "xformers", "cache", "cuda"} <= {
        name.partition(":")[0] for name in states
    }
    assert max(map(len, lines)) <= 100
    summary = next(i for i, line in enumerate(lines) if line.startswith("Everything required"))
    assert lines[summary + 2].startswith("For a bug report")
    block = lines[summary + 4 :]
    assert all(line.startswith("    ") for line in block)
    text = "\n".join(block)
    for words in ("dad-fast 0.", "torch ", "csrc ", "GPU "):
        assert words in text
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert not {socket.gethostname(), getpass.getuser()} & set(re.findall(r"[\w.-]+", text))


def test_json_has_rows_and_environment(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    keys = {"component", "state", "detail", "fix", "required"}
    assert all(set(row) == keys for row in found["rows"])
    states = {row["component"]: row["state"] for row in found["rows"]}
    assert states["python"] == states["torch"] == "ok"
    assert {"dad_fast", "python", "packages", "gpus", "cuda", "driver"} <= set(found["environment"])


def test_numerics() -> None:
    from dad_fast.tools.doctor.numerics import rows

    found = list(rows())
    assert {row.component for row in found} == {"codebook search", "attack"} and all(
        row.state == "ok" for row in found
    )
    search = found[0].detail
    # The problem is hard: the float32 shortcut fails on it.
    assert search.startswith("cpu: 0 of 2048") and "shortcut: 0)" not in search


def test_numerics_see_a_wrong_kernel_and_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dad_fast.methods.attack import PGD
    from dad_fast.tools.doctor import numerics

    cpu = torch.device("cpu")
    monkeypatch.setattr(
        numerics, "nearest_code", lambda z, e: (e.square().sum(1) - 2 * z @ e.T).argmin(1)
    )
    monkeypatch.setattr(numerics, "PGD", lambda steps, **settings: PGD(steps=1, **settings))
    assert numerics.search_row(cpu).state == numerics.attack_row(cpu).state == "wrong"
    assert numerics.search_row(cpu).required


def test_numerics_run_the_self_test_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dad_fast.kernels import cases, pgd_update, pgd_update_triton
    from dad_fast.tools.doctor.numerics import kernel_rows

    pytest.importorskip("triton")

    def wrong(*args):
        delta, image = pgd_update.reference(*args)
        return delta * 1.01, image

    attack = cases.pgd_update_case(torch.device("cpu"), 8, "l2", 0.1, 0.1)
    for launch, state in ((pgd_update.reference, "ok"), (wrong, "wrong")):
        monkeypatch.setattr(pgd_update_triton, "launch", launch)
        (row,) = kernel_rows("cuda:0", iter([attack]))
        assert (row.component, row.state, row.required) == (cases.PGD_UPDATE, state, False)
        assert row.detail.startswith("cuda:0: ")
    assert "allowed" in row.detail and "torch in its place" in row.fix


def test_a_missing_package_fails_and_names_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "pynvml"):
        pytest.importorskip(package)
    monkeypatch.setattr(
        packages,
        "requirements",
        lambda: ["no-such-package>=1.0", "nvidia-ml-py>=12", "rich>=99", "numpy>=1,<1.1"],
    )
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor.run(numerics=False) == 3
    text = capsys.readouterr().out
    assert "wrong  no-such-package" in text and "fix: pip install 'no-such-package>=1.0'" in text
    assert (
        "off    nvidia-ml-py" in text
        and "older than the required 99" in text
        and "not tested: releases below 1.1" in text
    )
    assert "Cannot work: no-such-package, rich." in text


def test_a_package_that_does_not_import_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_binary.py").write_text("raise OSError('undefined symbol: x')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "requirements", lambda: ["broken_binary"])
    row = only(packages.packages(), "broken_binary")
    assert row.state == "wrong" and row.required and "undefined symbol" in row.detail


def test_a_check_that_crashes_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> list[Row]:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "cache", crash)
    assert "no such thing" in only(doctor.examine(), "crash").detail


def test_apex_of_pypi_is_not_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.apex(), "apex").state == "off"
    make_package(tmp_path, monkeypatch, "apex/__init__.py", "apex/lib/__init__.py")
    row = only(doctor.apex(), "apex")
    assert (
        row.state == "wrong"
        and "web toolkit" in row.detail
        and "uninstall" in row.fix
        and not row.required
    )
    make_package(tmp_path, monkeypatch, "apex/optimizers/__init__.py")
    assert "without its compiled parts" in only(doctor.apex(), "apex").detail
    make_package(tmp_path, monkeypatch, "amp_C.py")
    assert only(doctor.apex(), "apex").state == "ok"


def test_dali_placeholder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = metadata.distributions
    monkeypatch.setattr(metadata, "distributions", lambda: everywhere(path=[str(tmp_path)]))
    assert [row.state for row in doctor.dali()] == ["off"]
    make_distribution(tmp_path, monkeypatch, "nvidia-dali", "0.0.1.dev5")
    row = only(doctor.dali(), "dali")
    assert (
        row.state == "wrong"
        and "placeholder" in row.detail
        and row.fix == "pip uninstall -y nvidia-dali"
    )
    make_distribution(tmp_path, monkeypatch, "nvidia-dali-cuda130", "2.4.0")
    assert [row.state for row in doctor.dali()] == ["wrong", "ok"]


def test_deprecated_pynvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_distribution(tmp_path, monkeypatch, "pynvml", "12.0.0")
    row = next(iter(doctor.driver()))
    assert row.state == "wrong" and "deprecated" in row.detail and "nvidia-ml-py" in row.fix


def test_xformers_without_its_compiled_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, monkeypatch, "xformers/__init__.py")
    assert only(doctor.xformers(), "xformers").state == "wrong"
    make_package(tmp_path, monkeypatch, "xformers/cpp_lib.json")
    assert only(doctor.xformers(), "xformers").state == "ok"


def test_missing_csrc_is_off_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    import dad_fast.kernels

    monkeypatch.setattr(dad_fast.kernels, "csrc_status", lambda: "off: not built (run make csrc)")
    row = only(doctor.kernels(), "csrc")
    assert (row.state, row.fix, row.required) == (
        "off",
        "run make csrc",
        False,
    ) and row.detail.startswith("not built; ")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "DAD_FAST_CACHE" in only(doctor.cache(), "cache").fix


def test_requirements_are_the_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [packages.parse_requirement(text)[0] for text in packages.requirements()]
    assert {"torch", "timm", "open_clip_torch", "numpy"} <= set(names) and "mlxtend" not in names
    assert packages.parse_requirement("torch>=2.11,<2.16") == ("torch", "2.11", "2.16")
    monkeypatch.setattr(packages, "PROJECT", Path("/nowhere/pyproject.toml"))
    monkeypatch.setattr(
        metadata,
        "requires",
        lambda name: ["torch>=2.11", 'mlxtend; extra == "demo"', "x; sys_platform == 'os2'"],
    )
    assert packages.requirements() == ["torch>=2.11"]


def test_without_torch_it_still_answers() -> None:
    """Run without torch: an import hook hides it."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec; u.find_spec = lambda n, p=None: None if n == 'torch' else find(n, p);"
        "sys.modules['torch'] = None; from dad_fast.cli.main import main; sys.exit(main(['doctor']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        result.returncode == 3
        and "wrong  torch" in result.stdout
        and "Cannot work: torch" in result.stdout
    ), result
    assert "Traceback" not in result.stdout + result.stderr
