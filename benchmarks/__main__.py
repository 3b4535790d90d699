"""List the benchmarks, or run their quick modes:

    python -m benchmarks                        list the scripts
    python -m benchmarks --quick [NAME ...]     fail if a ratio falls by a third below its record
    python -m benchmarks --record [NAME ...]    record the current ratios for this kind of machine

Records are ratios within one run, kept in benchmarks/records.json; absolute times say nothing about another machine.
A ratio is judged only against a record of the same kind of machine, and only if nothing else ran; otherwise it is
printed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.machine import Others, kind

HERE = Path(__file__).parent
RECORDS = HERE / "records.json"
ALLOWED = 2 / 3  # of the record
IDLE_CORES = 0.1  # others may take that much of one: an idle machine's services take 0.00 to 0.03


def scripts() -> dict[str, str]:
    """Name and first line of every script."""
    found = {}
    for file in sorted(HERE.glob("*.py")):
        text = file.read_text()
        if 'if __name__ == "__main__":' in text and file.name != "__main__.py":
            found[file.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def has_quick(name: str) -> bool:
    return "    script(" in (HERE / f"{name}.py").read_text()


def quick(name: str) -> dict[str, float]:
    """The ratios of a script's quick mode, run in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    # As run_study.py does: otherwise two processes on the same cores keep each other from working. A record is of all
    # cores, whatever the environment says.
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {name} --quick exited with {done.returncode}.")
    ratios: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="compare the quick modes with their records")
    parser.add_argument("--record", action="store_true", help="save the ratios of the quick modes as records")
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts (default: all with a quick mode)")
    args = parser.parse_args()
    known = scripts()
    quick_ones = list(filter(has_quick, known))
    if unknown := [name for name in args.names if name not in quick_ones]:
        print(f"error: {unknown[0]!r} has no quick mode; choose from {', '.join(quick_ones)}.", file=sys.stderr)
        return 2
    if args.names and not (args.quick or args.record):
        print(f"error: add --quick, or run `python -m benchmarks.{args.names[0]}`.", file=sys.stderr)
        return 2
    if not (args.quick or args.record):
        for name, line in known.items():
            print(f"{name:<18} {line}")
        return 0
    records = json.loads(RECORDS.read_text())
    names, here = args.names or quick_ones, records.get(kind(), {})
    if args.record:
        found = {name: recorded(name) for name in names}
        RECORDS.write_text(json.dumps(records | {kind(): here | found}, indent=2) + "\n")
        return 0
    if not here:
        print(f"There is no record of this kind of machine ({kind()}): nothing is judged.")
    return 1 if [name for name in names if not holds(name, here.get(name, {}))] else 0


def recorded(name: str) -> dict[str, float]:
    """Today's ratios of a script, rounded. Ends the program when the machine is not idle."""
    others = Others()
    found = {key: float(f"{ratio:.3g}") for key, ratio in quick(name).items()}
    if doubt := disturbed(others.cores()):
        sys.exit(f"error: {name} is not recorded: {doubt}; wait until the machine is idle.")
    print(name, found, flush=True)
    return found


def holds(name: str, records: Mapping[str, float]) -> bool:
    """Print a script's ratios beside their records; whether none is shown to be too slow.

    One that is gets a second chance, for a ratio may be anything once.
    """
    for _ in range(2):
        start, others = time.monotonic(), Others()
        found = quick(name)
        doubt = disturbed(others.cores())
        low = [key for key, ratio in found.items() if ratio < ALLOWED * records.get(key, 0.0)]
        for key, ratio in found.items():
            against = f"record {records[key]:.3g}" if key in records else "no record"
            verdict = "" if key not in low else "   TOO SLOW" if not doubt else "   not judged"
            print(f"{name:<18} {key:<44} {ratio:>8.3g}   {against}{verdict}", flush=True)
        print(f"{name:<18} {time.monotonic() - start:.0f} s{f'; {doubt}' if low and doubt else ''}", flush=True)
        if not low or doubt:
            return True
    return False


def disturbed(cores: float | None) -> str:
    """Why a measurement beside which others took so many cores is no judgement; "" if it is one."""
    if cores is None:
        return "whether the machine was idle cannot be seen here"
    return f"other processes took {cores:.2f} cores" if cores > IDLE_CORES else ""


if __name__ == "__main__":
    sys.exit(main())
