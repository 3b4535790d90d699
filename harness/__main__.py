"""`python -m harness COMMAND`; see `harness.cli`."""

import gc
import sys

from harness.cli import main

if __name__ == "__main__":
    gc.disable()  # while everything is imported; see `running.keep_imports`
    sys.exit(main(sys.argv[1:]))
