"""`predict`: the saved model answers for photographs as it did for the test images, whatever the files are like."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.base.errors import InputError
from harness.base.packing import unpack
from harness.cli.commands import main
from harness.config.find import find
from harness.serving.export import weights_of
from harness.serving.model import preprocess
from harness.serving.predict import BATCH, Guess, Predictor, find_images, load_predictor, shown
from harness.store.opening import read_store
from tests.faulty import complete
from tests.refusal import assert_refused
from tests.small import study_in


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Path:
    """A folder with a finished study, and its test images as files in `pictures`, named by their number."""
    home = tmp_path_factory.mktemp("home")
    study, _ = study_in(home, image_cache)
    complete(study, home / "studies")
    (home / "pictures").mkdir()
    (home / "table.csv").write_text("a photograph by its content only")
    (home / "notes.txt").write_text("kept")
    data = study.train.data
    for number, (item, _) in enumerate(data.samples("test")):
        data.open(item).save(home / "pictures" / f"{number:03}.png")
    return home


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.fixture(scope="module")
def predictor(home: Path) -> Predictor:
    return load_predictor(find(str(home / "studies" / "tiny.py")), None, "cpu")


@pytest.fixture
def flower(home: Path) -> Image.Image:
    return Image.open(home / "pictures" / "000.png").convert("RGB")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- what it says --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_test_images_get_the_predictions_that_are_recorded(at_home: Path, tmp_path: Path) -> None:
    assert main(["predict", "tiny", "pictures", "--csv", str(tmp_path / "table.csv"), "--top", "1"]) == 0
    with read_store("tiny", "sqlite:///studies/tiny.db") as store:
        recorded: dict[str, Any] = store.attributes()["predictions"]["seeds"][0]
    rows = table(tmp_path / "table.csv")
    classes = load_predictor(find("tiny"), None, "cpu").saved.classes
    assert [row["class"] for row in rows] == [classes[label] for label in unpack(recorded["predicted"], "uint16")]
    confidence = unpack(recorded["calibrated"], "float32")
    assert [float(row["probability"]) for row in rows] == pytest.approx(confidence.tolist(), abs=1e-4)


def test_predictions_are_calibrated_on_images_that_were_not_trained_on(home: Path, predictor: Predictor) -> None:
    """The final run trains on the validation images, so the temperature is the trial's."""
    saved = predictor.saved
    with read_store("tiny", f"sqlite:///{home}/studies/tiny.db") as store:
        chosen, final = store.chosen(), store.facts().final
        assert chosen is not None
        assert final is not None
        val = chosen.epochs[-1].val
        seeds = store.attributes()["predictions"]["seeds"]
    assert final.fit_on == "train+val"
    assert val is not None
    assert saved.description["temperature"] == val.temperature == seeds[0]["temperature"] != 1
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(saved.model(images), saved.trained(images) / val.temperature)
    assert weights_of(saved) == saved.description["weights"]["sha256"]


@pytest.mark.slow
def test_probabilities_are_those_of_all_classes_in_falling_order(predictor: Predictor, flower: Image.Image) -> None:
    image = preprocess([flower], predictor.saved.config)
    guesses = predictor.guesses(image, 16)[0]
    values = [guess.probability for guess in guesses]
    assert {guess.name for guess in guesses} == set(predictor.saved.classes)
    assert sum(values) == pytest.approx(1, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert predictor.guesses(image, 3)[0] == guesses[:3]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), colour=st.tuples(*[st.integers(0, 255)] * 3))
def test_an_image_of_any_size_is_answered(
    predictor: Predictor,
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    height: int,
    colour: tuple[int, int, int],
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.png"
    Image.new("RGB", (width, height), colour).save(file)
    image = predictor.photograph(file)
    assert image.shape == (3, 64, 64)
    # One colour is one colour at any size.
    assert torch.equal(image, preprocess([Image.new("RGB", (64, 64), colour)], predictor.saved.config)[0])


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": lambda image: image.convert("L"),
    "black and white": lambda image: image.convert("1"),
    "a palette": lambda image: image.convert("P"),
    "transparent": lambda image: image.convert("RGBA"),
    "sixteen bits": lambda image: Image.new("I;16", image.size, 40_000),
    "four inks": lambda image: image.convert("CMYK"),
}


@pytest.mark.parametrize("change", MODES.values(), ids=MODES.keys())
def test_an_image_of_any_mode_is_answered(
    predictor: Predictor, flower: Image.Image, tmp_path: Path, change: Callable[[Image.Image], Image.Image]
) -> None:
    change(flower).save(tmp_path / "image.tif")
    [(_, answer)] = predictor.answers([tmp_path / "image.tif"], 5)
    assert isinstance(answer, list)
    assert len(answer) == 5


def test_a_photograph_is_turned_upright_first(predictor: Predictor, flower: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    flower.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    flower.save(tmp_path / "upright.png")
    turned, upright = (predictor.photograph(tmp_path / f"{name}.png") for name in ("turned", "upright"))
    assert torch.equal(turned, upright)


def test_more_files_than_a_batch_come_in_their_order(predictor: Predictor, home: Path) -> None:
    files = (find_images([home / "pictures"])[0] * 3)[: 2 * BATCH + 1]
    together = list(predictor.answers(files, 16))
    assert [file for file, _ in together] == files
    for file, answer in together[:: BATCH // 2]:
        [(_, alone)] = predictor.answers([file], 16)
        assert isinstance(answer, list)
        assert isinstance(alone, list)
        values = {guess.name: guess.probability for guess in alone}
        assert {guess.name: guess.probability for guess in answer} == pytest.approx(values, abs=1e-6)
    assert list(predictor.answers([], 5)) == []


# -- how it says it ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_image_has_a_block_of_lines(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["pictures/000.png", "pictures/001.png"]
    assert main(["predict", "tiny", *files, "--top", "2"]) == 0
    out, err = capsys.readouterr()
    predictor = load_predictor(find("tiny"), None, "cpu")
    blocks = []
    for file in files:
        [(_, answer)] = predictor.answers([Path(file)], 2)
        assert isinstance(answer, list)
        assert isinstance(answer[0], Guess)
        blocks.append("\n".join([file, *(f"  {each.probability * 100:6.2f} %  {each.name}" for each in answer)]))
    assert out == "\n\n".join(blocks) + "\n"
    assert err == ""


def test_five_classes_are_shown_unless_told_otherwise(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "tiny", "pictures/000.png"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_the_table_has_a_line_for_every_rank(at_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.csv").write_text("an older one")
    assert main(["predict", "tiny", "pictures", "--csv", str(tmp_path / "table.csv"), "--top", "3"]) == 0
    rows = table(tmp_path / "table.csv")
    assert list(rows[0]) == ["file", "rank", "class", "probability"]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 32
    assert [row["file"] for row in rows[::3]] == [f"pictures/{number:03}.png" for number in range(32)]
    assert capsys.readouterr() == (f"{tmp_path}/table.csv\n", "")


def test_the_table_goes_to_stdout(at_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "tiny", "pictures", "--csv", str(tmp_path / "table.csv")]) == 0
    capsys.readouterr()
    assert main(["predict", "tiny", "pictures", "--csv", "-"]) == 0
    assert capsys.readouterr() == ((tmp_path / "table.csv").read_bytes().decode(), "")
    assert not (at_home / "-").exists()


def test_a_damaged_file_is_named_and_skipped(
    at_home: Path, tmp_path: Path, flower: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    flower.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "c.jpg").write_text("no image")
    flower.save(tmp_path / "d.png")
    Image.new("RGB", (1, 30_000)).save(tmp_path / "narrow.png")  # 64 x 1,920,000 pixels on its way to 64 x 64
    assert main(["predict", "tiny", str(tmp_path), "--top", "1"]) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if str(tmp_path) in line] == [f"{tmp_path}/a.png", f"{tmp_path}/d.png"]
    lines = err.splitlines()
    assert [Path(line.split()[0]).name for line in lines[:3]] == ["b.png", "c.jpg", "narrow.png"]
    assert all(line.endswith("Skipping it.") for line in lines[:3])
    assert lines[3:] == ["3 of 5 files could not be read."]


def test_what_a_folder_holds_besides_images_is_named_and_counted(
    at_home: Path, tmp_path: Path, flower: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpe", "a.jfif", "a.avif", "a.tga", "a.pgm", "a.mpo", "a.bmp"):
        flower.save(tmp_path / name)
    for name in ("notes.txt", "clip.mov", "Thumbs.db", "desktop.ini", ".DS_Store", "__MACOSX/._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("something else")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert main(["predict", "tiny", str(tmp_path), "--top", "1"]) == 1
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.startswith(str(tmp_path))]) == 7
    assert err.splitlines() == [
        f"{tmp_path}/clip.mov is not an image by its name. Skipping it.",
        f"{tmp_path}/notes.txt is not an image by its name. Skipping it.",
        f"{tmp_path}/pipe.jpg is not a regular file. Skipping it.",
        "Skipped: 3 of 10 files.",
    ]
    for name in ("notes.txt", "clip.mov", "pipe.jpg"):
        (tmp_path / name).unlink()
    assert main(["predict", "tiny", str(tmp_path), "--top", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_no_damage_costs_another_file_its_answer(
    at_home: Path, tmp_path: Path, flower: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the decoders of these formats raise."""
    for name in ("a.avif", "b.gif", "c.tif", "d.tga", "e.webp", "f.pgm", "g.jpg"):
        flower.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for part in (1, 2, 3):
            (tmp_path / f"{part}{name}").write_bytes(whole[: len(whole) * part // 4])
    (tmp_path / "rose.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert main(["predict", "tiny", str(tmp_path), "--top", "1"]) == 1
    out, err = capsys.readouterr()
    answered = [Path(line).name for line in out.splitlines() if line.startswith(str(tmp_path))]
    assert {"a.avif", "b.gif", "c.tif", "d.tga", "e.webp", "f.pgm", "g.jpg"} <= set(answered)
    lines = err.splitlines()
    assert lines[-1] == f"{29 - len(answered)} of 29 files could not be read."
    assert all(line.endswith("Skipping it.") for line in lines[:-1])
    assert any("rose.jpg cannot be read as an image: it is PostScript" in line for line in lines)


ENCODINGS = ["ascii", "latin-1", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_output_in_another_encoding_than_utf_8_is_escaped(
    at_home: Path, tmp_path: Path, flower: Image.Image, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    predictor = load_predictor(find("tiny"), None, "cpu")
    predictor.saved.description["classes"] = [f"öl 花 {number}" for number in range(16)]
    monkeypatch.setattr("harness.serving.predict.load_predictor", lambda *arguments: predictor)
    flower.save(tmp_path / "花é.png")
    expected = ["花é.png", "öl 花 "]
    for arguments, written_as in (([], encoding), (["--csv", "-"], "utf-8")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["predict", "tiny", str(tmp_path / "花é.png"), "--top", "1", *arguments]) == 0
        stdout.flush()
        said = stdout.buffer.getvalue()
        assert all(word.encode(written_as, "backslashreplace") in said for word in expected)


def test_json_stays_json_in_another_encoding_than_utf_8(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["show", "tiny", "--json", "--tracking-uri", "http://öl.example"]) == 0
    stdout.flush()
    assert json.loads(stdout.buffer.getvalue())["tracking"] == "http://öl.example"


def test_a_name_that_would_steer_the_terminal_is_shown_escaped() -> None:
    assert shown("rosé.jpg") == "rosé.jpg"
    assert shown("a\x1b[2Jb.jpg") == "a\\x1b[2Jb.jpg"
    assert shown(os.fsdecode(b"\xff.jpg")) == "\\udcff.jpg"


def test_a_name_that_is_no_utf_8_is_printed_and_written(
    at_home: Path, tmp_path: Path, flower: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        with open(name, "wb") as file:
            flower.save(file, "png")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert main(["predict", "tiny", os.fsdecode(name)]) == 0
    assert "\\udcff.png" in capsys.readouterr().out
    assert main(["predict", "tiny", os.fsdecode(name), "--csv", str(tmp_path / "table.csv")]) == 0
    assert name in (tmp_path / "table.csv").read_bytes()


# -- which files ---------------------------------------------------------------------------------------------------


def test_folders_are_walked_for_images(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/c/1.webp", "a.png", "notes.txt", ".hidden.png", ".thumbnails/x.png", "b/1.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    found, left_out = find_images([tmp_path])
    names = [str(each.relative_to(tmp_path)) for each in found]
    assert names == ["a.png", "gone.png", "b/1.tiff", "b/2.JPG", "b/c/1.webp"]
    assert left_out == [tmp_path / "notes.txt", tmp_path / "b" / "pipe.png"]
    assert find_images([tmp_path / "notes.txt"]) == ([tmp_path / "notes.txt"], [])  # who names a file means it


def test_linked_folders_are_walked_once(tmp_path: Path) -> None:
    for name in ("elsewhere/rose.jpg", "photos/daisy.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    found, left_out = find_images([tmp_path / "photos"])
    assert [str(each.relative_to(tmp_path)) for each in found] == ["photos/daisy.jpg", "photos/linked/rose.jpg"]
    assert left_out == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        find_images([tmp_path])


# -- what is refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no image": (["tiny"], ["required: IMAGE|DIR"]),
    "an unknown study": (["rose", "pictures"], ["There is no study 'rose'"]),
    "a path that is not there": (["tiny", "pictures", "none.png"], ["no file or folder none.png", "give photographs"]),
    "a path that is empty": (["tiny", ""], ["it is empty"]),
    "a folder without images": (["tiny", "studies"], ["studies holds no images", ".jpeg"]),
    "no class": (["tiny", "pictures", "--top", "0"], ["argument --top", "at least 1"]),
    "too many classes": (["tiny", "pictures", "--top", "17"], ["--top 17", "knows 16 classes"]),
    "a table in no folder": (["tiny", "pictures", "--csv", "no/such.csv"], ["there is no folder no"]),
    "a table that is a folder": (["tiny", "pictures", "--csv", "pictures"], ["--csv pictures", "give a file name"]),
    "a table in a photograph's place": (["tiny", "pictures", "--csv", "pictures/000.png"], ["--csv pictures/000.png"]),
    "a table in the database's place": (["tiny", "pictures", "--csv", "studies/tiny.db"], ["the study's own files"]),
    "a table in the study's place": (["tiny", "pictures", "--csv", "studies/tiny.py"], ["the study's own files"]),
    "a table beside the database": (["tiny", "pictures", "--csv", "studies/tiny.db-wal"], ["the study's own files"]),
    "a table in the model's folder": (
        ["tiny", "pictures", "--csv", "studies/tiny.model/table.csv"],
        ["--csv studies/tiny.model/table.csv", "the study's own files", "give another file"],
    ),
    "a table in an input's place": (["tiny", "table.csv", "--csv", "./table.csv"], ["or the input"]),
    "a table in a text's place": (["tiny", "pictures", "--csv", "notes.txt"], ["not a *.csv", "that ends in .csv"]),
    "a table that is a device": (["tiny", "pictures", "--csv", "/dev/null"], ["--csv /dev/null", "not a file"]),
    "an unknown device": (["tiny", "pictures", "--device", "abacus"], ["--device abacus"]),
    "an empty storage": (["tiny", "pictures", "--storage", "sqlite:///none.db"], ["none.db does not exist"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_input_is_refused(
    arguments: list[str], words: list[str], at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(at_home, capsys, ["predict", *arguments], words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_table_where_nothing_can_be_written_is_refused(
    at_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    words = ["is not writable", "give another folder"]
    assert_refused(at_home, capsys, ["predict", "tiny", "pictures", "--csv", f"{tmp_path}/closed/table.csv"], words)


def test_a_study_without_a_model_is_refused(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = at_home / "studies" / "tiny.model"
    model.rename(model.with_name("aside"))
    try:
        words = ["tiny.model holds no model, though the final run of study 'tiny' has ended", "run the study again"]
        assert_refused(at_home, capsys, ["predict", "tiny", "pictures"], words)
    finally:
        model.with_name("aside").rename(model)


def test_an_image_of_a_line_of_pixels_does_not_fill_the_memory(predictor: Predictor, tmp_path: Path) -> None:
    Image.new("RGB", (50_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match="too narrow"):
        predictor.photograph(tmp_path / "line.png")


def test_a_device_without_room_is_one_sentence(
    at_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError("out of memory with one image at a time")

    monkeypatch.setattr("harness.serving.predict.outputs_of", full)
    assert main(["predict", "tiny", "pictures/000.png"]) == 2
    assert capsys.readouterr().err == (
        "error: The device has no room for one image; free its memory, or give --device cpu.\n"
    )


def test_a_model_whose_study_is_not_deterministic_predicts_likewise(predictor: Predictor) -> None:
    runtime = dataclasses.replace(predictor.saved.config.runtime, deterministic=False)
    config = dataclasses.replace(predictor.saved.config, runtime=runtime)
    saved = dataclasses.replace(predictor.saved, config=config)
    assert not Predictor(saved, torch.device("cpu"))._runtime.deterministic


def test_an_image_in_memory_whose_exif_cannot_be_read_is_not_turned(
    flower: Image.Image, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flower.save(tmp_path / "bad.png", exif=b"Exif\0\0no header of a TIFF")
    with Image.open(tmp_path / "bad.png") as image:
        found = predictor.photograph(image)
    assert torch.equal(found, predictor.photograph(tmp_path / "bad.png"))
    assert "The image was read with a warning: its EXIF cannot be read" in capsys.readouterr().err
