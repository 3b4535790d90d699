"""Measure trials per second of a storage, with trials that take no time: `python -m benchmarks.throughput`

Worker processes ask, report three epochs and tell, with leases and locks as in a study, on SQLite and on PostgreSQL (a
local server, with fsync). Also prints, per trial, statements and transactions, the CPU time of the worker and of the
server, and how long the worker waits for and holds the lock under which one worker at a time takes the next trial.
Every run has a new database. --history measures what a long history and many running trials cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sqlalchemy

from harness.base.keys import trial_key
from harness.config import find as catalogue
from harness.config.events import Completed
from harness.config.study import Study
from harness.search import suggest as asking
from harness.search.pruners import no_pruning
from harness.search.samplers import Sampler, tpe
from harness.store.leases import TABLE
from harness.store.opening import open_store
from harness.store.store import NoTrialFree, Store

SECONDS = 5.0
WORKERS = (1, 2, 4, 8, 16, 32)
SAMPLERS = {"random": Sampler("RandomSampler"), "TPE": tpe()}
EPOCHS = 3
ENDLESS = 10**6
TICK = os.sysconf("SC_CLK_TCK")


def study_of(sampler: str) -> Study:
    demo = catalogue.find(str(Path(__file__).parent.parent / "studies" / "demo.py")).study
    return dataclasses.replace(demo, sampler=SAMPLERS[sampler], pruner=no_pruning(), trials=ENDLESS)


# -- a worker ------------------------------------------------------------------------------------------------------


class Counted:
    """What a store does, counted: statements, transactions, and the seconds with the lock."""

    def __init__(self, store: Store) -> None:
        self.counts: Counter[str] = Counter()
        engine: Any = store._engine
        sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *_: self.counts.update(["statements"]))
        sqlalchemy.event.listen(engine, "commit", lambda *_: self.counts.update(["transactions"]))
        leases: Any = store._leases
        self._exclusive = leases.exclusive
        leases.exclusive = self.exclusive

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        came = time.perf_counter()
        with self._exclusive():
            sat = time.perf_counter()
            yield
            self.counts["held"] += time.perf_counter() - sat  # type: ignore[assignment]
        self.counts["waited"] += sat - came  # type: ignore[assignment]


def no_op(study: Study, store: Store) -> None:
    """One trial that takes no time."""
    asked = store.ask(study, study.trials)
    for epoch in range(1, EPOCHS + 1):
        store.report(asked, epoch, epoch / 10)
    store.tell(asked, Completed(value=(asked.number % 97) / 97), [], seconds=0.0)


def work(sampler: str, url: str, ready: Any, results: Any) -> None:
    study = study_of(sampler)
    with open_store(study, url, joining=True) as store:
        counted = Counted(store)
        store.trials()
        ready.wait()
        counted.counts.clear()
        began, computed, done = time.monotonic(), time.process_time(), 0
        while time.monotonic() - began < SECONDS:
            try:
                no_op(study, store)
                done += 1
            except NoTrialFree:
                continue
        counts = dict(counted.counts) | {"trials": done, "computed": time.process_time() - computed}
        results.put(counts | {"seconds": time.monotonic() - began})
    sys.stdout.flush()


# -- a run ---------------------------------------------------------------------------------------------------------


def run(sampler: str, url: str, workers: int, server: int | None) -> dict[str, float]:
    """Figures of so many workers on a new study; `server` is the PID of the database's server."""
    with open_store(study_of(sampler), url):
        pass
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(workers + 1), context.Queue()
    processes = [context.Process(target=work, args=(sampler, url, ready, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    try:
        ready.wait(120)
        served = cpu_seconds(server)
        counts = [results.get(timeout=60) for _ in processes]
        served = cpu_seconds(server) - served
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    total = {name: sum(each.get(name, 0.0) for each in counts) for name in counts[0]}
    trials = total["trials"]
    return {
        "trials": trials,
        "per second": sum(each["trials"] / each["seconds"] for each in counts),
        "statements": total["statements"] / trials,
        "transactions": total["transactions"] / trials,
        "worker ms": 1000 * total["computed"] / trials,
        "server ms": 1000 * served / trials,
        "lock held ms": 1000 * total["held"] / trials,
        "lock waited ms": 1000 * total["waited"] / trials,
    }


def cpu_seconds(pid: int | None) -> float:
    """What a server and its children have computed so far."""
    if pid is None:
        return 0.0
    seconds = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if str(pid) in (fields[1], stat.parent.name):
            mine = (11, 12, 13, 14) if stat.parent.name == str(pid) else (11, 12)  # with the children that have ended
            seconds += sum(int(fields[place]) for place in mine) / TICK
    return seconds


@contextmanager
def postgres() -> Iterator[Any]:
    """A server of this machine, from the binaries in the wheel of pgserver; with fsync, as a study has it."""
    from tests.postgres import PostgreSQL

    wheel = importlib.util.find_spec("pgserver")
    if wheel is None or not wheel.submodule_search_locations:
        sys.exit("error: pgserver is not installed; install it, or give --database sqlite.")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = PostgreSQL(Path(wheel.submodule_search_locations[0]), folder)
    server.start()
    try:
        server.do("ALTER SYSTEM SET fsync = on")
        server.do("SELECT pg_reload_conf()")
        yield server
    finally:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(folder)


@contextmanager
def places(database: str) -> Iterator[Any]:
    """A function that gives the URL of a new database, and the server's PID."""
    if database == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            numbers = iter(range(ENDLESS))
            yield lambda: f"sqlite:///{folder}/{next(numbers)}.db", None
        return
    with postgres() as server:
        yield server.create, server._process.pid


# -- a long history ------------------------------------------------------------------------------------------------


def history(database: str) -> None:
    """What one question costs a new worker and one that knows the history, beside many running trials."""
    print("| finished | running | first suggestion, s | later, ms | of these with the lock, ms | in the sampler, ms |")
    print("|---|---|---|---|---|---|", flush=True)
    with places(database) as (place, _):
        for finished, running in ((100, 10), (1000, 10), (100, 1000), (1000, 1000)):
            study, url = study_of("TPE"), place()
            with open_store(study, url) as store:
                fill(study, store, finished, running)
            with open_store(study, url, joining=True) as store:
                print(f"| {finished} | {running} | {question(study, store)} |", flush=True)


COPIED = {  # what belongs to a trial, and whether running ones have it
    "trial_params": ("param_name, param_value, distribution_json", True),
    "trial_intermediate_values": ("step, intermediate_value, intermediate_value_type", True),
    "trial_values": ("objective, value, value_type", False),
    "trial_user_attributes": ("key, value_json", False),
}


def fill(study: Study, store: Store, finished: int, running: int) -> None:
    """Copies of one finished trial, by SQL; leases say that others are at the running ones."""
    no_op(study, store)
    optuna_study: Any = store.optuna_study
    first, study_id = optuna_study.trials[0]._trial_id, optuna_study._study_id
    uid, engine = store.uid, store._engine
    assert engine is not None
    leases = [
        {"study": uid, "key": trial_key(number), "owner": "elsewhere/-/1 x", "until": time.time() + 10**6}
        for number in range(finished, finished + running)
    ]
    with engine.begin() as connection:
        for state, numbers in (("COMPLETE", range(1, finished)), ("RUNNING", range(finished, finished + running))):
            statement = f"INSERT INTO trials (number, study_id, state) VALUES (:number, {study_id}, '{state}')"
            connection.execute(sqlalchemy.text(statement), [{"number": number} for number in numbers])
        for table, (columns, of_running) in COPIED.items():
            which = "" if of_running else "AND t.state = 'COMPLETE'"
            selected = f"SELECT t.trial_id, {columns} FROM trials t, {table} p"
            where = f"WHERE p.trial_id = {first} AND t.trial_id <> {first} {which}"
            connection.execute(sqlalchemy.text(f"INSERT INTO {table} (trial_id, {columns}) {selected} {where}"))
        connection.execute(sqlalchemy.insert(TABLE), leases)


def question(study: Study, store: Store) -> str:
    """The seconds of the first question of a worker, and of what later ones consist."""
    counted, spent, ask = Counted(store), [0.0], asking.ask

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return ask(*arguments)
        finally:
            spent[0] += time.perf_counter() - began

    asking.ask = timed  # type: ignore[assignment]
    try:
        times, locked, sampler = [], [], []
        for _ in range(6):
            counted.counts.clear()
            spent[0] = 0.0
            began = time.perf_counter()
            asked = store.ask(study, study.trials)
            times.append(time.perf_counter() - began)
            locked.append(float(counted.counts["held"]))
            sampler.append(spent[0])
            store.tell(asked, Completed(value=0.5), [], seconds=0.0)
    finally:
        asking.ask = ask
    later = [1000 * statistics.median(each[1:]) for each in (times, locked, sampler)]
    return " | ".join([f"{times[0]:.2f}", *(f"{each:.0f}" for each in later)])


# -- in full -------------------------------------------------------------------------------------------------------

COLUMNS = ("per second", "statements", "transactions", "worker ms", "server ms", "lock held ms", "lock waited ms")


def main() -> None:
    from benchmarks.machine import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), help="one of them (default: both)")
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="one of them (default: both)")
    parser.add_argument("--workers", type=int, nargs="*", default=list(WORKERS), metavar="N")
    parser.add_argument("--history", action="store_true", help="measure suggestions after a long history instead")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, a line per run")
    args = parser.parse_args()
    print(f"{describe()}; load {os.getloadavg()[0]:.1f}", flush=True)
    for database in [args.database] if args.database else ["sqlite", "postgresql"]:
        if args.history:
            print(f"\n{database}")
            history(database)
            continue
        with places(database) as (place, server):
            for sampler in [args.sampler] if args.sampler else SAMPLERS:
                print(f"\n{database}, {sampler}\n\n| workers | trials | {' | '.join(COLUMNS)} | load |")
                print("|" + "---|" * (len(COLUMNS) + 3), flush=True)
                for workers in args.workers:
                    figures = run(sampler, place(), workers, server)
                    if args.json:
                        print(json.dumps({"workers": workers} | figures), flush=True)
                        continue
                    cells = [f"{workers}", f"{figures['trials']:.0f}", *(f"{figures[each]:.1f}" for each in COLUMNS)]
                    print(f"| {' | '.join(cells)} | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
