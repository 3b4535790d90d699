"""Full disks and locked databases, made for real: small file systems, and a second connection that holds a lock."""

from __future__ import annotations

import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harness.report import digest
from harness.storage import open_store, read_store
from tests.faulty import CommandLine, Disk, complete, one_sentence, small_disk, small_study

ROOMY = 16_384  # kilobytes; the report alone takes 4.8 MB, for it carries plotly


@pytest.fixture
def line(
    tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield CommandLine(tmp_path, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    found: str = complete(small_study(image_cache), tmp_path_factory.mktemp("undisturbed"))
    return found


def state_of(folder: Path) -> tuple[int, str]:
    """The finished trials of the study in a folder, and its digest."""
    with read_store("tiny", f"sqlite:///{folder}/tiny.db") as store:
        return store.finished(), digest(store)


# -- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_on_a_disk_that_is_full_again_and_again_is_the_undisturbed_one(
    line: CommandLine, undisturbed: str
) -> None:
    studies = line.place / "studies"
    seen: set[str] = set()
    with small_disk(studies, 40) as disk:
        finished = 0
        for kilobytes in (40, 100, 140, 180, 220, 260, 300, 340, 400, 600, 5400, 5600, 6000, ROOMY):
            disk.resize(kilobytes)
            ended = line.run()
            print(kilobytes, ended.code, ended.err, ended.out, file=open("/tmp/hBw/log","a"))
            if ended.code == 0:
                break
            pass
            pass
            seen.add(ended.err)
        assert state_of(studies) == (3, undisturbed)
