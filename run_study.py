"""Run a hyperparameter study: `python run_study.py --trials 50`. The work is done in `harness.cli.commands`."""

import sys

from harness.training import interrupt

if __name__ == "__main__":
    interrupt.install()  # before anything that takes time to import
    from harness.cli.commands import process

    process(["run", *sys.argv[1:]], program="run_study.py")
