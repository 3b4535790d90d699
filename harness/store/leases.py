"""Leases: which process works on what, agreed upon in the study's own database.

A lease is a line (study, key, owner, until). Who claims a key that nobody holds, or whose holder has let the time pass,
holds it; a thread moves the time on while the process lives. The database decides, by its own clock, so machines whose
clocks differ agree. A holder on this machine whose process is gone is not waited for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from harness.base.processes import is_gone, name_of_this

LEASE_SECONDS = 45.0  # a dead worker is noticed after at most that long
RENEWAL_SECONDS = 10.0
EXCLUSIVE_SECONDS = 60.0  # somebody asking for a trial takes some milliseconds

TABLE = sqlalchemy.Table(
    "harness_leases",
    sqlalchemy.MetaData(),
    sqlalchemy.Column("study", sqlalchemy.String(64), primary_key=True),  # its uid
    sqlalchemy.Column("key", sqlalchemy.String(128), primary_key=True),
    sqlalchemy.Column("owner", sqlalchemy.String(256), nullable=False),
    sqlalchemy.Column("until", sqlalchemy.Double, nullable=False),  # seconds since 1970 by the database's clock
)
NOW: dict[str, sqlalchemy.ColumnElement[float]] = {
    "sqlite": sqlalchemy.literal_column("((julianday('now') - 2440587.5) * 86400.0)"),
    "postgresql": sqlalchemy.literal_column("extract(epoch from clock_timestamp())"),
}


class LeaseLost(Exception):
    """This process was thought dead, and another has taken up what it was working on."""


class Leases:
    """What one process holds of a study."""

    def __init__(
        self,
        engine: sqlalchemy.Engine,
        study: str,
        file: Path | None,
        seconds: float = LEASE_SECONDS,
        owner: str | None = None,
    ):
        """`study` is its uid; `file` the database's, None for a server. The table must exist (`make_table`).

        An `owner` is a process elsewhere, by its name, that reaches the database through this one, and calls `renew`.
        """
        self.owner = owner or name_of_this()
        self._by_itself = owner is None
        self._engine, self._study, self._file, self._seconds = engine, study, file, seconds
        self._now = NOW[engine.dialect.name]
        self._exclusive = None if file is None else filelock.FileLock(f"{file}.queue.lock")
        self._held: dict[str, float] = {}  # key -> until when surely, by this process's clock
        self._renewal: threading.Thread | None = None
        self._closed = threading.Event()

    def of(self, owner: str) -> Leases:
        """What a process elsewhere holds, which reaches the database through this one."""
        return Leases(self._engine, self._study, self._file, self._seconds, owner)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Where one process at a time takes the next trial; it is free again when the process dies."""
        if self._exclusive is not None:
            with self._exclusive.acquire(timeout=EXCLUSIVE_SECONDS):
                yield
        else:
            with self._engine.begin() as connection:
                number = int(self._study[:15], 16)
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
                yield

    def claim(self, key: str) -> bool:
        """Take a key that is free, or is held already by this process; whether it is held now."""
        began = _clock()
        if not self._insert(key):
            holder = _noted(self._engine, self._study).get(key)  # `holders` leaves out those that are gone
            if holder is None or not is_gone(holder):
                return False
            self._delete(key=key, owner=holder)
            if not self._insert(key):
                return False
        self._held[key] = began + self._seconds
        if self._by_itself and self._renewal is None:
            self._renewal = renewing(self.renew, self._closed)
            self._renewal.start()
        return True

    def _insert(self, key: str) -> bool:
        line = sqlalchemy.text(
            "INSERT INTO harness_leases (study, key, owner, until) "
            f"VALUES (:study, :key, :owner, {self._now} + :seconds) "
            "ON CONFLICT (study, key) DO UPDATE SET owner = excluded.owner, until = excluded.until "
            f"WHERE harness_leases.owner = excluded.owner OR harness_leases.until < {self._now}"
        )
        values = {"study": self._study, "key": key, "owner": self.owner, "seconds": self._seconds}
        with self._engine.begin() as connection:
            return bool(connection.execute(line, values).rowcount)

    def holder(self, key: str) -> str | None:
        """Who holds a key now, None when nobody does."""
        return self.holders().get(key)

    def holders(self) -> dict[str, str]:
        """Who holds what of this study now, by key; processes of this machine that are gone hold nothing."""
        return {key: owner for key, owner in _noted(self._engine, self._study).items() if not is_gone(owner)}

    def others(self) -> dict[str, str]:
        """What other processes hold now."""
        return {key: owner for key, owner in self.holders().items() if owner != self.owner}

    def check(self, key: str) -> None:
        """Raise LeaseLost unless this process holds the key. Asks the database only when its own clock is in doubt."""
        if _clock() < self._held.get(key, 0.0) - RENEWAL_SECONDS / 2:
            return
        self.confirm(key)

    def confirm(self, key: str, within: sqlalchemy.Connection | None = None) -> None:
        """Raise LeaseLost unless the database says that this process holds the key.

        What is written `within` the same transaction is written while it does: who wants the key waits for its end.
        """
        if not self._renew(key, within):
            raise LeaseLost(key)

    def release(self, key: str) -> None:
        """Let a key go, if this process holds it."""
        if key in self._held:
            self._delete(key=key, owner=self.owner)
            self._held.pop(key, None)  # not before: a database that was locked is asked again

    def clear(self) -> None:
        """Take away what anybody holds of this study: whoever held it is dead, or has outlived its coordinator."""
        self._delete()

    def dismiss(self, owner: str) -> None:
        """Take away what an owner holds; it finds so when it renews or checks next."""
        self._delete(owner=owner)

    def _delete(self, **columns: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(sqlalchemy.delete(TABLE).filter_by(study=self._study, **columns))

    def renew(self) -> None:
        """Move the time on of everything that is held."""
        for key in list(self._held):
            self._renew(key)

    def close(self) -> None:
        """Let everything go."""
        self._closed.set()
        if self._renewal is not None:
            self._renewal.join()
        with contextlib.suppress(SQLAlchemyError):  # then they run out by themselves
            for key in list(self._held):
                self.release(key)

    def _renew(self, key: str, within: sqlalchemy.Connection | None = None) -> bool:
        began = _clock()
        mine = sqlalchemy.update(TABLE).filter_by(study=self._study, key=key, owner=self.owner)
        with self._engine.begin() if within is None else contextlib.nullcontext(within) as connection:
            kept = connection.execute(mine.values(until=self._now + self._seconds)).rowcount
        if not kept:
            self._held.pop(key, None)
        elif key in self._held:
            self._held[key] = began + self._seconds
        return bool(kept)


def renewing(renew: Callable[[], None], closed: threading.Event) -> threading.Thread:
    """A thread that calls `renew` again and again until it is `closed`; not started yet."""

    def work() -> None:
        while not closed.wait(RENEWAL_SECONDS):
            with contextlib.suppress(SQLAlchemyError):
                renew()  # else the time runs on; whoever works on it hears of the database's fault itself

    return threading.Thread(target=work, name="leases", daemon=True)


def holders(engine: sqlalchemy.Engine, study: str) -> dict[str, str]:
    """Who holds what of a study now, by key; processes of this machine that are gone hold nothing."""
    if not sqlalchemy.inspect(engine).has_table(TABLE.name):  # a start was cut off before it was made
        return {}
    return {key: owner for key, owner in _noted(engine, study).items() if not is_gone(owner)}


def _noted(engine: sqlalchemy.Engine, study: str) -> dict[str, str]:
    held = sqlalchemy.select(TABLE).where(TABLE.c.study == study, TABLE.c.until >= NOW[engine.dialect.name])
    with engine.connect() as connection:
        return {row.key: row.owner for row in connection.execute(held)}


def make_table(engine: sqlalchemy.Engine) -> None:
    """Make the table of leases, if it is not there."""
    TABLE.create(engine, checkfirst=True)


def _clock() -> float:
    """Seconds that also pass while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
