"""Run a hyperparameter study: `python run_study.py --trials 50`; see `harness.cli.commands`."""

import sys

from harness.training import interrupt

if __name__ == "__main__":
    interrupt.install()  # before the slow imports
    from harness.cli.commands import process

    process(["run", *sys.argv[1:]], program="run_study.py")
