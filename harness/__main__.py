"""`python -m harness COMMAND`; see `harness.cli.commands`."""

import sys

from harness.training import interrupt

if __name__ == "__main__":
    interrupt.install()  # before the slow imports
    from harness.cli.commands import process

    process(sys.argv[1:])
