"""`python -m tests.pretended_gpu COMMAND...`: run a command on the pretended GPU."""

import os
import sys
from pathlib import Path

from tests.pretended_gpu import build

if __name__ == "__main__":
    if reason := build.missing():
        sys.exit(reason)
    library = build.build(Path("build/pretended_gpu").resolve())
    os.execvpe(sys.argv[1], sys.argv[1:], build.environment(library))
