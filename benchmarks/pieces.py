"""Check that a study run in pieces ends with the same digest as an uninterrupted one.

    python -m benchmarks.pieces --study demo --trials 8
    python -m benchmarks.pieces --study flowers102 --data-root DIR --trials 2 --set backbone.pretrained=false ...

All arguments except --pieces and --seed are passed to run_study.py. Pieces end in turns with SIGKILL and SIGTERM, at
random times in equal parts of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe

PROJECT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times")
    parser.add_argument("--study", default="demo")
    own, rest = parser.parse_known_args()
    moments = random.Random(own.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, cut = (places(Path(folder), name) for name in ("straight", "pieces"))
        command = [sys.executable, "-u", "run_study.py", "--study", own.study, *rest]
        start = time.monotonic()
        subprocess.run([*command, *straight], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        ends = []
        for piece in range(own.pieces - 1):
            kind = (signal.SIGKILL, signal.SIGTERM)[piece % 2]
            process = subprocess.Popen([*command, *cut], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
            at = seconds / own.pieces * moments.uniform(0.8, 1.2)
            try:
                process.wait(timeout=at)
                raise SystemExit(f"Piece {piece + 1} ended by itself; the study is too short for {own.pieces} pieces.")
            except subprocess.TimeoutExpired:
                process.send_signal(kind)
            output, _ = process.communicate()
            last = [line for line in output.splitlines() if line.startswith(("trial", "final"))]
            ends.append(f"{kind.name} after {at:.0f} s (exit code {process.returncode}), last line: {last[-1:]}")
        subprocess.run([*command, *cut], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
        digests = [digest(own.study, place) for place in (straight, cut)]
    print(describe())
    print(f"straight, {seconds:.0f} s: {digests[0]}")
    print(f"in {own.pieces} pieces:    {digests[1]}", *ends, sep="\n  ")
    print("equal" if digests[0] == digests[1] else "DIFFERENT")
    return 0 if digests[0] == digests[1] else 1


def places(folder: Path, name: str) -> list[str]:
    (folder / name).mkdir()
    return [
        "--storage",
        f"sqlite:///{folder / name}/study.db",
        "--tracking-uri",
        f"sqlite:///{folder / name}/mlflow.db",
    ]


def digest(study: str, place: list[str]) -> str:
    command = [sys.executable, "-m", "harness", "show", study, "--digest", *place]
    return subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
