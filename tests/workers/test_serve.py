"""Workers on other machines, through a connection with a key: here other processes, some with a file system of their
own."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.base.environment import versions
from harness.base.errors import Halt, InputError
from harness.base.processes import name_of_this
from harness.config import events, jobs
from harness.search.loop import TooManyFailures
from harness.store.leases import LeaseLost
from harness.store.opening import open_store, read_store
from harness.store.records import TrialRecord
from harness.store.store import Asked, NoTrialFree, Store
from harness.workers import client, head, server, wire
from harness.workers.head import HeadLost
from harness.workers.worker import Done, Stopped, WorkerConfig
from tests import analytic
from tests.conftest import PROJECT
from tests.forked import Process
from tests.patience import PATIENCE_SECONDS
from tests.refusal import assert_refused
from tests.small import study_in
from tests.workers.test_pool import Command, single  # noqa: F401  (a fixture)

EPOCH = analytic.epoch_result(1, 0.1 + 0.2, math.nan)
MESSAGES = [
    [None, True, 3, 0.1, "text", b"\x00\xff", Path("a/b"), ["list"], ("tuple", (1, 2)), {"dict": {1: -math.inf}}],
    ["call", "owner", "tell", events.Completed(value=0.5), [EPOCH], 1.0, [{"torch": "2"}]],
    events.TrialStarted(
        key=None,
        kind="trial",
        name="trial 3",
        number=3,
        trial=3,
        params={"a": 1e-300, "b": "16-8"},
        epochs=2,
        resumed=True,
        groups="table",
        progress=events.Reached(1, 2, 3, [EPOCH]),
    ),
    events.TrialEnded(key="trial-3", number=3, params={}, outcome=events.Diverged(epoch=2, lr=0.1)),
    [events.TrialLost(number=2), events.SearchStopped(trials=3, reason="hours"), jobs.Search(), Done()],
    jobs.Train("rerank", 3, 1),
    (True, Asked(number=3, params={"a": 3}, resumed=False)),
    TrialRecord(
        number=1, state="failed", value=None, params={}, epochs=(EPOCH,), curve={1: 0.5}, reason="it", seconds=None
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_a_message_arrives_as_it_was(message: object) -> None:
    ours, theirs = socket.socketpair()
    one, other = wire.Connection(ours.detach()), wire.Connection(theirs.detach())
    with one, other:
        wire.send(one, message)
        assert repr(wire.receive(other)) == repr(message)  # there is no other number that is none


@pytest.mark.parametrize("kind", [InputError, Halt, TooManyFailures, LeaseLost])
def test_errors_arrive_with_their_text(kind: type[Exception]) -> None:
    found = wire._value(wire._plain(Stopped(kind("why, and what to do"))))
    assert type(found.error) is kind
    assert str(found.error) == "why, and what to do"
    assert isinstance(wire._value(wire._plain(NoTrialFree())), NoTrialFree)


NO_MESSAGES = [
    b"",
    b"\x80\x04.",
    b"{",
    b'["Popen", "ls"]',
    b'["EpochResult", ["no", 1]]',
    b'["bytes", 3]',
    b'["dict", 1]',
]


@pytest.mark.parametrize("content", NO_MESSAGES)
def test_what_is_no_message_makes_nothing(content: bytes) -> None:
    ours, theirs = socket.socketpair()
    one, other = wire.Connection(ours.detach()), wire.Connection(theirs.detach())
    with one, other:
        one.send_bytes(content)
        with pytest.raises(OSError, match="not a message"):
            wire.receive(other)
    with pytest.raises(TypeError, match="cannot hold a Namespace"):
        wire._plain(type("Namespace", (), {})())


# -- the key --------------------------------------------------------------------------------------------------------


def test_a_key_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            wire.make_key(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []
    wire.make_key(tmp_path / "key")
    assert len(wire.read_key(tmp_path / "key")) == 64
    assert [each.name for each in tmp_path.iterdir()] == ["key"]


def test_a_new_key_is_for_this_user_alone_and_an_old_one_stays(tmp_path: Path) -> None:
    file = tmp_path / "tiny.key"
    before = os.umask(0)
    try:
        wire.make_key(file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = wire.read_key(file)
    assert len(key) == 64
    wire.make_key(file)
    assert wire.read_key(file) == key


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"0123456789abcdef\n", 0o640, "Other users may read the key file .* chmod 600"),
        (b"0123456789abcde\n", 0o600, "has 15 bytes, but needs 16; delete the file"),
        (None, 0o600, "no key file .* copy the one of `run --serve`"),
    ],
)
def test_wrong_key_files(content: bytes | None, mode: int, words: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(InputError, match=words):
        wire.read_key(file)


# -- one server in this process -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Served:
    server: server.Server
    store: Store
    study: Any
    key: Path

    def line(self) -> client._Line:
        return client._Line(client._connected(self.server.address, self.key, wire.read_key(self.key), False))


@pytest.fixture
def served(tmp_path: Path, image_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(server, "GOODBYE_SECONDS", 2.0)
    monkeypatch.setattr(client, "WAIT_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    study, url = study_in(tmp_path, image_cache)
    config = WorkerConfig(
        file=tmp_path / "studies" / "tiny.py",
        settings=(),
        data_root=None,
        device=None,
        trials=3,
        url=url,
        checkpoints=tmp_path / "studies" / "tiny.checkpoints",
    )
    key = tmp_path / "tiny.key"
    wire.make_key(key)
    with (
        open_store(study, url) as store,
        server.Server(config, [], lambda _: None, "127.0.0.1:0", wire.read_key(key)) as listening,
    ):
        yield Served(listening, store, study, key)


@contextlib.contextmanager
def joined(served: Served) -> Iterator[tuple[client._Line, str]]:
    line, owner = served.line(), name_of_this()
    try:
        config = line("join", owner, "elsewhere", harness.__version__)
        assert config == served.server._config
        yield line, owner
    finally:
        line.close()


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_searches_through_the_connection_as_with_the_file(served: Served, tmp_path: Path) -> None:
    with joined(served) as (line, owner):
        store: Any = head._Served(line, owner, served.store.url)
        told = store.tell
        store.tell = lambda asked, outcome, epochs, seconds: told(asked, outcome, epochs, seconds)
        assert store.uid == served.store.uid
        analytic.run_analytic(served.study, store, 4)
        assert store.trials() == served.store.trials()
        assert store.facts() == served.store.facts()
    with open_store(served.study, f"sqlite:///{tmp_path}/direct.db") as direct:
        analytic.run_analytic(served.study, direct, 4)
        expected = [(each.params, each.curve, each.state, each.epochs) for each in direct.trials()]
    assert [(each.params, each.curve, each.state, each.epochs) for each in served.store.trials()] == expected


def test_who_leaves_gives_its_trial_back_at_once(served: Served) -> None:
    with joined(served) as (line, owner):
        store: Any = head._Served(line, owner, served.store.url)
        asked = store.ask(served.study, at_most=3)
        assert served.store.active_workers() == {"trial-0": owner}
        with pytest.raises(NoTrialFree):
            served.store.ask(served.study, at_most=1)
    until(lambda: not served.store.active_workers())
    again = served.store.ask(served.study)
    assert (again.number, again.params, again.resumed) == (asked.number, asked.params, True)


def test_who_falls_silent_is_lost(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LEASE_SECONDS", 1.0)
    with joined(served) as (line, owner):
        head._Served(line, owner, served.store.url).ask(served.study)
        until(lambda: not served.store.active_workers())
        with pytest.raises(HeadLost):
            line("renew", owner)


def test_workers_hear_of_the_end(served: Served) -> None:
    with joined(served) as (line, _):
        assert line("job") is None
        served.server._ending = True
        with pytest.raises(HeadLost):
            line("job")
        assert line.ended


def test_trained_weights_come_back_unless_they_are_there(served: Served) -> None:
    file, job = served.server._config.checkpoints / "final-2-seed-1.safetensors", jobs.Train("final", 2, 1)
    file = file.with_name(head._file(job))
    elsewhere = served.key.with_name(file.name)
    with joined(served) as (line, _):
        elsewhere.write_bytes(b"weights")
        head._carry(line, job, elsewhere)
        assert file.read_bytes() == b"weights"
        assert not elsewhere.exists()
        head._carry(line, job, file)
        assert file.exists()


def test_a_worker_writes_and_reads_in_the_checkpoint_folder_only(served: Served) -> None:
    outside = served.key.with_name("evil.safetensors")
    with joined(served) as (line, _):
        with pytest.raises(Halt, match="A worker cannot write"):
            line("keep", jobs.Train("final", "../../evil", 0), b"x")  # type: ignore[arg-type]
        sha = hashlib.sha256(served.key.read_bytes()).hexdigest()
        assert line("holds", str(served.key), sha) is False
    assert not list(served.key.parent.rglob("*evil*"))
    assert not outside.exists()


def test_a_machine_that_fails_does_not_stop_the_others(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    search = served.server.search()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(search), daemon=True)
    thread.start()
    with joined(served) as (line, owner):
        until(lambda: line("job") is not None)
        line("hear", owner, Stopped(Halt("the disk is full; make room")))
        with pytest.raises(Halt, match="the disk is full"):
            line("job")
    until(lambda: not served.server._workers)
    with joined(served) as (line, owner):
        until(lambda: line("job") is not None)  # the work of the other
        line("hear", owner, Done())
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert "on elsewhere stopped: the disk is full; make room" in capsys.readouterr().err


def test_strangers_do_not_hold_up_a_worker(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    host, port = wire.parts(served.server.address) or ("", 0)
    other = served.key.with_name("other.key")
    wire.make_key(other)
    with socket.create_connection((host, port)), socket.create_connection((host, port)) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(InputError, match=r"another key than .*other\.key; copy its key file"):
            client._connected(served.server.address, other, wire.read_key(other), False)
        with joined(served) as (line, _):
            assert line("job") is None
    said = capsys.readouterr().err
    assert "A connection from 127.0.0.1 had another key; it was refused." in said
    assert "Traceback" not in said


def test_connections_without_a_key_are_few(served: Served) -> None:
    host, port = wire.parts(served.server.address) or ("", 0)
    served.server._strangers = threading.BoundedSemaphore(2)
    with contextlib.ExitStack() as kept:
        silent = [kept.enter_context(socket.create_connection((host, port))) for _ in range(5)]
        assert [bool(each.recv(1)) for each in silent] == [True, True, False, False, False]  # a challenge, or the end
    until(lambda: served.server._strangers._value == 2)
    with joined(served) as (line, _):
        assert line("job") is None


def test_what_fails_on_any_machine_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the model's own code")

    told: list[Any] = []
    monkeypatch.setattr(head, "do", broken)
    head.do_through(lambda *said: told.append(said), "owner", jobs.Train("final", 2, 1), None)  # type: ignore[arg-type]
    ((method, owner, message),) = told
    assert (method, owner) == ("hear", "owner")
    assert str(message.error).startswith("A worker failed (the model's own code)")
    assert "RuntimeError: the model's own code" in capsys.readouterr().err


def test_a_worker_can_do_only_what_it_needs(served: Served) -> None:
    with joined(served) as (line, owner):
        for call in (["open", 1], ["call", owner, "set_attribute", "final", {}], ["call", owner, "_claim", "final"]):
            with pytest.raises(Halt, match="A worker cannot call"):
                line(*call)


def test_another_version_is_refused(served: Served) -> None:
    line = served.line()
    with pytest.raises(InputError, match=rf"has version {harness.__version__} .*, but elsewhere has 9\.9; install"):
        line("join", name_of_this(), "elsewhere", "9.9")
    line.close()


@pytest.mark.parametrize(("name", "what"), [("data", "data set"), ("weights", "pretrained weights")])
def test_other_images_or_weights_are_refused_before_there_is_a_job(served: Served, name: str, what: str) -> None:
    definition = served.store.facts().definition or {}
    served.store.set_attribute("definition", definition | {f"content of {name}": "another"})
    served.store.set_attribute("versions", versions())
    line = served.line()
    with pytest.raises(InputError, match=f"The {what} here differs from the study's"):
        client._work(line, served.server.address, None, None)
    line.close()
    assert served.server._workers == []


def test_a_machine_without_the_study_is_told(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there" / "studies").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    missing = dataclasses.replace(
        served.server._config, file=tmp_path / "no" / "tiny.py", checkpoints=tmp_path / "no" / "c", data_root="/no"
    )
    with pytest.raises(InputError, match=r"no study file .*there/studies/tiny\.py here, nor .*/no/tiny\.py; copy"):
        client._here(missing, None, None)
    shutil.copy(served.server._config.file, tmp_path / "there" / "studies")
    here = client._here(missing, None, "cpu")
    assert here.file == tmp_path / "there" / "studies" / "tiny.py"
    assert here.checkpoints == tmp_path / "there" / "studies" / "c"
    assert (here.data_root, here.device) == (None, "cpu")


# -- wrong input ----------------------------------------------------------------------------------------------------

SERVE = ["run", "--study", "demo", "--device", "cpu", "--serve"]
WRONG = {
    "no port": ([*SERVE, "localhost"], ["--serve 'localhost' is not HOST:PORT"]),
    "a key without a server": (["run", "--study", "demo", "--key-file", "k"], ["--key-file needs --serve"]),
    "with Ray": ([*SERVE, "127.0.0.1:0", "--engine", "ray"], ["--serve and --engine ray"]),
    "a server's database": (
        [*SERVE, "127.0.0.1:0", "--storage", "postgresql+psycopg://a@127.0.0.1:9/b"],
        ["postgresql"],
    ),
    "another machine's address": ([*SERVE, "192.0.2.1:7000"], ["--serve cannot listen at 192.0.2.1:7000"]),
    "one GPU by its number": ([*SERVE[:3], "--device", "cuda:1", "--serve", "127.0.0.1:0"], ["cuda:1"]),
    "an open key": ([*SERVE, "127.0.0.1:0", "--key-file", "open.key"], ["chmod 600 open.key"]),
    "no key": (["work", "127.0.0.1:9"], ["--key-file", "HARNESS_KEY_FILE"]),
    "no key file": (["work", "127.0.0.1:9", "--key-file", "no.key"], ["There is no key file no.key"]),
    "no address": (["work", "localhost", "--key-file", "a.key"], ["'localhost' is not HOST:PORT"]),
    "an unknown host": (["work", "db.invalid:7000", "--key-file", "a.key"], ["The host of db.invalid:7000 is unknown"]),
    "no host's name": (["work", "first..example:7000", "--key-file", "a.key"], ["first..example:7000 is unknown"]),
    "nobody there": (["work", "127.0.0.1:9", "--key-file", "a.key"], ["No server at 127.0.0.1:9", "run --serve"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(
    name: str, workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WAIT_SECONDS", -1.0)
    monkeypatch.delenv(wire.KEY_VARIABLE, raising=False)
    wire.make_key(workspace / "a.key")
    wire.make_key(workspace / "open.key")
    (workspace / "open.key").chmod(0o644)
    arguments, words = WRONG[name]
    assert_refused(workspace, capsys, arguments, words)


def test_a_port_in_use(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert_refused(workspace, capsys, [*SERVE, address], [f"--serve cannot listen at {address}", "give another"])
    with wire.listen(address):
        pass


# -- whole studies in processes -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as any_port:
        return int(any_port.getsockname()[1])


class Machines(Command):
    """A study that is served, and workers that connect to it."""

    def __init__(self, place: Path, cache: Path, **options: Any) -> None:
        super().__init__(place, cache, **options)
        self.address, self.key = f"127.0.0.1:{free_port()}", place.with_name("shared.key")
        wire.make_key(self.key)

    def serve(self, *arguments: str) -> Process:
        return self.start("--serve", self.address, "--key-file", str(self.key), *arguments)

    def work(self) -> Process:
        command = ["-m", "harness", "work", self.address, "--key-file", str(self.key)]
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        return Process(command, cwd=self.place, env=environment, start_new_session=True)

    def wait_for_trials(self, count: int, *processes: Process) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while self.begun() < count:
            ended = [each for each in processes if each.poll() is not None]
            assert not ended, ended[0].communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.1)


def ended_well(*workers: Process) -> None:
    for worker in workers:
        said, _ = worker.communicate()
        assert worker.returncode == 0, said
        assert said.splitlines()[-1].endswith("has ended, or was interrupted."), said
        assert "Traceback" not in said


def check_server(process: Process) -> str:
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_two_machines_give_what_one_process_gives(
    single: dict[str, Any],  # noqa: F811
    image_cache: Path,
    tmp_path: Path,
) -> None:
    machines = Machines(tmp_path / "two", image_cache)
    workers = [machines.work()]
    assert f"Waiting for {machines.address}" in workers[0].stdout.readline()
    process = machines.serve()
    workers.append(machines.work())
    said = check_server(process)
    ended_well(*workers)
    machines.check_against(single)
    assert re.search(rf"\npython -m harness work {machines.address} --key-file .*shared\.key\n", said)
    assert {int(number) for number in re.findall(r"Worker (\d+) connected", said)} == {0, 1}


@pytest.mark.slow
def test_a_worker_is_killed_and_another_ends_its_trial(
    single: dict[str, Any],  # noqa: F811
    image_cache: Path,
    tmp_path: Path,
) -> None:
    """The other is a process of the server's own machine."""
    machines = Machines(tmp_path / "killed", image_cache)
    process, worker = machines.serve("--workers", "1"), machines.work()
    machines.wait_for_trials(1, process, worker)
    until(lambda: any(f"/{worker.pid} " in owner for owner in _active(machines.url).values()))
    worker.kill()
    said = check_server(process)
    assert "Worker 1 on" in said
    assert "has gone; another one resumes its work" in said
    machines.check_against(single)


@pytest.mark.slow
def test_the_server_is_killed_and_its_workers_wait_for_it(
    single: dict[str, Any],  # noqa: F811
    image_cache: Path,
    tmp_path: Path,
) -> None:
    machines = Machines(tmp_path / "killed", image_cache)
    process, workers = machines.serve(), [machines.work(), machines.work()]
    machines.wait_for_trials(2, process, *workers)
    process.kill()
    process.communicate()
    said = check_server(machines.serve())
    assert "of 9 trials finished" in said
    ended_well(*workers)
    machines.check_against(single)


@pytest.mark.slow
def test_the_server_is_stopped_and_its_workers_end(
    single: dict[str, Any],  # noqa: F811
    image_cache: Path,
    tmp_path: Path,
) -> None:
    machines = Machines(tmp_path / "stopped", image_cache)
    process, workers = machines.serve(), [machines.work(), machines.work()]
    machines.wait_for_trials(2, process, *workers)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "--serve" in said.splitlines()[-1]
    assert "Traceback" not in said
    ended_well(*workers)
    running = [each.number for each in machines.trials() if each.state == "running"]
    kept = {path.stem for path in (machines.place / "studies" / "tiny.checkpoints").glob("trial-*")}
    assert not running or kept & {f"trial-{each}" for each in running}
    machines.run("--workers", "2")
    machines.check_against(single)


@pytest.mark.slow
def test_a_worker_is_stopped_and_its_trial_resumes_from_its_checkpoint(
    single: dict[str, Any],  # noqa: F811
    image_cache: Path,
    tmp_path: Path,
) -> None:
    machines = Machines(tmp_path / "stopped", image_cache)
    process, worker = machines.serve(), machines.work()
    machines.wait_for_trials(1, process, worker)
    worker.send_signal(signal.SIGTERM)
    said, _ = worker.communicate()
    assert worker.returncode == 130, said
    assert "Resume with:" in said
    assert "Traceback" not in said
    until(lambda: not _active(machines.url))
    other = machines.work()
    said = check_server(process)
    ended_well(other)
    machines.check_against(single)
    assert "Worker 0 on" in said


def _active(url: str) -> dict[str, str]:
    with contextlib.suppress(InputError), read_store("tiny", url) as store:  # until it has begun
        return store.active_workers()
    return {}


@pytest.mark.slow
def test_a_machine_with_a_file_system_of_its_own(
    single: dict[str, Any],  # noqa: F811
    image_cache: Path,
    tmp_path: Path,
) -> None:
    """It sees an empty folder in the place of the server's; its study file and checkpoints are elsewhere."""
    machines = Machines(tmp_path / "here", image_cache)
    shutil.copytree(machines.place / "studies", tmp_path / "there" / "studies")
    work = f"{sys.executable} -m harness work {machines.address} --key-file {machines.key}"
    process = machines.serve()
    worker = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {machines.place} && exec {work}"],
        cwd=tmp_path / "there",
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _ = worker.communicate()
    if "harness" not in said and "study" not in said:
        process.kill()
        pytest.skip("a file system of its own takes root on Linux")
    assert worker.returncode == 0, said
    check_server(process)
    machines.check_against(single)
    assert list((tmp_path / "there" / "studies").glob("tiny.checkpoints/*")) == []


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_machines_killed_at_random_lose_nothing_and_do_nothing_twice(image_cache: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    chance, found, kills = random.Random(seed), [], 0
    for number in range(2):
        machines = Machines(tmp_path / str(number), image_cache, epochs=4, trials=40)
        process, workers = machines.serve(), [machines.work() for _ in range(3)]
        while process.poll() is None:
            time.sleep(chance.uniform(0.5, 2.5))
            if not machines.begun() or kills >= 12 * (number + 1):
                continue
            kills += 1
            if chance.random() < 0.2:
                process.kill()
                process.communicate()
                process = machines.serve()
            else:
                lost = workers.pop(chance.randrange(3))
                lost.kill()
                lost.communicate()
                workers.append(machines.work())
        check_server(process)
        ended_well(*workers)
        machines.check()
        found.append(machines.results())
    assert found[0] == found[1]
    assert kills >= 12
