"""Damaged files, each with bytes that were really changed: noticed, named, never used."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.base.errors import Halt
from harness.base.files import Damaged
from harness.cli.commands import main
from harness.config.events import EpochEnded, Event, TrialStarted
from harness.config.study import Study
from harness.data.splits import load_test
from harness.store.opening import read_store
from harness.training.checkpoint import read_tensors, write_tensors
from tests.faulty import CommandLine, Died, complete, one_sentence, small_study


@pytest.fixture
def study(image_cache: Path) -> Study:
    return small_study(image_cache)


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x41
    path.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_image_cache_is_named_and_made_again(
    tmp_path: Path, undisturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small_study(tmp_path / "cache")
    complete(study, tmp_path)
    arrays = sorted((tmp_path / "cache").glob("*.npy"))
    for array in arrays:
        flipped(array, 200 + len(array.name))
    (tmp_path / "again").mkdir()
    capsys.readouterr()
    assert complete(study, tmp_path / "again") == undisturbed
    said = capsys.readouterr().err
    # A split that the search never reads at a size may stay damaged until it is asked for.
    assert said.count("is damaged (its checksum is wrong); rebuilding it.") >= 3
    assert "Traceback" not in said


def text_file(path: Path) -> None:
    path.write_text("not a checkpoint\n" * 100)


def pickle_file(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": [1, 2, 3]}))


def foreign_tensors(path: Path) -> None:
    save_file({"model/stem.weight": torch.zeros(3)}, path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit in the header's length": lambda path: flipped(path, 3),
    "a flipped bit in the header": lambda path: flipped(path, 12),
    "a flipped bit in the record": lambda path: flipped(path, path.read_bytes().index(b"seed") + 8),
    "a flipped bit in the body": lambda path: flipped(path, path.stat().st_size - 100),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "all but a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "seven bytes": lambda path: path.write_bytes(path.read_bytes()[:7]),
    "an empty file": lambda path: path.write_bytes(b""),
    "zeros, as after a power cut": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a text file": text_file,
    "a pickle of torch": pickle_file,
    "a pickle": plain_pickle,
    "tensors of somebody else": foreign_tensors,
}


def stopped_in_trial_1(study: Study, place: Path) -> Path:
    """A study whose process died in trial 1 with a checkpoint; returns its path."""

    def dies(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.number == 1:
            raise Died

    with pytest.raises(Died):
        complete(study, place, at=dies)
    path = place / "tiny.checkpoints" / "trial-1.safetensors"
    assert path.is_file()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_its_training_starts_again(
    damage: str, image_cache: Path, tmp_path: Path, undisturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small_study(image_cache, checkpoint_seconds=0.0)
    path = stopped_in_trial_1(study, tmp_path)
    DAMAGES[damage](path)
    started: list[Event] = []
    capsys.readouterr()
    assert complete(study, tmp_path, at=started.append) == undisturbed
    said = capsys.readouterr().err
    assert f"{path} is damaged (" in said
    assert said.endswith("it is ignored, and the training starts again.\n")
    assert len(said.splitlines()) == 1
    first = started[0]
    assert isinstance(first, TrialStarted)
    assert (first.number, first.resumed) == (1, True)
    assert not path.exists()


def test_any_flipped_or_missing_byte_of_a_file_of_tensors_is_noticed(tmp_path: Path) -> None:
    path, chance = tmp_path / "x.safetensors", random.Random(0)
    written = {
        "model/weight": torch.randn(3, 2),
        "random/cpu": torch.arange(5, dtype=torch.uint8),
        "step": torch.ones(()),
    }
    record = {"identity": {"seed": 1}, "epochs": [{"epoch": 1, "loss": 0.5}]}
    write_tensors(path, written, record)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=r"x\.safetensors is damaged"):
            read_tensors(path)
        path.write_bytes(content[:place])
        with pytest.raises(Damaged):
            read_tensors(path)
    path.write_bytes(content)
    tensors, found = read_tensors(path)
    assert found == record
    assert all(torch.equal(tensors[name], value) for name, value in written.items())


@pytest.mark.slow
def test_trained_weights_damaged_before_the_test_set_is_opened_are_trained_again(
    image_cache: Path, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small_study(image_cache)

    def damage_then_open(*arguments: Any) -> Any:
        flipped(next((tmp_path / "tiny.checkpoints").glob("final-*")), -100)
        return load_test(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("harness.final.test_set.load_test", damage_then_open)
        with pytest.raises(Halt, match="are missing or damaged; run the same command again"):
            complete(study, tmp_path)
    assert complete(study, tmp_path, look=lambda store: store.attributes()["final"]["test_openings"]) == 1
    assert complete(study, tmp_path) == undisturbed


def alter(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["identity"][key] = value

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        alter("study", "another study's uid"),
        alter("key", "trial-7"),
        alter("seed", 1),
        alter("configuration", {"epochs": "99"}),
    ],
    ids=["study", "trial", "seed", "configuration"],
)
def test_a_whole_checkpoint_of_another_training_is_refused(
    change: Callable[[dict[str, Any]], None],
    image_cache: Path,
    tmp_path: Path,
    undisturbed: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = small_study(image_cache, checkpoint_seconds=0.0)
    path = stopped_in_trial_1(study, tmp_path)
    tensors, record = read_tensors(path)
    change(record)
    write_tensors(path, tensors, record)
    capsys.readouterr()
    assert complete(study, tmp_path) == undisturbed
    assert capsys.readouterr().err == f"{path} belongs to another training; it is ignored.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attribute", "change", "words"),
    [
        ("final", {"per_seed": None}, "the study's 'final' has no valid per_seed; restore the storage from a"),
        ("final", {"base": {"trial": 0}}, "the study's 'final' has no valid base;"),
        ("final", {"interval": [0.1]}, "the study's 'final' has no valid interval;"),
        ("predictions", {"classes": ["rose"]}, "The study's 'predictions' are damaged (32 labels of 1 classes"),
        ("predictions", {"labels": "AAA"}, "The study's 'predictions' are damaged ("),
        ("predictions", {"seeds": None}, "The study's 'predictions' are damaged ("),
    ],
)
def test_an_attribute_of_another_shape_is_named(
    line: CommandLine, capsys: pytest.CaptureFixture[str], attribute: str, change: dict[str, Any], words: str
) -> None:
    assert line.run("--trials", "1").code == 0
    with read_store("tiny", f"sqlite:///{line.place}/studies/tiny.db") as store:
        store.set_attribute(attribute, store.attributes().get(attribute) | change)
    capsys.readouterr()
    assert main(["report", "tiny"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert one_sentence(err)
    code = main(["doctor", "tiny"])
    said = capsys.readouterr()
    if attribute == "final":  # most of what the doctor compares follows from it
        assert (code, words in said.err) == (2, True)
    else:
        assert (code, words in said.out) == (1, True)


@pytest.mark.slow
def test_a_study_in_another_format_is_left_alone_and_can_be_moved_aside(line: CommandLine) -> None:
    assert line.run("--trials", "1").code == 0
    with read_store("tiny", f"sqlite:///{line.place}/studies/tiny.db") as store:
        store.set_attribute("format", None)
    refused = line.run("--trials", "2")
    assert (refused.code, one_sentence(refused.err)) == (2, True)
    assert "start a new study with --fresh" in refused.err
    assert line.run("--trials", "1", "--fresh").code == 0
    assert len(list((line.place / "studies").glob("tiny.2*.db"))) == 1
