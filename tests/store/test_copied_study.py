"""A copied study file whose name was not changed is refused; one that was moved or renamed goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.base.errors import InputError
from harness.cli.commands import main
from harness.config import find as catalogue
from harness.store.opening import open_store, url_of
from tests.analytic import run_analytic
from tests.refusal import assert_refused


def begun(study: str, remembered: bool = True) -> None:
    """A trial of a study, as the command begins it."""
    found = catalogue.find(study)
    with open_store(found.study, url_of(found, None)) as store:
        if remembered:
            store.set_attribute("file", found.file.name)
        run_analytic(found.study, store, 1)


def copy(workspace: Path, name: str, of: str = "demo", old: str = "", new: str = "") -> Path:
    text = (workspace / "studies" / f"{of}.py").read_text(encoding="utf-8")
    file = workspace / "studies" / f"{name}.py"
    file.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    return file


COMMANDS = (
    ["show", "mine"],
    ["doctor", "mine", "--fix"],
    ["run", "--study", "studies/mine.py", "--fresh"],
    ["run", "--study", "mine", "--set", "epochs=5"],
)


@pytest.mark.slow
@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "not run by a command"])
def test_a_copy_is_told_to_change_its_name(
    remembered: bool, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun("demo", remembered)
    copy(workspace, "mine", old="epochs=6", new="epochs=9")
    words = ["mine.py defines the study 'demo'", "studies/demo.py", "demo.db", "change `name` in mine.py"]
    for command in COMMANDS:
        assert_refused(workspace, capsys, command, words)
    assert main(COMMANDS[-1]) == 2
    assert "--fresh" not in capsys.readouterr().err
    assert main(["show", "demo"]) == 0


@pytest.mark.slow
def test_of_two_files_neither_of_which_is_named_so_the_first_to_run_has_the_study(workspace: Path) -> None:
    for name in ("one", "other"):
        copy(workspace, name, old='"demo"', new='"shared"')
    begun("one")
    assert url_of(catalogue.find("one"), None).endswith("shared.db")
    with pytest.raises(InputError, match=r"change `name` in other\.py"):
        url_of(catalogue.find("other"), None)
    (workspace / "studies" / "one.py").write_text("STUDY = None\n")  # no study any more
    assert url_of(catalogue.find("other"), None).endswith("shared.db")


def test_the_last_owner_keeps_the_study_when_its_old_name_comes_again(workspace: Path) -> None:
    begun("demo")
    studies = workspace / "studies"
    (studies / "demo.py").rename(studies / "flowers.py")
    begun("flowers")
    copy(workspace, "demo", of="flowers")
    assert url_of(catalogue.find("flowers"), None).endswith("demo.db")
    with pytest.raises(InputError, match=r"change `name` in demo.py"):
        url_of(catalogue.find("demo"), None)


def test_a_renamed_or_moved_study_goes_on(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun("demo")
    studies = workspace / "studies"
    (studies / "demo.py").rename(studies / "flowers.py")
    assert url_of(catalogue.find("flowers"), None) == f"sqlite:///{studies}/demo.db"
    shutil.copytree(studies, tmp_path / "elsewhere" / "studies")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert url_of(catalogue.find("flowers"), None) == f"sqlite:///{tmp_path}/elsewhere/studies/demo.db"


def test_a_link_to_the_study_file_is_no_copy(workspace: Path) -> None:
    begun("demo")
    (workspace / "studies" / "alias.py").symlink_to("demo.py")
    assert url_of(catalogue.find("alias"), None).endswith("demo.db")


def test_a_copy_with_a_storage_of_its_own_is_left_alone(workspace: Path) -> None:
    begun("demo")
    copy(workspace, "mine")
    url = f"sqlite:///{workspace}/mine.db"
    assert url_of(catalogue.find("mine"), url) == url


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_file_that_holds_another_study_is_refused(
    fresh: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints and its model lie beside it, and --fresh would rename it."""
    begun("demo", remembered=False)
    copy(workspace, "mine", old='"demo"', new='"mine"')
    shared = f"sqlite:///{workspace}/studies/demo.db"
    words = ["demo.db holds the study 'demo'", "give 'mine' a file of its own with --storage"]
    assert_refused(workspace, capsys, ["run", "--study", "mine", "--storage", shared, *fresh], words)


def test_a_linked_folder_of_studies_is_one_place(workspace: Path) -> None:
    (workspace / "elsewhere").mkdir()
    (workspace / "studies").rename(workspace / "elsewhere" / "studies")
    (workspace / "studies").symlink_to(workspace / "elsewhere" / "studies")
    by_name, by_path = catalogue.find("demo"), catalogue.find("studies/demo.py")
    assert (by_name.file, by_name.home, by_name.storage_url) == (by_path.file, by_path.home, by_path.storage_url)


def test_the_command_that_is_printed_fits_the_folder(workspace: Path) -> None:
    assert catalogue.run_command("demo") == "python -m harness run --study demo"
    (workspace / "run_study.py").touch()
    assert catalogue.run_command("my study.py") == "python run_study.py --study 'my study.py'"
