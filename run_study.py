"""Run a hyperparameter study: `python run_study.py --trials 50`. The work is done in `harness.cli`."""

import gc
import sys

from harness.cli import main

if __name__ == "__main__":
    gc.disable()  # while everything is imported; see `running.keep_imports`
    sys.exit(main(["run", *sys.argv[1:]], program="run_study.py"))
