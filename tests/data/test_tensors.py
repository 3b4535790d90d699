"""From a data set to tensors: sizes, limits, fingerprints, and the wall around the test split."""

from __future__ import annotations

import ast
import dataclasses
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.data.augment import IMAGENET
from harness.data.splits import Reader, Splits, fits, load_splits, load_test, load_train_and_val, prepare
from harness.datasets.image_folder import ImageFolder
from harness.garden.dataset import Garden
from tests.conftest import PROJECT


@pytest.fixture
def garden(image_cache: Path) -> Garden:
    return Garden(train_per_class=2, val_per_class=2, test_per_class=3, cache=str(image_cache))


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Two classes, two images a split, 20 pixels wide."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("daisy", "rose"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(2):
                image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
                image.save(tmp_path / "photos" / split / name / f"{number}.png")
    return ImageFolder(root=str(tmp_path / "photos"), image_size=8, stored_size=10, cache=str(tmp_path / "cache"))


def test_a_programs_next_study_sees_the_photographs_as_they_are_now(folder: ImageFolder) -> None:
    prepare(folder, IMAGENET)
    before = [load_splits(folder, IMAGENET).val.images, load_train_and_val(folder, IMAGENET).images]
    Image.new("RGB", (20, 20), "white").save(Path(folder.root) / "val" / "rose" / "1.png")
    prepare(folder, IMAGENET)
    after = [load_splits(folder, IMAGENET).val.images, load_train_and_val(folder, IMAGENET).images]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:-1], new[:-1])
        assert (new[-1] == 255).all()
        assert not torch.equal(old[-1], new[-1])


def test_train_has_the_stored_size_and_val_the_models_size_in_uint8(garden: Garden) -> None:
    splits = load_splits(garden, IMAGENET)
    assert splits.classes == garden.classes()
    assert splits.train.images.shape == (32, 72, 72, 3)
    assert splits.val.images.shape == (32, 64, 64, 3)
    for part in (splits.train, splits.val):
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert Counter(part.labels.tolist()) == dict.fromkeys(range(16), 2)


def test_the_final_runs_training_set_is_train_and_val_at_the_stored_size(garden: Garden) -> None:
    both, splits = load_train_and_val(garden, IMAGENET), load_splits(garden, IMAGENET)
    assert both.images.shape == (64, 72, 72, 3)
    assert torch.equal(both.images[:32], splits.train.images)
    assert torch.equal(both.labels, torch.cat([splits.train.labels, splits.val.labels]))


def test_the_test_split_has_the_models_size_and_its_own_images(garden: Garden) -> None:
    test, splits = load_test(garden, IMAGENET), load_splits(garden, IMAGENET)
    assert test.images.shape == (48, 64, 64, 3)
    seen = {image.numpy().tobytes() for image in splits.val.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_a_batch_holds_the_images_asked_for(garden: Garden) -> None:
    train, order = load_splits(garden, IMAGENET).train, torch.tensor([5, 0, 31, 5])
    assert torch.equal(train.stored(order, torch.device("cpu")), train.images[order])


def test_images_read_beside_the_step_before_are_those_asked_for(garden: Garden) -> None:
    train = load_splits(garden, IMAGENET).train
    reading = dataclasses.replace(train, reader=Reader(train.images, torch.device("cpu")))
    first, second, other = torch.tensor([5, 0, 31, 5]), torch.tensor([1, 2]), torch.tensor([1, 2])
    for chosen, expected in ((first, second), (second, first), (other, None), (first, None)):
        assert torch.equal(reading.stored(chosen, torch.device("cpu")), train.images[chosen])
        if expected is not None:
            reading.expect(expected)


def test_an_error_of_the_reading_thread_is_raised_where_the_images_are_needed(garden: Garden) -> None:
    train, beyond = load_splits(garden, IMAGENET).train, torch.tensor([5, 99])
    reading = dataclasses.replace(train, reader=Reader(train.images, torch.device("cpu")))
    reading.expect(beyond)
    with pytest.raises(IndexError):
        reading.stored(beyond, torch.device("cpu"))


def test_images_move_to_a_device_only_when_they_leave_most_of_its_memory_free(garden: Garden) -> None:
    assert fits(200, 800)
    assert not fits(201, 800)
    train = load_splits(garden, IMAGENET).train
    assert train.on(torch.device("cpu")) is train


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_on_cuda_the_images_are_kept_there_and_batches_are_the_same(garden: Garden) -> None:
    train, device = load_splits(garden, IMAGENET).train, torch.device("cuda")
    order = torch.tensor([5, 0, 31, 5])
    there = train.on(device)
    assert there.images.device.type == "cuda"
    assert torch.equal(there.stored(order, device).cpu(), train.images[order])


# --- limit ---


@pytest.mark.parametrize("limit", [1, 8, 16, 20, 32, 1000])
def test_a_limit_spreads_over_the_classes(garden: Garden, limit: int) -> None:
    splits = load_splits(dataclasses.replace(garden, limit=limit), IMAGENET)
    for part in (splits.train, splits.val):
        counts = Counter(part.labels.tolist())
        assert sum(counts.values()) == min(limit, 32)
        every = [counts[label] for label in range(16)]
        assert max(every) - min(every) <= 1


def test_a_limit_chooses_the_same_images_again(garden: Garden) -> None:
    limited = dataclasses.replace(garden, limit=20)
    first = load_splits(limited, IMAGENET)
    again = load_splits(dataclasses.replace(limited, cache=limited.cache + "/again"), IMAGENET)  # loaded anew
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.val.labels, again.val.labels)


def test_a_smaller_limit_chooses_among_the_larger_ones_images(garden: Garden) -> None:
    small, large = (load_splits(dataclasses.replace(garden, limit=limit), IMAGENET).train for limit in (16, 24))
    larger = {image.numpy().tobytes() for image in large.images}
    assert all(image.numpy().tobytes() in larger for image in small.images)


# --- the wall around the test split ---


def test_splits_has_no_test_field() -> None:
    assert {field.name for field in dataclasses.fields(Splits)} == {"classes", "train", "val"}


def test_only_final_mentions_load_test() -> None:
    """Names, attributes, imports and strings; prose in docstrings may explain it."""
    sources = [*(PROJECT / "harness").rglob("*.py"), *(PROJECT / "studies").glob("*.py"), PROJECT / "run_study.py"]
    offenders = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            named = {
                ast.Name: lambda node: node.id,
                ast.Attribute: lambda node: node.attr,
                ast.alias: lambda node: node.name.split(".")[-1],
                ast.Constant: lambda node: node.value,
                ast.FunctionDef: lambda node: node.name,
            }.get(type(node), lambda node: None)(node)
            if named == "load_test":
                defines = isinstance(node, ast.FunctionDef) and source.name == "splits.py"
                if not defines and source != PROJECT / "harness" / "final" / "test_set.py":
                    offenders.append(f"{source.relative_to(PROJECT)}:{getattr(node, 'lineno', '?')}")
    assert not offenders, f"only harness/final/test_set.py may use load_test, not {', '.join(offenders)}"


# --- the fingerprint ---


def test_prepare_gives_the_same_fingerprint_twice_and_with_another_cache(folder: ImageFolder) -> None:
    elsewhere = dataclasses.replace(folder, cache=folder.cache + "-2")
    assert prepare(folder, IMAGENET) == prepare(folder, IMAGENET) == prepare(elsewhere, IMAGENET)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_changed_image_changes_the_fingerprint(folder: ImageFolder, split: str) -> None:
    before = prepare(folder, IMAGENET)
    path = Path(folder.root) / split / "rose" / "0.png"
    Image.new("RGB", (20, 20), "blue").save(path)
    assert prepare(folder, IMAGENET) != before


def test_a_changed_label_changes_the_fingerprint(folder: ImageFolder) -> None:
    before, train = prepare(folder, IMAGENET), Path(folder.root) / "train"
    (train / "daisy" / "1.png").rename(train / "rose" / "a.png")
    assert prepare(folder, IMAGENET) != before


def test_prepare_decodes_everything_a_study_needs(folder: ImageFolder) -> None:
    prepare(folder, IMAGENET)
    for path in Path(folder.root).rglob("*.png"):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))  # no image any more, with the same stamp

        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(load_splits(folder, IMAGENET).train) == 4
    assert len(load_train_and_val(folder, IMAGENET)) == 8
    assert len(load_test(folder, IMAGENET)) == 4


def test_a_large_training_set_of_the_final_run_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    garden = Garden(train_per_class=2, val_per_class=1, test_per_class=1, cache=str(tmp_path))
    joined = load_train_and_val(garden, IMAGENET)
    load_train_and_val.cache_clear()
    monkeypatch.setattr("harness.data.splits.JOINED_BYTES", 0)
    mapped = load_train_and_val(garden, IMAGENET)
    load_train_and_val.cache_clear()
    assert torch.equal(mapped.images, joined.images)
    assert torch.equal(mapped.labels, joined.labels)
    assert len(list(tmp_path.glob("*.npy"))) == 3  # of train, val, and both
