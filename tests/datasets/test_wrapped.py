"""torch Datasets as data of a study."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import harness
from harness.base.errors import InputError
from harness.config.contracts import Preprocessing
from harness.data.decoding import open_image
from harness.data.splits import load_split
from harness.datasets.wrapped import Wrapped
from tests.conftest import make_study
from tests.small import SmallNet


def odd(number: int) -> int:
    return number % 2


class Colours(Dataset[Any]):
    """Images of one colour; `made` turns pixels [8, 8, 3] into what it gives."""

    def __init__(self, first: int, count: int = 8, made: Any = Image.fromarray, label: Any = odd) -> None:
        self.first, self.count, self.made, self.label = first, count, made, label

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index >= self.count:
            raise IndexError(index)
        pixels = np.full((8, 8, 3), self.first + index, np.uint8)
        return self.made(pixels), self.label(index)


def tensor(pixels: Any) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def wrapped(cache: Path, **changes: Any) -> Wrapped:
    parts = {"train": Colours(0), "val": Colours(50), "test": Colours(100)} | changes
    return Wrapped(**parts, image_size=48, stored_size=54, cache=str(cache))


@pytest.mark.parametrize(
    "made", [Image.fromarray, tensor, lambda pixels: tensor(pixels)[:1], lambda p: Image.fromarray(p[..., 0])]
)
def test_pil_images_and_uint8_tensors_give_the_same_pixels(tmp_path: Path, made: Any) -> None:
    data = wrapped(tmp_path, train=Colours(0, made=made))
    assert data.classes() == ("0", "1")
    images = load_split(data, Preprocessing(), "train")
    assert images.images[:, 0, 0, 0].tolist() == list(range(8))
    assert images.labels.tolist() == [0, 1] * 4


def test_names_come_from_the_dataset_or_the_user(tmp_path: Path) -> None:
    named = Colours(0)
    named.classes = ["daisy", "rose"]  # type: ignore[attr-defined]
    assert wrapped(tmp_path, train=named).classes() == ("daisy", "rose")
    assert dataclasses.replace(wrapped(tmp_path), names=("a", "b")).classes() == ("a", "b")


def test_it_survives_copies_and_pickling(tmp_path: Path) -> None:
    data = wrapped(tmp_path)
    copied = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert copied == data
    assert [label for _, label in copied.samples("val")] == [0, 1] * 4


def test_transparent_and_deep_images_are_as_files_of_them_are(tmp_path: Path) -> None:
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    images = {}
    for name, image in (("deep", deep), ("clear", clear)):
        data = wrapped(tmp_path, train=Colours(0, made=lambda pixels, image=image: image.copy()))
        images[name] = data.open(data.samples("train")[0][0])
        image.save(file := tmp_path / f"{name}.png")
        assert images[name].tobytes() == open_image(file).tobytes()
    assert images["clear"].getpixel((0, 0)) == (255, 255, 255)
    assert len(set(images["deep"].getdata())) > 32


def test_an_image_is_turned_by_its_orientation_as_predict_turns_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(4, 8, 3)).save(file := tmp_path / "a.png", exif=exif)
    for opened in (Image.open, lambda file: Image.open(file).convert("RGB")):
        data = wrapped(tmp_path, train=Colours(0, made=lambda pixels, opened=opened: opened(file)))
        image = data.open(data.samples("train")[0][0])
        assert (image.size, image.tobytes()) == ((4, 8), open_image(file).tobytes())


def test_other_classes_of_the_validation_images_are_refused(tmp_path: Path) -> None:
    train, val = Colours(0), Colours(50)
    train.classes, val.classes = ["cat", "dog"], ["dog", "cat"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="of Colours-8-val are dog, cat, and those of Colours-8-train cat, dog"):
        wrapped(tmp_path, train=train, val=val).samples("val")
    assert wrapped(tmp_path, train=train, val=val, names=("a", "b")).samples("val")


@pytest.mark.parametrize(("first", "words"), [(1, "begin at 1; number"), (1_700_000_000, "has the label 17")])
def test_labels_that_do_not_begin_at_0_need_names(tmp_path: Path, first: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        wrapped(tmp_path, train=Colours(0, label=lambda number: first + number % 2)).classes()


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(file := tmp_path / "cut.png")
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match=r"image 0 of Colours-8-train cannot be read \(OSError"):
        wrapped(tmp_path, train=Colours(0, made=lambda pixels: Image.open(file))).samples("train")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Colours(0, label=lambda n: float("inf")), "is inf; give a class number from 0"),
        (iter([1]), "needs map-style datasets"),
        (Colours, "needs map-style datasets"),
        (
            Colours(0, made=lambda pixels: Image.fromarray(np.array([[0, 9], [9, 0]], np.int32))),
            r"image 0 of Colours-8-train is almost black",
        ),
        (Colours(0, count=0), "is empty"),
        (Colours(0, made=lambda pixels: tensor(pixels).float()), r"is Tensor float32 \(3, 8, 8\); give PIL images"),
        (Colours(0, made=lambda pixels: "x"), "is str"),
        (Colours(0, made=lambda pixels: 1 / 0), "image 0 of Colours-8-train cannot be read .ZeroDivisionError"),
        ([{"image": 1}], "is dict; give pairs"),
        (Colours(0, label=lambda n: "rose"), "The label of image 0 of .* is 'rose'; give a class number"),
        (Colours(0, label=lambda n: -1), "is -1; give a class number from 0"),
        (Colours(0, label=lambda n: 0.5), r"is 0\.5; give a class number"),
        (
            Colours(0, made=lambda pixels: Image.fromarray(pixels + np.random.randint(0, 99, dtype=np.uint8))),
            "differs between two reads; remove the dataset's random transforms",
        ),
    ],
)
def test_what_is_no_image_with_a_label_is_refused(tmp_path: Path, dataset: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        wrapped(tmp_path, train=dataset).samples("train")


def test_names_may_be_a_list_and_classes_anything(tmp_path: Path) -> None:
    assert wrapped(tmp_path, names=["daisy", "rose"]).classes() == ("daisy", "rose")
    dataset = Colours(0)
    for classes in (lambda: ["daisy", "rose"], 2, None, {"rose": 1, "daisy": 0}):
        dataset.classes = classes  # type: ignore[attr-defined]
        assert wrapped(tmp_path, train=dataset).classes() == ("0", "1")
    with pytest.raises(InputError, match="has one class, '0'; a classifier needs at least two"):
        wrapped(tmp_path, train=Colours(0, label=lambda number: 0)).classes()


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    data = dataclasses.replace(wrapped(tmp_path, train=Colours(0, label=lambda n: n % 3)), names=("daisy", "rose"))
    with pytest.raises(InputError, match="is 2, but there are 2 classes"):
        data.samples("train")


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_program_runs_a_study_on_datasets_and_a_module(tmp_path: Path) -> None:
    study = make_study(tmp_path / "cache")
    train = dataclasses.replace(study.train, data=wrapped(tmp_path / "cache"), backbone=SmallNet(), batch_size=4)
    study = dataclasses.replace(study, train=train, trials=2)
    result = harness.run(study, home=tmp_path, progress=False)
    assert result.final is not None
    assert result.final.total == 8 * len(result.final.per_seed)
    other = dataclasses.replace(train, data=wrapped(tmp_path / "cache", train=Colours(7)))
    with pytest.raises(InputError, match="the images differ from those at the start"):
        harness.run(dataclasses.replace(study, train=other), trials=3, home=tmp_path, progress=False)
