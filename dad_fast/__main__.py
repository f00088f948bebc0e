"""Entry point of `python -m dad_fast` and `torchrun -m dad_fast`, the same as `dad-fast`."""

import sys

from dad_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
