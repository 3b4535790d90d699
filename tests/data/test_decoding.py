"""Bytes become pixels, or a sentence that names the file: formats, greys, orientation, sizes, warnings, damage."""

from __future__ import annotations

import io
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from harness.base.errors import InputError
from harness.config.contracts import Square
from harness.data import decoding
from harness.data.cache import ImageFiles
from harness.data.decoding import SUFFIXES, decode, open_image, revision
from harness.data.layout import made_by_system
from harness.datasets.image_folder import ImageFolder
from tests.data.arrays import decoded


def flower(width: int = 24, height: int = 18) -> Image.Image:
    """A smooth picture, so that lossy formats keep it, with another colour in every corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 40 + columns * 200 / width, 60 + rows * 160 / height
    return Image.fromarray(np.dstack([red, green, np.full_like(red, 90)]).astype(np.uint8))


GREYS = np.asarray(flower().convert("L"))


def content(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(name: str, data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        decode(Path("folder", name), io.BytesIO(data))
    said = str(caught.value)
    assert said.startswith(f"folder/{name} ")
    assert len(said.splitlines()) == 1
    return said


def close(image: Image.Image, wanted: Image.Image, within: int) -> bool:
    return image.size == wanted.size and bool(
        np.abs(np.asarray(image, dtype=int) - np.asarray(wanted, dtype=int)).max() <= within
    )


# -- which formats -------------------------------------------------------------------------------------------------

READ: dict[str, tuple[str, dict[str, Any]]] = {
    "a.jpg": ("JPEG", {"quality": 95}),
    "a.jfif": ("JPEG", {"quality": 95}),
    "a.jpe": ("JPEG", {"quality": 95}),
    "a.mpo": ("MPO", {"quality": 95}),
    "a.png": ("PNG", {}),
    "a.webp": ("WEBP", {"lossless": True}),
    "a.avif": ("AVIF", {"quality": 95}),
    "a.bmp": ("BMP", {}),
    "a.dib": ("BMP", {}),
    "a.gif": ("GIF", {}),
    "a.tif": ("TIFF", {}),
    "a.ppm": ("PPM", {}),
    "a.tga": ("TGA", {}),
    "a tga that is called so in capitals.TGA": ("TGA", {}),
    "a png that is called so.jpg": ("PNG", {}),
}


@pytest.mark.parametrize(("name", "saved"), READ.items(), ids=READ.keys())
def test_every_format_of_the_list_is_read_and_taken_for_an_image(name: str, saved: tuple[str, dict[str, Any]]) -> None:
    kind, options = saved
    assert close(decode(Path(name), io.BytesIO(content(flower(), kind, **options))), flower(), 12)
    assert Path(name).suffix.lower() in SUFFIXES


def test_heic_is_read_where_its_reader_is_installed() -> None:
    pytest.importorskip("pillow_heif", reason='no pillow-heif; pip install -e ".[heic]"').register_heif_opener()
    data = content(flower(), "HEIF", quality=95)
    assert close(decode(Path("a.heic"), io.BytesIO(data)), flower(), 12)
    assert "(HEIC: " in refused("a.jpg", data[:100])


def test_heic_is_named_where_its_reader_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    said = refused("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    assert 'it is HEIC; install its reader with pip install -e ".[heic]", or convert it to JPEG or PNG' in said


OTHERS = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "PDF": b"%PDF-1.7\n",
    "a Photoshop file (PSD)": b"8BPS\0\1",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG 2000": content(flower(), "JPEG2000"),
    "an icon (ICO)": content(flower(), "ICO"),
    "PCX": content(flower(), "PCX"),
    "a camera's raw file": b"II*\0\x10\0\0\0CR\2\0" + bytes(40),
    "a video": b"\0\0\0\x14ftypqt  \0\0\0\0qt  ",
    "a ZIP archive": b"PK\3\4\x14\0",
    "a web page (HTML)": b"<!DOCTYPE html>\n<html><title>404</title>",
    "a drawing (SVG)": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "a Windows or Office file": b"\xd0\xcf\x11\xe0" + bytes(500),
    "text": "no image, but süß".encode(),
    "empty": b"",
    "zeros only": bytes(5000),
    "of an unknown kind": bytes(range(1, 256)),
}


@pytest.mark.parametrize(("kind", "data"), OTHERS.items(), ids=OTHERS.keys())
def test_what_is_outside_of_the_list_is_called_what_it_is(kind: str, data: bytes) -> None:
    assert f"cannot be read as an image: it {'is' if kind != 'zeros only' else 'begins with'} {kind}" in refused(
        "rose.jpg", data
    )


def test_a_start_that_no_decoder_takes_is_named_without_python_s_words() -> None:
    assert "(WebP: its header is damaged); convert it" in refused("a.jpg", b"RIFF\0\0\0\0WEBPnone" + bytes(99))


def test_the_preview_of_a_raw_file_is_not_taken_for_the_photograph() -> None:
    for tag in ({50706: b"\1\4\0\0"}, {254: 1}):
        assert "it is a camera's raw file" in refused("rose.tif", content(flower(), "TIFF", tiffinfo=tag))


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("rose.jpg", "rose.eps", "rose.tga"):
        (tmp_path / name).write_bytes(OTHERS["PostScript"])
        with pytest.raises(InputError, match="PostScript"):
            open_image(tmp_path / name)
    assert not (tmp_path / "started").exists()


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none.jpg"):
        with pytest.raises(InputError, match=rf"{place} cannot be read as an image"):
            open_image(place)


def test_what_systems_make_is_known_by_its_name() -> None:
    for name in (".DS_Store", "._rose.jpg", "Thumbs.db", "THUMBS.DB", "desktop.ini", "__MACOSX", "@eaDir"):
        assert made_by_system(name)
    for name in ("rose.jpg", "__background__", "notes.txt", "thumbs"):
        assert not made_by_system(name)


# -- greys of more than 8 bits -------------------------------------------------------------------------------------


def tiff(values: NDArray[Any], kind: int, photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF of these numbers; kind 1 is unsigned, 2 signed, 3 float."""
    height, width = values.shape
    fields = {256: width, 257: height, 258: values.itemsize * 8, 259: 1, 262: photometric, 273: 200, 277: 1}
    fields |= {278: height, 279: values.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries).ljust(200, b"\0") + values.tobytes()


def pgm(maximum: int, kind: str = "P5") -> bytes:
    values = np.round(GREYS / 255 * maximum).astype(">u2" if maximum > 255 else np.uint8)
    numbers = values.tobytes() if kind == "P5" else " ".join(map(str, values.ravel())).encode()
    return f"{kind} 24 18 {maximum}\n".encode() + numbers


FLOATS = (GREYS / 255).astype(np.float32)
DEEP: dict[str, bytes] = {
    "16 bits of PGM": pgm(65_535),
    "10 bits of PGM": pgm(1_023),
    "12 bits of PGM in letters": pgm(4_095, "P2"),
    "16 bits of PNG": content(Image.fromarray(GREYS.astype(np.uint16) * 257), "PNG"),
    "16 bits": tiff(GREYS.astype(np.uint16) * 257, 1),
    "16 bits, 0 is white": tiff(65_535 - GREYS.astype(np.uint16) * 257, 1, 0),
    "16 bits with a sign": tiff(GREYS.astype(np.int16) * 128, 2),
    "32 bits": tiff(GREYS.astype(np.uint32) * 16_843_009, 1),
    "32 bits with a sign": tiff(GREYS.astype(np.int32) * 8_421_504, 2),
    "floats to 1": tiff(FLOATS, 3),
    "floats to 1, 0 is white": tiff(1 - FLOATS, 3, 0),
    "floats to 255": tiff(GREYS.astype(np.float32), 3),
    "floats to 65,535": tiff(GREYS.astype(np.float32) * 257, 3),
    "floats of PFM": content(Image.fromarray(FLOATS), "PPM"),
}


@pytest.mark.parametrize("data", DEEP.values(), ids=DEEP.keys())
def test_greys_of_more_than_8_bits_keep_their_brightness(data: bytes) -> None:
    image = decode(Path("a.tif"), io.BytesIO(data))
    assert close(image, Image.fromarray(GREYS).convert("RGB"), 2)


def test_what_resizing_adds_to_the_range_of_floats_is_cut_off() -> None:
    values = FLOATS.copy()
    values[0, :2] = 1.04, -0.02
    image = np.asarray(decode(Path("a.tif"), io.BytesIO(tiff(values, 3))))
    assert image[0, :2, 0].tolist() == [255, 0]
    assert np.abs(image[1:, :, 0].astype(int) - GREYS[1:]).max() <= 2


@pytest.mark.parametrize(
    "values",
    [FLOATS * 1e6, FLOATS - 0.5, FLOATS * np.float32("nan"), FLOATS * 5, GREYS.astype(np.int32)],
    ids=["to a million", "below 0", "no numbers", "to 5", "8 bits in 32"],
)
def test_a_range_that_says_nothing_is_refused(values: NDArray[Any]) -> None:
    said = refused("a.tif", tiff(values, 3 if values.dtype == np.float32 else 2))
    assert "has values from" in said
    assert "scale them to the full range of 8 or 16 bits" in said


def test_a_kind_of_tiff_that_is_not_read_says_so() -> None:
    assert "(TIFF: unknown pixel mode); convert it" in refused("a.tif", tiff(GREYS.astype(np.float64), 3))


# -- orientation and what is transparent ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_every_format_is_turned_upright_once(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = content(flower().transpose(Image.Transpose.ROTATE_90), kind, exif=exif, quality=95)
    assert close(decode(Path("a.jpg"), io.BytesIO(data)), flower(), 12)


def test_exif_that_cannot_be_read_costs_no_image(capsys: pytest.CaptureFixture[str]) -> None:
    data = content(flower(), "PNG", exif=b"Exif\0\0no header of a TIFF")
    assert close(decode(Path("a.png"), io.BytesIO(data)), flower(), 0)
    assert capsys.readouterr().err.startswith("a.png was read with a warning: its EXIF cannot be read")


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_a_jpeg_of_108_megapixels_is_reduced_while_it_is_decoded() -> None:
    data = content(Image.new("L", (12_000, 9_000), 77), "JPEG")
    image = decode(Path("a.jpg"), io.BytesIO(data))
    assert image.size == (6_000, 4_500)
    assert image.getpixel((5_999, 4_499)) == (77, 77, 77)


LARGE = ["RGB", "RGBA", "L", "1", "P", "I;16"]


@pytest.mark.parametrize("mode", LARGE)
def test_what_is_large_is_reduced_in_every_mode(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(decoding, "WORKING_PIXELS", 2_000)
    monkeypatch.setattr(decoding, "SHORT_SIDE", 8)
    image = flower(100, 80)
    image = Image.new(mode, image.size, 0x8080) if mode == "I;16" else image.convert(mode)
    data = content(image, "PNG")
    small = decode(Path("a.png"), io.BytesIO(data))
    assert small.size == (50, 40)
    wanted = Image.new("RGB", (50, 40), (128, 128, 128)) if mode == "I;16" else image.convert("RGB").reduce(2)
    assert close(small, wanted, 2)
    monkeypatch.setattr(decoding, "WORKING_PIXELS", 8_000)
    assert decode(Path("a.png"), io.BytesIO(data)).size == (100, 80)


def test_the_short_side_of_a_panorama_is_kept() -> None:
    assert decoding._factor(10_000, 10_000) == 1
    assert decoding._factor(12_000, 9_000) == 2
    assert decoding._factor(20_000, 20_000) == 2
    assert decoding._factor(100_000, 1_500) == 1
    assert decoding._factor(100_000, 4_500) == 4


def test_ordinary_images_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches of all studies stand on it."""
    for kind in ("JPEG", "PNG", "WEBP"):
        data = content(flower(640, 480), kind)
        with Image.open(io.BytesIO(data)) as plain:
            assert close(decode(Path("a.jpg"), io.BytesIO(data)), plain.convert("RGB"), 0)


def test_a_png_with_a_long_profile_or_text_is_read() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "long " * 500_000, zip=True)
    assert decode(Path("a.png"), io.BytesIO(content(flower(), "PNG", pnginfo=text))).size == (24, 18)
    assert decode(Path("a.png"), io.BytesIO(content(flower(), "PNG", icc_profile=bytes(3_000_000)))).size == (24, 18)


def test_a_text_that_would_fill_the_memory_is_refused() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(65)) + packer.flush()
    whole = content(flower(), "PNG")
    said = refused("a.png", whole[:33] + chunk(b"zTXt", b"comment\0\0" + bomb) + whole[33:])
    assert "too large" in said


# -- what Pillow warns of ------------------------------------------------------------------------------------------


def test_a_warning_is_one_line_with_the_image_s_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)
    for name in ("a.jpg", "b.jpg", "c\x1b.jpg"):
        flower().save(tmp_path / name, exif=exif)
    for name in ("a.jpg", "b.jpg", "c\x1b.jpg"):
        open_image(tmp_path / name)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" was read with a warning: Corrupt EXIF data.")[0] for line in lines] == [
        f"{tmp_path}/a.jpg",
        f"{tmp_path}/b.jpg",
        f"{tmp_path}/c\\x1b.jpg",
    ]
    assert "site-packages" not in "".join(lines)


def test_a_warning_of_a_file_that_is_refused_is_not_told_twice(capsys: pytest.CaptureFixture[str]) -> None:
    refused("a.tif", tiff(GREYS.astype(np.float64), 3))
    assert capsys.readouterr().err == ""


# -- caches --------------------------------------------------------------------------------------------------------


def test_only_what_is_decoded_otherwise_than_before_has_another_content() -> None:
    same = [
        *(content(flower(), kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "PPM")),
        *(pgm(255), DEEP["16 bits"], DEEP["16 bits of PNG"], b"II*\0damaged", b"P5 damaged"),
    ]
    assert [revision(each) for each in same] == [b""] * len(same)
    assert all(revision(DEEP[name]) for name in ("10 bits of PGM", "floats to 1", "32 bits", "16 bits, 0 is white"))


def test_a_cache_of_white_pictures_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was made before 16-bit PGM was understood."""
    (tmp_path / "a.ppm").write_bytes(pgm(65_535))
    data = ImageFolder(root=str(tmp_path), cache=str(tmp_path / "cache"))
    stamp, white = ImageFiles.stamp, lambda path: Image.new("RGB", (24, 18), "white")
    with monkeypatch.context() as before:
        before.setattr(ImageFiles, "stamp", lambda self, item: stamp(self, item).removesuffix("\x1f2"))
        before.setattr(ImageFiles, "content", lambda self, item: item.read_bytes())
        before.setattr("harness.data.cache.open_image", white)
        assert decoded(data, [tmp_path / "a.ppm"], Square(18, 18)).min() == 255
    assert decoded(data, [tmp_path / "a.ppm"], Square(18, 18)).max() < 255


# -- damage --------------------------------------------------------------------------------------------------------


def whole_files() -> dict[str, bytes]:
    """Tiny pictures of every accepted format, in the variants that take other ways through the decoders."""
    image = flower(11, 9)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    text = PngImagePlugin.PngInfo()
    text.add_text("key", "value" * 20, zip=True)
    several: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(180)]}
    palette, deep = image.convert("P"), Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    made: list[tuple[str, Image.Image, str, dict[str, Any]]] = [
        ("a.jpg", image, "JPEG", {"exif": exif.tobytes(), "icc_profile": b"profile" * 6}),
        ("a.jpe", image, "JPEG", {"progressive": True}),
        ("a.jfif", image.convert("CMYK"), "JPEG", {}),
        ("a.mpo", image, "MPO", several),
        ("a.png", image, "PNG", {"exif": exif.tobytes(), "pnginfo": text, "icc_profile": b"profile" * 6}),
        ("palette.png", palette, "PNG", {"transparency": 0}),
        ("deep.png", deep, "PNG", {}),
        ("a.apng", image, "PNG", several),
        ("a.webp", image, "WEBP", {"exif": exif.tobytes()}),
        ("lossless.webp", image.convert("RGBA"), "WEBP", {"lossless": True}),
        ("moving.webp", image, "WEBP", several),
        ("a.avif", image, "AVIF", {"exif": exif.tobytes()}),
        ("a.bmp", image, "BMP", {}),
        ("palette.bmp", palette, "BMP", {}),
        ("a.gif", image, "GIF", {}),
        ("moving.gif", image, "GIF", several),
        *((f"{name}.tif", image, "TIFF", {"compression": name}) for name in ("raw", "tiff_lzw", "jpeg", "packbits")),
        ("fax.tif", image.convert("1"), "TIFF", {"compression": "group4"}),
        ("deep.tif", deep, "TIFF", {}),
        ("large.tif", image, "TIFF", {"big_tiff": True}),
        ("a.ppm", image, "PPM", {}),
        ("a.pbm", image.convert("1"), "PPM", {}),
        ("a.tga", image, "TGA", {}),
        ("short.tga", image.convert("RGBA"), "TGA", {"compression": "tga_rle"}),
        ("palette.tga", palette, "TGA", {}),
    ]
    files = {name: content(image, kind, **options) for name, image, kind, options in made}
    files |= {"float.tif": DEEP["floats to 1"], "a.pfm": DEEP["floats of PFM"], "a.pgm": DEEP["10 bits of PGM"]}
    files |= {"letters.pgm": DEEP["12 bits of PGM in letters"], "letters.pbm": b"P1 4 2\n1 0 1 0 1 1 0 0"}
    if decoding._heif():
        files["a.heic"] = content(image, "HEIF")
    return files


def flip(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(len(data))] = rng.randrange(256)


def flip_the_header(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 3))):
        data[rng.randrange(min(len(data), 64))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def cut(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def splice(data: bytearray, others: list[bytes], rng: random.Random) -> None:
    other, place = rng.choice(others), rng.randrange(len(data))
    start = rng.randrange(len(other))
    data[place : place + rng.randrange(64)] = other[start : start + rng.randrange(64)]


DAMAGES: list[Callable[[bytearray, list[bytes], random.Random], None]] = [flip, flip_the_header, cut, splice]


@pytest.mark.parametrize(
    ("count", "seed"), [(300, 0), pytest.param(4_000, 1, marks=pytest.mark.slow)], ids=["some", "thousands"]
)
def test_whatever_is_damaged_gives_pixels_or_a_sentence(monkeypatch: pytest.MonkeyPatch, count: int, seed: int) -> None:
    """Nothing else is raised, nothing hangs, and what a damaged header claims is not made room for."""
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000_000)  # so many are decoded in a moment
    files, rng = whole_files(), random.Random(seed)
    others, names = list(files.values()), list(files)
    for name, data in files.items():
        assert decode(Path(name), io.BytesIO(data)).mode == "RGB"
    said: dict[str, set[str]] = {name: set() for name in names}
    for number in range(count):
        name = names[number % len(names)]
        data = bytearray(files[name])
        rng.choice(DAMAGES)(data, others, rng)
        revision(bytes(data))
        try:
            assert decode(Path("folder", name), io.BytesIO(data)).mode == "RGB"
        except InputError as error:
            said[name].add(str(error))
    assert [name for name in names if not said[name]] == []
    for name in names:
        assert [each for each in said[name] if not each.startswith(f"folder/{name} ")] == []
        assert [each for each in said[name] if len(each.splitlines()) != 1] == []


def test_a_lack_of_memory_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MemoryError):
        decode(Path("a.png"), io.BytesIO(content(flower(), "PNG")))
