"""`python -m harness COMMAND`; see `harness.cli`."""

import sys

from harness import interrupt

if __name__ == "__main__":
    interrupt.install()  # before anything that takes time to import
    from harness.cli import process

    process(sys.argv[1:])
