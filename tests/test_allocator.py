"""The allocator's variables: set by the command before torch, unless the user set one."""

import os
import subprocess
import sys

import pytest

from dad_fast.allocator import EXPANDABLE, VARIABLES, describe_allocator, use_expandable_segments

COMMAND = """
import os, sys
from dad_fast.cli.main import main
main(["train", "--preset", "demo", "--print-config"])
print("torch" in sys.modules, *(os.environ.get(name) for name in {names}), file=sys.stderr)
"""


@pytest.fixture
def unset(monkeypatch):
    for name in (*VARIABLES, "PYTORCH_HIP_ALLOC_CONF"):
        # Recorded first, so that what the code sets is removed after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: other systems leave the allocator alone"
)
def test_a_command_sets_both_variables_before_torch_is_imported(unset):
    code = COMMAND.format(names=VARIABLES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.split() == ["False", EXPANDABLE, EXPANDABLE]


@pytest.mark.parametrize("name", [*VARIABLES, "PYTORCH_HIP_ALLOC_CONF"])
def test_what_the_user_set_stays(unset, name):
    unset.setenv(name, "max_split_size_mb:64")
    use_expandable_segments()
    assert [other for other in VARIABLES if other in os.environ and other != name] == []
    assert describe_allocator() == ("max_split_size_mb:64", f"{name} is set in the environment")


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: other systems leave the allocator alone"
)
def test_the_default_is_described(unset):
    assert describe_allocator()[0] == "torch's default"
    use_expandable_segments()
    assert describe_allocator()[0] == EXPANDABLE
    # A child process finds both set and describes them alike.
    use_expandable_segments()
    assert "is set in the environment" not in describe_allocator()[1]
