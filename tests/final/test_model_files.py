"""The files of the final model: one that is lost, or not as it was written, is named, not used, and made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.base.errors import InputError
from harness.cli.commands import main
from harness.serving.model import load_saved
from harness.store.opening import read_store
from tests.faulty import CommandLine, small_study


def _edited(path: Path) -> None:
    """Valid JSON still, with another name for a class."""
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"classes": ["weed", *described["classes"][1:]]}))


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


Change = Callable[[Path], None]


@pytest.mark.slow
def test_a_changed_or_lost_file_of_the_model_is_named_and_made_again(
    line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trials", "1", "--set", "final.publish=true"]
    assert line.run(*arguments).code == 0
    folder = line.place / "studies" / "tiny.model"
    rounds: list[dict[str, Change]] = [
        {"model.json": _edited},
        {"model.pt2": _flipped, "README.md": _flipped},
        {"README.md": Path.unlink},
    ]
    for changes in rounds:
        before = {name: (folder / name).read_bytes() for name in changes}
        for name, change in changes.items():
            change(folder / name)
        capsys.readouterr()
        assert main(["doctor", "tiny"]) == 1
        said = capsys.readouterr().out
        for name in changes:
            assert f"{folder / name} is" in said
        assert "run the study again: it restores lost files" in said
        ended = line.run(*arguments)
        assert ended.code == 0
        assert "Nothing is missing" not in ended.out
        for name, content in before.items():
            assert name == "model.pt2" or (folder / name).read_bytes() == content
        assert main(["doctor", "tiny"]) == 0
    assert "Nothing is missing" in line.run(*arguments).out


@pytest.mark.slow
def test_lost_check_images_are_named_and_given_up(line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert line.run("--trials", "1").code == 0
    (line.place / "studies" / "tiny.model" / "check.safetensors").unlink()
    assert main(["doctor", "tiny"]) == 1
    assert "check.safetensors is missing; it cannot be written again" in capsys.readouterr().out
    assert "Nothing is missing" in line.run("--trials", "1").out
    assert main(["doctor", "tiny", "--fix"]) == 0
    assert main(["doctor", "tiny"]) == 0


@pytest.mark.slow
def test_an_edited_description_of_the_model_is_not_used(line: CommandLine) -> None:
    assert line.run("--trials", "1").code == 0
    folder = line.place / "studies" / "tiny.model"
    _edited(folder / "model.json")
    with (
        read_store("tiny", f"sqlite:///{line.place}/studies/tiny.db") as store,
        pytest.raises(InputError, match=r"model\.json is damaged .* run the study again: it restores lost files"),
    ):
        load_saved(small_study("data/cache"), store, folder)
