"""Run a hyperparameter study: `python run_study.py --trials 50`. The work is done in `harness.cli`."""

import sys

from harness import interrupt

if __name__ == "__main__":
    interrupt.install()  # before anything that takes time to import
    from harness.cli import process

    process(["run", *sys.argv[1:]], program="run_study.py")
