"""The cache of decoded images: the same pixels as torchvision's preset, decoded once, never half of anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import MaxVit_T_Weights
from torchvision.transforms import functional as F

from harness.base.errors import Halt, InputError
from harness.config.contracts import Square
from harness.data.augment import normalise
from harness.data.cache import ImageFiles, content_keys, damaged, square
from harness.data.decoding import open_image
from harness.datasets.image_folder import ImageFolder
from tests.data.arrays import decoded

SIZES = [(300, 200), (200, 300), (256, 256), (32, 32), (33, 32), (101, 57), (57, 101), (31, 500), (20, 12), (499, 333)]


@dataclass(frozen=True, kw_only=True)
class Photos(ImageFiles):
    """Image files with nothing but a cache."""

    cache: str


class Sealed(Photos):
    """Photos that may not be read any more."""

    def content(self, item: Path) -> bytes:
        raise AssertionError(f"{item} was read again")

    def open(self, item: Path) -> Image.Image:
        raise AssertionError(f"{item} was decoded again")


class Undecodable(Photos):
    """Photos whose bytes may be read, and not be decoded."""

    def open(self, item: Path) -> Image.Image:
        raise AssertionError(f"{item} was decoded again")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three PNG files of different shapes."""
    paths = []
    for number, size in enumerate([(40, 30), (30, 40), (36, 36)]):
        paths.append(tmp_path / f"photo-{number}.png")
        noise(*size, seed=number).save(paths[-1])
    return paths


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def arrays(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*.npy")}


def partials(cache: Path) -> list[Path]:
    return list(cache.glob("*.partial"))


# --- the pixels ---


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_square_equals_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    image = noise(*size)
    resized = F.resize(image, [32], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    expected = np.asarray(F.center_crop(resized, [32]))
    np.testing.assert_array_equal(square(image, Square(32, 32)), expected)


@pytest.mark.parametrize("size", [(500, 375), (375, 501), (224, 224), (229, 301)], ids=str)
def test_square_and_normalise_equal_the_preset_of_the_pretrained_weights(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = MaxVit_T_Weights.IMAGENET1K_V1.transforms()(image)
    ours = normalise(torch.from_numpy(square(image, Square(224, 224)).copy())[None])[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_the_array_holds_every_image_in_the_order_of_the_items(photos: list[Path], cache: Path) -> None:
    images = decoded(Photos(cache=str(cache)), photos, Square(16, 16))
    assert images.dtype == np.uint8
    assert images.shape == (3, 16, 16, 3)
    for row, path in zip(images, photos, strict=True):
        np.testing.assert_array_equal(row, square(open_image(path), Square(16, 16)))


# --- decoding once ---


def test_the_second_call_neither_reads_nor_decodes_an_image(photos: list[Path], cache: Path) -> None:
    first = decoded(Photos(cache=str(cache)), photos, Square(16, 16)).copy()
    np.testing.assert_array_equal(decoded(Sealed(cache=str(cache)), photos, Square(16, 16)), first)


def test_a_new_modification_time_alone_decodes_nothing(photos: list[Path], cache: Path) -> None:
    first = decoded(Photos(cache=str(cache)), photos, Square(16, 16)).copy()
    for path in photos:
        os.utime(path, (1, 1))
    np.testing.assert_array_equal(decoded(Undecodable(cache=str(cache)), photos, Square(16, 16)), first)


def test_the_same_content_under_other_names_gives_the_same_array_file(photos: list[Path], cache: Path) -> None:
    decoded(Photos(cache=str(cache)), photos, Square(16, 16))
    before = arrays(cache)
    moved = [path.rename(path.with_name(f"renamed-{path.name}")) for path in photos]
    decoded(Undecodable(cache=str(cache)), moved, Square(16, 16))
    assert arrays(cache) == before


def test_changed_content_order_and_size_each_give_another_array_file(photos: list[Path], cache: Path) -> None:
    dataset = Photos(cache=str(cache))
    decoded(dataset, photos, Square(16, 16))
    decoded(dataset, photos[::-1], Square(16, 16))
    decoded(dataset, photos, Square(8, 8))
    assert len(arrays(cache)) == 3
    noise(40, 30, seed=99).save(photos[0])
    changed = decoded(dataset, photos, Square(16, 16))
    assert len(arrays(cache)) == 4
    np.testing.assert_array_equal(changed[0], square(open_image(photos[0]), Square(16, 16)))


def test_writers_at_the_same_time_leave_one_whole_array(photos: list[Path], cache: Path) -> None:
    dataset = Photos(cache=str(cache))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: decoded(dataset, photos, Square(16, 16)).copy(), range(8)))
    assert all(np.array_equal(result, results[0]) for result in results)
    assert len(arrays(cache)) == 1
    assert not partials(cache)


class Counted(Photos):
    """Photos that count how often each of them is decoded."""

    opened: ClassVar[list[Path]] = []

    def open(self, item: Path) -> Image.Image:
        self.opened.append(item)
        return super().open(item)


def test_several_sizes_take_one_decoding_and_give_the_same_arrays(photos: list[Path], cache: Path) -> None:
    dataset = Counted(cache=str(cache))
    dataset.opened.clear()
    keys = content_keys(dataset, photos, [Square(16, 16), Square(8, 8)])
    assert sorted(dataset.opened) == photos
    assert arrays(cache) == {f"{key}.npy" for key in keys.values()}
    alone = Photos(cache=str(cache.with_name("alone")))
    for size, key in keys.items():
        images = decoded(Sealed(cache=str(cache)), photos, size)
        np.testing.assert_array_equal(images, decoded(alone, photos, size))
        assert content_keys(alone, photos, [size]) == {size: key}


def test_only_the_size_that_is_missing_is_made(photos: list[Path], cache: Path) -> None:
    dataset = Counted(cache=str(cache))
    decoded(dataset, photos, Square(16, 16))
    (array,) = cache.glob("*.npy")
    before = array.stat().st_ino
    dataset.opened.clear()
    content_keys(dataset, photos, [Square(16, 16), Square(8, 8)])
    assert sorted(dataset.opened) == photos
    assert array.stat().st_ino == before


# --- damage ---


def test_a_flipped_byte_is_named_once_and_the_array_made_again(
    photos: list[Path], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Photos(cache=str(cache))
    right = decoded(dataset, photos, Square(16, 16)).copy()
    (array,) = cache.glob("*.npy")
    flip(array)
    np.testing.assert_array_equal(decoded(dataset, photos, Square(16, 16)), right)
    assert capsys.readouterr().err.count(str(array)) == 1
    np.testing.assert_array_equal(decoded(Sealed(cache=str(cache)), photos, Square(16, 16)), right)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["x" * 5000, "../../elsewhere", ""])
def test_a_key_file_with_something_else_in_it_is_as_none(photos: list[Path], cache: Path, text: str) -> None:
    dataset = Photos(cache=str(cache))
    right = decoded(dataset, photos, Square(16, 16)).copy()
    (key,) = cache.glob("*.key")
    before = key.read_text()
    key.write_text(text)
    np.testing.assert_array_equal(decoded(dataset, photos, Square(16, 16)), right)
    assert key.read_text() == before


def test_an_array_cut_short_is_made_again(photos: list[Path], cache: Path) -> None:
    dataset = Photos(cache=str(cache))
    right = decoded(dataset, photos, Square(16, 16)).copy()
    (array,) = cache.glob("*.npy")
    array.write_bytes(array.read_bytes()[:200])
    np.testing.assert_array_equal(decoded(dataset, photos, Square(16, 16)), right)


def test_what_a_killed_writer_left_is_ignored(photos: list[Path], cache: Path) -> None:
    dataset = Photos(cache=str(cache))
    right = decoded(dataset, photos, Square(16, 16)).copy()
    (array,), (record,) = cache.glob("*.npy"), cache.glob("*.json")
    array.rename(cache / f"{array.stem}.0123.partial").write_bytes(b"half")
    record.unlink()
    np.testing.assert_array_equal(decoded(dataset, photos, Square(16, 16)), right)


def test_an_array_without_its_record_is_not_trusted(photos: list[Path], cache: Path) -> None:
    dataset = Photos(cache=str(cache))
    right = decoded(dataset, photos, Square(16, 16)).copy()
    (array,), (record,) = cache.glob("*.npy"), cache.glob("*.json")
    array.write_bytes(b"half an array")
    record.unlink()
    np.testing.assert_array_equal(decoded(dataset, photos, Square(16, 16)), right)
    assert record.exists()


def flip(array: Path) -> None:
    """Change a byte, a second after the file was written: the clock of a file system is coarse."""
    content = bytearray(array.read_bytes())
    content[-5] ^= 1
    array.write_bytes(content)
    later = array.stat().st_mtime_ns + 10**9
    os.utime(array, ns=(later, later))


def test_an_array_is_read_again_only_when_its_file_is_another(
    photos: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By size, times or inode; its checksum is then right, and remembered with what the file is now."""
    dataset, read = Photos(cache=str(cache)), []
    decoded(dataset, photos, Square(16, 16))
    (array,) = cache.glob("*.npy")
    checksum = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(file.name), checksum(file, name))[1])
    decoded(dataset, photos, Square(16, 16))
    assert read == []
    copy = array.with_suffix(".copy")
    shutil.copy2(array, copy)
    copy.replace(array)
    for _ in range(2):
        decoded(dataset, photos, Square(16, 16))
        assert read == [str(array)]


def test_a_cache_that_may_not_be_written_is_opened_all_the_same(
    photos: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Photos(cache=str(cache))
    right = decoded(dataset, photos, Square(16, 16)).copy()
    (array,) = cache.glob("*.npy")
    os.utime(array, (1, 1))

    def refused(*arguments: object) -> None:
        raise Halt("the cache cannot be written")

    monkeypatch.setattr("harness.data.cache.replace_file", refused)
    np.testing.assert_array_equal(decoded(Sealed(cache=str(cache)), photos, Square(16, 16)), right)
    os.utime(photos[0], (1, 1))  # as after a copy: found by its content
    np.testing.assert_array_equal(decoded(Photos(cache=str(cache)), photos, Square(16, 16)), right)


def test_bits_that_rotted_behind_the_file_systems_back_are_found_by_reading_everything(
    photos: list[Path], cache: Path
) -> None:
    dataset = Photos(cache=str(cache))
    decoded(dataset, photos, Square(16, 16))
    decoded(dataset, photos, Square(8, 8))
    assert list(damaged(cache)) == []
    array = sorted(cache.glob("*.npy"))[1]
    flip(array)
    stat, record = array.stat(), json.loads(array.with_suffix(".json").read_text())
    record["file"] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    array.with_suffix(".json").write_text(json.dumps(record))
    assert list(damaged(cache)) == [array]


@pytest.mark.parametrize("content", [b"", b'{"shape": [3', b"{}", b"\xff\xfe"], ids=["empty", "cut", "no sum", "noise"])
@pytest.mark.parametrize("suffix", ["json", "key"])
def test_an_unreadable_record_is_made_again(photos: list[Path], cache: Path, suffix: str, content: bytes) -> None:
    dataset = Photos(cache=str(cache))
    right = decoded(dataset, photos, Square(16, 16)).copy()
    (record,) = cache.glob(f"*.{suffix}")
    whole = record.read_bytes()
    record.write_bytes(content)
    np.testing.assert_array_equal(decoded(dataset, photos, Square(16, 16)), right)
    if suffix == "key":
        assert record.read_bytes() == whole
    else:
        assert json.loads(record.read_bytes())["sha256"] == json.loads(whole)["sha256"]
    np.testing.assert_array_equal(decoded(Sealed(cache=str(cache)), photos, Square(16, 16)), right)


# --- images that cannot be read ---


def bomb() -> bytes:
    """A PNG of 60 bytes that says it is 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated_jpeg(folder: Path) -> bytes:
    noise(64, 64).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    return content[: len(content) // 2]


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "bomb"])
def test_a_file_that_is_no_image_is_named_and_leaves_nothing_behind(
    photos: list[Path], cache: Path, tmp_path: Path, kind: str
) -> None:
    bad = tmp_path / "rose.jpg"
    contents = {"truncated": truncated_jpeg(tmp_path), "text": b"not an image", "empty": b"", "bomb": bomb()}
    bad.write_bytes(contents[kind])
    with pytest.raises(InputError, match=r"rose\.jpg"):
        decoded(Photos(cache=str(cache)), [*photos, bad], Square(16, 16))
    assert not arrays(cache)
    assert not partials(cache)
    bad.unlink()
    assert len(decoded(Photos(cache=str(cache)), photos, Square(16, 16))) == 3


@pytest.mark.parametrize("size", [(50_000, 1), (1, 50_000)], ids=str)
def test_a_line_of_pixels_is_named_before_it_fills_the_memory(
    photos: list[Path], cache: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size).save(tmp_path / "line.png")
    data, items = Photos(cache=str(cache)), [*photos, tmp_path / "line.png"]
    words = rf"line\.png has {size[0]} x {size[1]} pixels, which is too narrow; crop it to the relevant part\."
    with pytest.raises(InputError, match=words):
        content_keys(data, items, [Square(16, 16), Square(72, 72)])
    assert not arrays(cache)
    assert not partials(cache)
    assert len(decoded(data, items, Square(16, 16))) == 4  # at this size it is no larger than other images


# --- orientation and modes ---


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    stored = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = stored.transpose(turns[orientation]) if orientation in turns else stored
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.asarray(upright))


ASCII, SHORT, RATIONAL = 2, 3, 5  # types of EXIF fields


@pytest.mark.parametrize(
    ("tag", "kind"),
    [(0x0152, ASCII), (0x014D, RATIONAL), (0x011A, ASCII)],
    ids=["ExtraSamples is text", "InkNames is a fraction", "XResolution is text"],
)
def test_a_wrong_exif_field_beside_the_orientation_spoils_no_photo(tmp_path: Path, tag: int, kind: int) -> None:
    """Careless software writes such fields; the pixels and the orientation are whole."""
    orientation = struct.pack(">HHIHH", 0x0112, SHORT, 1, 6, 0)
    count, content = (8, b"wrong!!\0") if kind == ASCII else (1, struct.pack(">II", 72, 1))
    place = 8 + 2 + 2 * 12 + 4  # behind the header, the count, two fields and the end of the directory
    wrong = struct.pack(">HHII", tag, kind, count, place)
    directory = struct.pack(">H", 2) + b"".join(sorted([orientation, wrong])) + struct.pack(">I", 0)
    noise(6, 4).save(tmp_path / "photo.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08" + directory + content)
    assert open_image(tmp_path / "photo.jpg").size == (4, 6)


RED, CLEAR = (255, 0, 0), (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("P", None, "png", RED),
        ("RGBA", (*RED, 255), "png", RED),
        ("RGBA", CLEAR, "png", (255, 255, 255)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tif", RED),
        ("I;16", 0x8080, "png", (128, 128, 128)),
        ("I;16", 0x8080, "tif", (128, 128, 128)),
        ("I;16", 0x00FF, "png", (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...] | None, suffix: str, expected: tuple[int, int, int]
) -> None:
    """A 16-bit grey keeps its brightness, and what is transparent shows white."""
    path = tmp_path / f"photo.{suffix}"
    image = Image.new("RGB", (5, 4), RED).convert("P") if mode == "P" else Image.new(mode, (5, 4), colour)
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode, "the file must have the mode that the test is about"
    opened = open_image(path)
    assert opened.mode == "RGB"
    pixels = np.asarray(opened).astype(int)
    assert np.abs(pixels - expected).max() <= 1, f"{mode} became {pixels[0, 0]}"


def test_a_transparent_palette_colour_shows_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "photo.png", transparency=0)
    assert open_image(tmp_path / "photo.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_file_name_that_is_no_utf_8_is_read(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"fl\xf6wer.png")
    Image.new("RGB", (8, 8), "red").save(file)
    images = decoded(ImageFolder(root=str(tmp_path), cache=str(tmp_path / "cache")), [file], Square(8, 8))
    assert images[0, 0, 0].tolist() == [255, 0, 0]
