"""Rows of `dad-fast doctor` for the declared dependencies."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from dad_fast.tools.doctor.row import Row

PROJECT = Path(__file__).parents[3] / "pyproject.toml"
# Distributions whose import name differs from their own.
MODULES = {
    "open_clip_torch": "open_clip",
    "apache-tvm-ffi": "tvm_ffi",
    "pillow": "PIL",
    "nvidia-ml-py": "pynvml",
    "scikit-learn": "sklearn",
}
# Declared dependencies that the CPU does not need. Their own rows below report what is off without
# them.
OPTIONAL = {"triton", "apache-tvm-ffi", "nvidia-ml-py"}


def packages() -> Iterator[Row]:
    """Import every declared dependency and compare its version with the declared range."""
    for requirement in requirements():
        name, lowest, below = parse_requirement(requirement)
        required = name not in OPTIONAL
        fix = f"pip install '{requirement.partition(';')[0].strip()}'"
        version = installed(name)
        try:
            module = import_module(MODULES.get(name, name.replace("-", "_")))
        except ModuleNotFoundError as error:
            missing = "not installed" if version is None else f"{version} does not import: {error}"
            yield Row(name, "wrong" if required else "off", missing, fix, required)
            continue
        except Exception as error:  # a broken binary raises anything
            yield Row(
                name,
                "wrong",
                f"{version} does not import: {' '.join(str(error).split())}",
                fix + " --force-reinstall",
                required,
            )
            continue
        version = version or str(getattr(module, "__version__", "version unknown"))
        if lowest and as_tuple(version) < as_tuple(lowest):
            yield Row(name, "wrong", f"{version}, older than the required {lowest}", fix, required)
        elif below and as_tuple(version) >= as_tuple(below):
            yield Row(
                name, "wrong", f"{version}, not tested: releases below {below} are", fix, False
            )
        else:
            yield Row(name, "ok", version, required=required)


def requirements() -> list[str]:
    """Return the declared dependencies without extras, from the checkout's pyproject.toml or the
    installed metadata.
    """
    if PROJECT.exists():
        declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        declared = [item for item in metadata.requires("dad-fast") or [] if "extra ==" not in item]
    return [
        item
        for item in declared
        if "sys_platform" not in item
        or re.search(rf"sys_platform == ['\"]{sys.platform}['\"]", item)
    ]


def parse_requirement(text: str) -> tuple[str, str, str]:
    """Split 'torch>=2.11,<2.16' into ('torch', '2.11', '2.16')."""
    name = re.match(r"[A-Za-z0-9._-]+", text)
    lowest = re.search(r">=\s*([\d.]+)", text)
    below = re.search(r"<\s*([\d.]+)", text)
    return name[0] if name else text, lowest[1] if lowest else "", below[1] if below else ""


def as_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
