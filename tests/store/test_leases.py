"""Leases on a real SQLite database: one holder at a time, the dead are not waited for, the late find out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
import sqlalchemy

from harness.base import processes
from harness.base.processes import here, in_words, is_gone, name_of_this
from harness.store import leases
from harness.store.leases import LeaseLost, Leases, make_table

STUDY = "0123456789abcdef" * 2


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/study.db")
    make_table(engine)
    yield engine
    engine.dispose()


def of(engine: sqlalchemy.Engine, seconds: float = 30.0) -> Leases:
    return Leases(engine, STUDY, Path(str(engine.url.database)), seconds)


def test_a_key_has_one_holder_who_may_claim_it_again(engine: sqlalchemy.Engine) -> None:
    one, other = of(engine), of(engine)
    assert one.claim("trial-0")
    assert one.claim("trial-0")
    assert not other.claim("trial-0")
    assert other.claim("trial-1")
    assert one.holders() == {"trial-0": one.owner, "trial-1": other.owner}
    one.check("trial-0")
    one.close()
    assert other.claim("trial-0"), "what is let go is free"
    other.close()
    assert leases.holders(engine, STUDY) == {}


def test_other_studies_in_the_same_database_do_not_matter(engine: sqlalchemy.Engine) -> None:
    one, other = of(engine), Leases(engine, "f" * 32, None)
    assert one.claim("trial-0")
    assert other.claim("trial-0")
    one.close()
    other.close()


def test_who_lets_the_time_pass_finds_that_another_one_has_taken_over(
    engine: sqlalchemy.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 60.0)  # as a process that stands still
    late, next_one = of(engine, seconds=0.05), of(engine)
    assert late.claim("trial-0")
    time.sleep(0.1)
    assert next_one.claim("trial-0")
    with pytest.raises(LeaseLost):
        late.check("trial-0")
    late.release("trial-0")
    assert next_one.holders().get("trial-0") == next_one.owner, "whoever is late lets nothing go that is another one's"
    next_one.close()


def test_who_is_late_keeps_what_nobody_wanted(engine: sqlalchemy.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 60.0)
    late = of(engine, seconds=0.05)
    assert late.claim("trial-0")
    time.sleep(0.1)
    late._seconds = 60.0  # so that it is still held when it is asked for
    late.check("trial-0")
    assert late.holders().get("trial-0") == late.owner
    late.close()


def test_a_living_process_keeps_its_lease_without_doing_anything(
    engine: sqlalchemy.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.05)
    busy, other = of(engine), of(engine)
    assert busy.claim("trial-0")
    began = until(engine)
    while until(engine) < began + 1.0:  # its thread moves the time on
        time.sleep(0.02)
    assert not other.claim("trial-0")
    busy.close()


def until(engine: sqlalchemy.Engine) -> float:
    """Until when the only lease is held."""
    with engine.connect() as connection:
        return float(connection.execute(sqlalchemy.text("SELECT until FROM harness_leases")).scalar_one())


def elsewhere(engine: sqlalchemy.Engine, lines: str) -> subprocess.Popen[str]:
    """A process that has done these lines with `leases` of its own when it is returned."""
    code = (
        "import sys, time, pathlib, sqlalchemy\n"
        "from harness.store.leases import Leases\n"
        "engine = sqlalchemy.create_engine(sys.argv[1])\n"
        "leases = Leases(engine, sys.argv[2], pathlib.Path(engine.url.database))\n"
        f"{lines}\n"
        "print('done', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(engine.url), STUDY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    return process


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(engine: sqlalchemy.Engine) -> None:
    holder = elsewhere(engine, "assert leases.claim('trial-0')")
    mine = of(engine)
    assert not mine.claim("trial-0")
    killed(holder)
    assert mine.holders() == {}
    assert mine.claim("trial-0")
    mine.close()


def test_of_other_machines_nothing_is_known() -> None:
    assert not is_gone(f"another-machine/pid:[1]/{2**22 + 1} 0")
    assert not is_gone(f"{here()}/{os.getpid()} 0")
    assert is_gone(f"{here()}/{2**22 + 1} 0")


def test_a_machine_with_the_same_host_name_is_another_one(
    engine: sqlalchemy.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boot_id").write_text("0d8f3c1e-5d3a-4b0a-9a43-6f6c1b1f7c55\n")
    with monkeypatch.context() as there:
        there.setattr(processes, "BOOT", tmp_path / "boot_id")
        theirs = of(engine)
        place, _, process = theirs.owner.rpartition("/")
        theirs.owner = f"{place}/{2**22 + 1} {process.partition(' ')[2]}"  # a PID that this machine has not
        assert theirs.claim("trial-0")
        assert is_gone(theirs.owner)
    assert not is_gone(theirs.owner)
    mine = of(engine)
    assert not mine.claim("trial-0")
    assert mine.others() == {"trial-0": theirs.owner}
    host = socket.gethostname()
    assert in_words(theirs.owner) == f"{2**22 + 1} on {host}"
    assert len(mine.owner) <= 256, "what the table has room for"
    mine.close()
    theirs.close()


def test_a_pid_that_has_come_again_is_another_process() -> None:
    mine = name_of_this()
    assert not is_gone(mine)
    place, _, process = mine.rpartition("/")
    pid, _, rest = process.partition(" ")
    began = int(rest.partition(".")[0])
    assert is_gone(f"{place}/{pid} {began - 1}.{rest.partition('.')[2]}")


def test_without_a_boot_id_the_network_card_tells_machines_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BOOT", tmp_path / "none")
    first = here()
    assert here() == first
    monkeypatch.setattr(uuid, "getnode", lambda: 1)
    assert here() != first


def test_the_lock_is_free_again_when_the_process_at_it_dies(engine: sqlalchemy.Engine) -> None:
    at_it = elsewhere(engine, "place = leases.exclusive(); place.__enter__()")
    lock = filelock.FileLock(f"{engine.url.database}.queue.lock")
    with pytest.raises(filelock.Timeout):
        lock.acquire(blocking=False)
    killed(at_it)
    with of(engine).exclusive():
        pass
