"""The files for Kubernetes, SkyPilot and Docker: their fields, and the commands inside them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

from dad_fast.cli.train import make_parser
from dad_fast.config.resolve import gather

ROOT = Path(__file__).parents[2]
# Options of torchrun that take a value.
TORCHRUN = {"--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "scripts" / name).read_text(encoding="utf-8")))


def check_command(words: list[str]) -> dict[str, str]:
    """Check `[.../]torchrun ... -m dad_fast train ...`; returns torchrun's options."""
    assert Path(words[0]).name == "torchrun"
    at = words.index("-m")
    assert words[at + 1 : at + 3] == ["dad_fast", "train"]
    options = dict(word.split("=", 1) for word in words[1:at])
    assert options.keys() == TORCHRUN
    given = vars(make_parser().parse(words[at + 3 :]))
    assert given["resume"] == "auto" and given["output"].startswith("/runs/")
    assert gather(given["preset"], None, [], {}).method == "dad"
    assert {"data.data_dir", "discretizer.name", "teacher.name"} <= given.keys()
    return options


def test_kubernetes_job_is_valid_and_its_command_runs() -> None:
    service, job = documents("kubernetes.yaml")
    validate = pytest.importorskip("kubernetes_validate")
    for document in (service, job):
        validate.validate(document, "1.31", strict=True)
    template = job["spec"]["template"]["spec"]
    (container,) = template["containers"]
    options = check_command([*container["command"], *container["args"]])

    # One pod a machine, each with its own rank, and all meet at the first one.
    assert job["spec"]["completionMode"] == "Indexed"
    machines = str(job["spec"]["completions"])
    assert machines == str(job["spec"]["parallelism"]) == options["--nnodes"]
    assert options["--node-rank"] == "$(JOB_COMPLETION_INDEX)"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert options["--nproc-per-node"] == str(gpus)
    name, subdomain = job["metadata"]["name"], template["subdomain"]
    assert options["--master-addr"] == f"{name}-0.{subdomain}"
    assert service["metadata"]["name"] == subdomain and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}

    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"data": "/data", "runs": "/runs", "shm": "/dev/shm"}
    assert mounts.keys() == {volume["name"] for volume in template["volumes"]}


def test_skypilot_task_starts_torchrun_on_every_machine(tmp_path: Path) -> None:
    (task,) = documents("skypilot.yaml")
    # Of SkyPilot's task reference.
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "volumes", "setup", "run"}
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    assert set(task["volumes"]) == {"/data", "/runs"} and task["num_nodes"] == 2

    # bash expands the command as on the second machine of two.
    torchrun = tmp_path / ".venv/bin/torchrun"
    torchrun.parent.mkdir(parents=True)
    torchrun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)
    machine = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    machine |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    done = subprocess.run(
        ["bash", "-euc", task["run"]],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **machine},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    words = done.stdout.splitlines()
    at = words.index("-m")
    pairs = [f"{key}={value}" for key, value in zip(words[0:at:2], words[1:at:2], strict=True)]
    options = check_command(["torchrun", *pairs, *words[at:]])
    assert options["--master-addr"] == "10.0.0.7" and options["--node-rank"] == "1"


def test_dockerfile_installs_extras_that_exist_and_starts_the_command() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
    assert {step for step, _ in steps} == known
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name for found in re.findall(r"\$\{wheel\}\[([\w,]+)\]", text) for name in found.split(",")
    }
    assert {"cuda12", "cuda13"} < extras <= project["optional-dependencies"].keys()
    bounds = next(item for item in project["dependencies"] if item.startswith("torch>"))
    assert f"'{bounds}'" in text

    # Every stage of an argument exists for both values, and every copied file is there.
    stages = {rest.split(" AS ")[1] for step, rest in steps if step == "FROM" and " AS " in rest}
    for stage in ("devel", "runtime"):
        assert {f"{stage}12", f"{stage}13"} <= stages
    for step, rest in steps:
        if step == "COPY" and not rest.startswith("--from"):
            assert (ROOT / shlex.split(rest)[0]).exists()
    assert dict(steps[-2:]) == {"ENTRYPOINT": '["dad-fast"]', "CMD": '["doctor"]'}
    assert "Not yet built on a GPU host" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
