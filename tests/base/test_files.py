"""Several writers of one file: each has a name of its own, the dead are tidied away, the late leave it as it is."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from harness.base import processes
from harness.base.errors import Halt
from harness.base.files import remove_abandoned, replace_file, replacing


def partials(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob("*.partial"))


def of_a_dead_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A half-written file whose writer has died."""
    process = subprocess.Popen(["true"])
    process.wait()
    with monkeypatch.context() as there:
        there.setattr(os, "getpid", lambda: process.pid)
        left = path.with_name(path.name + processes.mark())
    left.write_bytes(b"half")
    return left


def of_another_machine(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "boot_id").write_text("another")
    with monkeypatch.context() as there:
        there.setattr(processes, "BOOT", tmp_path / "boot_id")
        left = path.with_name(path.name + processes.mark())
    left.write_bytes(b"half")
    return left


def test_two_writers_of_one_file_do_not_touch_each_other(tmp_path: Path) -> None:
    path = tmp_path / "trial-0.safetensors"
    with replacing(path) as slow:
        slow.write(b"the first ")
        slow.flush()
        replace_file(path, b"of the other writer")
        assert path.read_bytes() == b"of the other writer"
        slow.write(b"writer's")
    assert path.read_bytes() == b"the first writer's"
    assert partials(tmp_path) == []


def test_who_may_no_longer_write_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "trial-0.safetensors"
    replace_file(path, b"right")

    def check() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        replace_file(path, b"wrong", check)
    assert path.read_bytes() == b"right"
    assert partials(tmp_path) == []


def test_what_dead_writers_left_goes_with_the_next_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trial-0.safetensors"
    of_a_dead_process(path, monkeypatch)
    (tmp_path / "trial-0.safetensors.partial").write_bytes(b"of an older version")
    other = tmp_path / "trial-0.safetensors.mine.partial"
    other.write_bytes(b"of somebody else")
    living = path.with_name(path.name + processes.mark())
    living.write_bytes(b"being written")
    replace_file(path, b"whole")
    assert partials(tmp_path) == sorted([living.name, other.name])


def test_of_another_machine_a_file_is_left_that_was_lately_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "trial-0.safetensors"
    left = of_another_machine(path, tmp_path, monkeypatch)
    remove_abandoned(path)
    assert left.exists()
    old = time.time() - processes.SILENT_SECONDS - 60
    os.utime(left, (old, old))
    remove_abandoned(path)
    assert not left.exists()


def test_a_folder_that_was_taken_away_is_no_lack_of_room(tmp_path: Path) -> None:
    path = tmp_path / "tiny.checkpoints" / "trial-0.safetensors"
    with pytest.raises(Halt) as halt, replacing(path):
        path.parent.rename(tmp_path / "moved")
    assert "No such file or directory" in str(halt.value)
    assert "make room" not in str(halt.value)
    replace_file(path, b"again")
    assert path.read_bytes() == b"again"
