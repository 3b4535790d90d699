"""`python -m harness init`: from photographs to a study file that runs as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas
import pytest

import harness
from harness import new_study
from harness.base.errors import Halt, InputError
from harness.cli.commands import main
from harness.config.find import find
from harness.config.study import Study
from harness.garden.drawing import draw
from harness.garden.species import DEMO_SPECIES
from tests.refusal import tree

COUNTS = {"daisy": 24, "rose": 24, "tulip": 24}


def plant(folder: Path, counts: dict[str, int]) -> None:
    for species, (name, count) in zip(DEMO_SPECIES, counts.items(), strict=False):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            draw(species, seed=number, size=96).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planted") / "photos"
    plant(place, COUNTS)
    return place


@pytest.fixture
def photos(
    planted: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder of photographs in the working directory, and no weights to download."""
    shutil.copytree(planted, tmp_path / "my photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "my photos"


def test_a_folder_of_photographs_gets_a_study(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(photos)]) == 0
    said = capsys.readouterr().out
    assert "72 photographs of 3 classes" in said
    assert "python -m harness run --study my_photos" in said, "there is no run_study.py here"
    study: Study = find("my_photos").study
    assert study.train.data.root == "my photos"  # type: ignore[attr-defined]
    assert study.train.data.classes() == ("daisy", "rose", "tulip")
    assert study.train.data.image_size <= 128
    assert study.objective == "accuracy"
    images, size = len(study.train.data.samples("train")), study.train.batch_size
    assert size * -(-images // size) - images < -(-images // size)  # batches of almost one size


def test_without_weights_the_study_has_the_model_that_ships_its_own(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_study.importlib.util, "find_spec", lambda name: None)
    made = harness.init(photos, home=photos.parent, name="mine")
    assert any("cannot be downloaded; the study has TinyMaxViT" in each for each in made.findings)
    study = find(str(made.file)).study
    study.train.backbone.check(study.train.data.image_size)


def test_classes_of_different_sizes_count_alike(photos: Path) -> None:
    for number in range(7, 24):
        (photos / "rose" / f"{number}.png").unlink()
    made = harness.init(photos, home=photos.parent)
    study = find(str(made.file)).study
    assert study.objective == "balanced_accuracy"
    assert "class_weight" in study.space
    assert any("A class has 7 to 24 photographs; as they differ much" in each for each in made.findings)


@pytest.mark.parametrize("name", ["labels.csv", "metadata.jsonl"])
def test_a_table_gets_a_study(photos: Path, name: str) -> None:
    rows = [
        {"file_name": f"{label}/{number}.png", "label": label, "split": ("train", "val", "test")[number % 3]}
        for label, count in COUNTS.items()
        for number in range(count)
    ]
    frame = pandas.DataFrame(rows)
    frame.to_csv(photos / name, index=False) if name.endswith("csv") else frame.to_json(
        photos / name, orient="records", lines=True
    )
    for path in (photos / name, photos):
        made = harness.init(path, home=photos.parent, name=f"from_{path.suffix[1:] or 'folder'}")
        assert made.findings[0].endswith("24 for training, 24 for validation, 24 for testing.")
        assert type(find(str(made.file)).study.train.data).__name__ == "ImageTable"


def test_a_table_in_the_folder_of_each_split_gets_a_study(photos: Path) -> None:
    for split in ("train", "validation", "test"):
        copied = shutil.copytree(photos, photos.parent / "split" / split)
        lines = [f"{each.relative_to(copied)},{each.parent.name}" for each in sorted(copied.rglob("*.png"))]
        (copied / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    made = harness.init(photos.parent / "split", home=photos.parent)
    assert made.findings[0].endswith("72 for training, 72 for validation, 72 for testing.")
    assert type(find(str(made.file)).study.train.data).__name__ == "ImageTable"


def test_a_table_may_lie_where_the_study_is_written(photos: Path) -> None:
    lines = [f"{each.relative_to(photos.parent)},{each.parent.name}" for each in sorted(photos.rglob("*.png"))]
    (photos.parent / "labels.csv").write_text("\n".join(["path,label", *lines]))
    assert harness.init(photos.parent / "labels.csv", home=photos.parent).file.is_file()


@pytest.mark.parametrize("inside", [".", "rose"])
def test_init_inside_of_the_photographs_is_refused(photos: Path, inside: str) -> None:
    before = tree(photos)
    with pytest.raises(InputError, match=r"Run init outside of the photographs, for example in .*: studies/ would lie"):
        harness.init(photos, home=photos / inside)
    assert tree(photos) == before


def test_copies_across_splits_are_named(photos: Path) -> None:
    for split in ("train", "valid", "test"):
        shutil.copytree(photos / "rose", photos.parent / "split" / split / "rose")
        shutil.copytree(photos / "daisy", photos.parent / "split" / split / "daisy")
    made = harness.init(photos.parent / "split", home=photos.parent)
    assert any("96 are in two splits, such as " in each for each in made.findings)


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("nowhere", {}, "There is no nowhere; give a folder of photographs"),
        ("my photos/daisy", {}, "holds no class folders; give the folder that does\\."),
        ("my photos/daisy/0.png", {}, "is no table"),
        ("my photos", {"model": "resnet5"}, "no model 'resnet5'; nearest: .*resnet50"),
        ("my photos", {"model": "zzz"}, "no model 'zzz'; find one with `python -m harness models PATTERN`"),
        ("my photos", {"model": "resnet18"}, "weights are missing and cannot be downloaded.*choose another --model"),
        ("my photos", {"name": "a b"}, "a study's name has letters, digits"),
        ("my photos", {"name": "-ab"}, "a study's name has letters, digits, - and _ only, and no - first"),
        ("tables", {}, "has no column 'path', but id, title; .*; or move the table away, so that its folders are"),
        ("outer", {}, r"holds one folder, 'my photos', .*; give .*my photos\.$"),
        ("my photos", {"name": "there"}, "there.py exists; give another --name"),
        ("broken", {}, r"2 of 72 photographs cannot be read; the first: .*0\.png"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    photos: Path, path: str, options: dict[str, str], words: str
) -> None:
    (photos.parent / "studies").mkdir()
    (photos.parent / "studies" / "there.py").touch()
    if path == "broken":
        shutil.copytree(photos, photos.parent / "broken")
        (photos.parent / "broken" / "rose" / "0.png").write_bytes(b"")
        (photos.parent / "broken" / "rose" / "1.png").write_bytes(b"text")
    if path in ("tables", "outer"):
        shutil.copytree(photos, photos.parent / path / ("" if path == "tables" else "my photos"))
    if path == "tables":
        (photos.parent / "tables" / "metadata.csv").write_text("id,title\n1,roses\n")
    before = tree(photos.parent)
    with pytest.raises(InputError, match=words):
        harness.init(path, home=photos.parent, **options)  # type: ignore[arg-type]
    assert tree(photos.parent) == before


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_what_was_written_runs_as_it_is(photos: Path) -> None:
    assert main(["init", str(photos)]) == 0
    short = ["--trials", "1", "--set", "epochs=1", "--set", "final.seeds=1", "--set", "optim.warmup_epochs=0"]
    assert main(["run", "--study", "my_photos", *short]) == 0
    result = harness.open("my_photos")
    assert result.final is not None


def test_a_cache_among_the_photographs_is_no_class(photos: Path) -> None:
    photos.rename(photos.parent / "data")
    (photos.parent / "data" / "cache").mkdir()
    (photos.parent / "data" / "cache" / "0123.hashes").touch()
    made = harness.init("data", home=photos.parent)
    assert find(str(made.file)).study.train.data.classes() == ("daisy", "rose", "tulip")


def test_a_table_without_enough_rows_for_a_validation_split_is_refused(photos: Path) -> None:
    lines = ["path,label,group", *(f"{label}/{number}.png,{label},same" for label in COUNTS for number in range(2))]
    (photos / "labels.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    before = tree(photos.parent)
    with pytest.raises(InputError, match=r"None of the 6 rows of labels.csv is in the \w+ split; add some, or name"):
        harness.init(photos / "labels.csv", home=photos.parent)
    assert tree(photos.parent) == before


def test_a_full_disk_leaves_no_study(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Halt, match="make room"):
        harness.init(photos, home=photos.parent)
    assert not list((photos.parent / "studies").glob("*.py"))
