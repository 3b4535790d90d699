"""A real PostgreSQL, from the binaries in the wheel of pgserver.

They are started here and not by the wheel's own launcher, which listens on no port, asks for no password, and as root
adds a user to the machine and opens every folder above its own.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_SECONDS

PASSWORD = "petal-4711"
CONFIGURATION = "fsync = off\n"  # the machine does not lose its power in a test


class PostgreSQL:
    """A server on loopback in `folder`: over TCP it asks for the password, on its socket it does not."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)  # as root the server runs as somebody else
        self._binaries = wheel / "pginstall" / "bin"
        if os.geteuid() == 0:
            self._binaries = _copied(wheel, folder)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self._initialise()

    def _initialise(self) -> None:
        data, sockets, password = (self.folder / name for name in ("data", "sockets", "password"))
        data.mkdir()
        sockets.mkdir()
        sockets.chmod(0o777)
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            shutil.chown(data, **_somebody())
        options = ["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=utf8"]
        command = [self._binaries / "initdb", "-D", data, *options, f"--pwfile={password}", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **_unprivileged())
        with (data / "postgresql.conf").open("a") as file:
            file.write(CONFIGURATION)

    def start(self) -> None:
        place = ["-D", self.folder / "data", "-h", "127.0.0.1", "-p", str(self.port), "-k", self.folder / "sockets"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", *place],
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                **_unprivileged(),
            )
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end, "PostgreSQL does not start"
            time.sleep(0.02)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._socket()).close()
        except psycopg.OperationalError:
            return False
        return True

    def _socket(self) -> str:
        return f"host={self.folder / 'sockets'} port={self.port} user=postgres dbname=postgres"

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End every connection and stop; with SIGKILL as when the machine fails."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(timeout=PATIENCE_SECONDS)

    def do(self, statement: str) -> None:
        """Execute a statement as the server's administrator."""
        import psycopg

        with psycopg.connect(self._socket(), autocommit=True) as connection:
            connection.execute(statement)

    def create(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        self.do(f"CREATE DATABASE test_{self._databases}")
        return self.url(f"test_{self._databases}")

    def url(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql+psycopg://postgres:{password}@127.0.0.1:{self.port}/{database}"


def _copied(wheel: Path, folder: Path) -> Path:
    """The binaries where somebody else may read them; they find their libraries beside themselves."""
    shutil.copytree(wheel / "pginstall", folder / "pgserver" / "pginstall", symlinks=True)
    shutil.copytree(wheel.parent / "pgserver.libs", folder / "pgserver.libs")
    return folder / "pgserver" / "pginstall" / "bin"


def _somebody() -> dict[str, int]:
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


def _unprivileged() -> dict[str, Any]:
    """For `subprocess`: PostgreSQL refuses to run as root."""
    return {**_somebody(), "extra_groups": []} if os.geteuid() == 0 else {}


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSQL]:
    """One server for all tests of a process."""
    for module in ("psycopg", "pgserver"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (there is no pgserver for Python 3.13 and newer)")
    wheel = importlib.util.find_spec("pgserver")  # imported, it would make folders elsewhere
    assert wheel is not None
    assert wheel.submodule_search_locations is not None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are its user's alone
    server = PostgreSQL(Path(wheel.submodule_search_locations[0]), folder)
    server.start()
    yield server
    server.stop(signal.SIGQUIT)  # nobody reads its data any more
    shutil.rmtree(folder)


@pytest.fixture
def database(postgres: PostgreSQL) -> str:
    """The URL of an empty database."""
    return postgres.create()
