"""Leases in the study's database: which process works on which trial.

A lease is a row (study, key, owner, until). A process can claim a key that is free or whose lease has expired; a thread
renews the lease while the process lives. The database's clock decides, so machines with different clocks agree. The
lease of a dead process on this machine counts as expired.
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
from harness.store.locks import lock_file

LEASE_SECONDS = 45.0  # a dead worker is noticed within this time
RENEWAL_SECONDS = 10.0
EXCLUSIVE_SECONDS = 60.0  # asking for a trial takes some milliseconds

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
    """The lease expired, and another process has taken over the trial."""


class Leases:
    """The leases of one process on a study."""

    def __init__(
        self,
        engine: sqlalchemy.Engine,
        study: str,
        file: Path | None,
        seconds: float = LEASE_SECONDS,
        owner: str | None = None,
    ):
        """`study` is its uid; `file` is the database file, None for a server. The table must exist (`make_table`).

        `owner` names a remote process that reaches the database through this one, and calls `renew` itself.
        """
        self.owner = owner or name_of_this()
        self._by_itself = owner is None
        self._engine, self._study, self._file, self._seconds = engine, study, file, seconds
        self._now = NOW[engine.dialect.name]
        self._exclusive = None if file is None else filelock.FileLock(lock_file(file, ".queue"))
        self._held: dict[str, float] = {}  # key -> earliest expiry, by this process's clock
        self._renewal: threading.Thread | None = None
        self._closed = threading.Event()

    def of(self, owner: str) -> Leases:
        """Return the leases of a remote process that reaches the database through this one."""
        return Leases(self._engine, self._study, self._file, self._seconds, owner)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the choice of the next trial to one process; the lock is released if the process dies."""
        if self._exclusive is not None:
            with self._exclusive.acquire(timeout=EXCLUSIVE_SECONDS):
                yield
        else:
            with self._engine.begin() as connection:
                number = int(self._study[:15], 16)
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
                yield

    def claim(self, key: str) -> bool:
        """Claim a key that is free, or that this process holds; return whether it holds the key now."""
        began = _clock()
        if not self._insert(key):
            holder = _noted(self._engine, self._study).get(key)  # `holders` omits dead processes
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

    def holders(self) -> dict[str, str]:
        """Return the owners of this study's leases by key, without dead processes of this machine."""
        return {key: owner for key, owner in _noted(self._engine, self._study).items() if not is_gone(owner)}

    def others(self) -> dict[str, str]:
        """Return the leases of other processes."""
        return {key: owner for key, owner in self.holders().items() if owner != self.owner}

    def check(self, key: str) -> None:
        """Raise LeaseLost unless this process holds the key. Queries the database only near the lease's expiry."""
        if _clock() < self._held.get(key, 0.0) - RENEWAL_SECONDS / 2:
            return
        self.confirm(key)

    def confirm(self, key: str, within: sqlalchemy.Connection | None = None) -> None:
        """Raise LeaseLost unless this process holds the key by the database.

        `within` a transaction, the process keeps the key until its end: other claims wait.
        """
        if not self._renew(key, within):
            raise LeaseLost(key)

    def release(self, key: str) -> None:
        """Release a key, if this process holds it."""
        if key in self._held:
            self._delete(key=key, owner=self.owner)
            self._held.pop(key, None)  # last: a locked database is retried

    def clear(self) -> None:
        """Delete all leases of this study: their owners are dead, or have outlived their coordinator."""
        self._delete()

    def dismiss(self, owner: str) -> None:
        """Delete an owner's leases; it notices at its next renewal or check."""
        self._delete(owner=owner)

    def _delete(self, **columns: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(sqlalchemy.delete(TABLE).filter_by(study=self._study, **columns))

    def renew(self) -> None:
        """Renew all leases of this process."""
        for key in list(self._held):
            self._renew(key)

    def close(self) -> None:
        """Release all leases."""
        self._closed.set()
        if self._renewal is not None:
            self._renewal.join()
        with contextlib.suppress(SQLAlchemyError):  # then they expire
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
    """Return a thread, not started, that calls `renew` repeatedly until `closed` is set."""

    def work() -> None:
        while not closed.wait(RENEWAL_SECONDS):
            with contextlib.suppress(SQLAlchemyError):
                renew()  # else the lease runs on; the trial's own writes raise the database's error

    return threading.Thread(target=work, name="leases", daemon=True)


def holders(engine: sqlalchemy.Engine, study: str) -> dict[str, str]:
    """Return the owners of a study's leases by key, without dead processes of this machine."""
    if not sqlalchemy.inspect(engine).has_table(TABLE.name):  # an interrupted start did not create it
        return {}
    return {key: owner for key, owner in _noted(engine, study).items() if not is_gone(owner)}


def _noted(engine: sqlalchemy.Engine, study: str) -> dict[str, str]:
    held = sqlalchemy.select(TABLE).where(TABLE.c.study == study, TABLE.c.until >= NOW[engine.dialect.name])
    with engine.connect() as connection:
        return {row.key: row.owner for row in connection.execute(held)}


def make_table(engine: sqlalchemy.Engine) -> None:
    """Create the table of leases if it does not exist."""
    TABLE.create(engine, checkfirst=True)


def _clock() -> float:
    """Return seconds, including the machine's sleep where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
