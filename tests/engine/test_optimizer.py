"""Detection of NVIDIA's apex, and the errors of `--opt` for its optimizers."""

import sys

import pytest

from dad_fast.engine.optimizer import OPTIMIZERS, apex_problem, check_optimizer
from dad_fast.errors import EnvironmentProblem


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write empty modules that Python finds first."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)

    def write(*files):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return write


def test_pypi_apex_is_refused(packages):
    assert "not installed" in apex_problem()[0]
    packages("apex/__init__.py", "apex/lib/__init__.py")
    assert "web toolkit" in apex_problem()[0] and "uninstall" in apex_problem()[1]
    packages("apex/optimizers/__init__.py")
    assert "amp_C" in apex_problem()[0]
    packages("amp_C.py")
    assert apex_problem() == ("", "")


def test_apex_optimizer_errors_name_the_fix(packages):
    check_optimizer("adamw", cuda=False)
    with pytest.raises(
        EnvironmentProblem,
        match="--opt fusedadamw is NVIDIA apex's: it is not installed; .* or use --opt adamw",
    ):
        check_optimizer("fusedadamw", cuda=True)
    packages("apex/optimizers/__init__.py", "apex/__init__.py", "amp_C.py")
    check_optimizer("FusedAdamW", cuda=True)
    with pytest.raises(EnvironmentProblem, match="CUDA device"):
        check_optimizer("fusedlamb", cuda=False)


def test_apex_names_are_those_of_timm():
    optim = pytest.importorskip("timm.optim")
    infos = {name: optim.get_optimizer_info(name) for name in OPTIMIZERS}
    assert all(str(info.opt_class).startswith("apex.optimizers.") for info in infos.values())
    assert {optim.get_optimizer_info(name).name for name in OPTIMIZERS.values()} == set(
        OPTIMIZERS.values()
    )
