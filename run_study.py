"""Run a hyperparameter study: `python run_study.py --trials 50`. The work is done in `harness.cli`."""

import sys

from harness.cli import process

if __name__ == "__main__":
    process(["run", *sys.argv[1:]], program="run_study.py")
