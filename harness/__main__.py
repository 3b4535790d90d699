"""`python -m harness COMMAND`; see `harness.cli`."""

import sys

from harness.cli import process

if __name__ == "__main__":
    process(sys.argv[1:])
