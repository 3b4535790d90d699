"""`python -m harness COMMAND`; see `harness.cli.commands`."""

import sys

from harness.training import interrupt

if __name__ == "__main__":
    interrupt.install()  # before anything that takes time to import
    from harness.cli.commands import process

    process(sys.argv[1:])
