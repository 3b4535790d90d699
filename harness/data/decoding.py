"""Decode image files of a fixed list of formats, and reject all others with a reason.

The list is the same for training, `predict` and the demo page. By default, Pillow chooses among all of its plugins by
a file's content, and one of them starts a program (Ghostscript, for PostScript under any name).
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from harness.base.errors import InputError, first_line, shown
from harness.data.kinds import CONVERT, HEAD, HEIC, IS_RAW, REPLACE, format_of, refusal

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")  # MPO is opened as JPEG
# The suffix decides which files in a folder are images; the content decides how they are read.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".heic", ".heif", ".hif"),
}
MAX_PIXELS = 500_000_000  # a small file can claim more than fits into memory; the largest cameras have 400 million
WORKING_PIXELS = 100_000_000  # larger images are reduced by 2, 4 or 8 while decoding, one at a time
SHORT_SIDE = 1024  # minimum short side of a reduced image, in pixels

# Each plugin registers its format; for a missing one, Pillow would load them all.
for name in ("Avif", "Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tga", "Tiff", "WebP"):
    import_module(f"PIL.{name}ImagePlugin")
Image.WARN_POSSIBLE_FORMATS = True  # if no plugin accepts an image, report the reasons
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow also checks an image's parts before allocating them
# One colour profile or text may be as long as all of an image's together; Pillow's default is 1 MB for each.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 0x0102, 0x0106, 0x0153  # TIFF tags; the first is EXIF, too
PREVIEW, DNG_VERSION = 0x00FE, 0xC612  # a camera's raw file is a TIFF with a preview in front
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_large = threading.Lock()  # an image of 500 million pixels takes 2 GB
_reading = threading.local()  # `notes`: Pillow's warnings while this thread decodes an image


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB, rotated by its EXIF orientation; of several images in it the first.

    Reduces an image of more than WORKING_PIXELS. Raises InputError naming the file if it is damaged, of an unsupported
    format, or too large to decode safely. Prints each of Pillow's warnings on one line, with the file's name.
    """
    with _guard(path), path.open("rb") as file:
        return decode(path, file if file.seekable() else io.BytesIO(file.read()))


def decode(path: Path, source: IO[bytes]) -> Image.Image:
    """Decode as `open_image` does, from the content of the file `path`."""
    with _noting(shown(str(path))), _guard(path):
        head = source.read(HEAD)
        source.seek(0)
        # TGA has no signature: almost anything could be one.
        named = ("TGA",) if path.suffix.lower() == ".tga" else ()
        found = format_of(head) or "".join(named)
        if (why := refusal(head, found, heif=found == HEIC and _heif())) is not None:
            raise InputError(f"{path} cannot be read as an image: {why}.")
        with _guard(path, found):
            return _decoded(path, source, (*FORMATS, *named, *(("HEIF",) if found == HEIC else ())))


def revision(content: bytes) -> bytes:
    """Return a mark for a file's content if earlier versions decoded it to other pixels; mostly empty.

    So the caches of all other images, and the studies on them, stay valid.
    """
    if content[:2] not in (b"P2", b"P5", b"Pf", b"II", b"MM"):
        return b""
    with contextlib.suppress(InputError), _noting(), _guard(Path()):  # decoding rejects a damaged one
        image = Image.open(io.BytesIO(content), formats=("TIFF", "PPM"))
        tags = _tags(image)
        greys = image.mode in ("I", "F") or (image.mode.startswith("I;16") and _depth(tags) != (16, False, False))
        if greys or image.mode == "RGBa" or tags.get(ORIENTATION, 1) != 1:
            return b"\x1f2"
    return b""


def check_proportions(item: Any, width: int, height: int, size: int = 32) -> None:
    """Raise InputError naming the item if its image is too narrow to become a square of `size` pixels safely."""
    # The short side is resized to `size` first: a line of pixels would become an image that fills memory.
    if max(width, height) * size**2 > WORKING_PIXELS * min(width, height):
        raise InputError(f"{item} has {width} x {height} pixels, which is too narrow; crop it to the relevant part.")


@contextlib.contextmanager
def _guard(path: Path, kind: str = "") -> Iterator[None]:
    """Turn a decoder's exception into an InputError that names the file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} claims more than {MAX_PIXELS:,} pixels; {SMALLER}.") from error
    except Exception as error:
        # No list of types: on damaged bytes decoders raise RuntimeError, IndexError, TypeError, struct.error, ...
        why, remedy = first_line(error), REPLACE
        if isinstance(error, UnidentifiedImageError):
            said = [note.partition(" opening failed. ")[2] for note in _reading.notes]
            why, remedy = next(filter(None, reversed(said)), "its header is damaged"), CONVERT
        what = f"{kind}: {why}" if kind else why
        raise InputError(f"{path} cannot be read as an image ({what}); {remedy}.") from error


SMALLER = "replace it with a smaller one or remove it"


@contextlib.contextmanager
def _noting(name: str = "") -> Iterator[None]:
    """Collect Pillow's warnings in this thread; print them at the end, unless it fails, or there is no `name`.

    Not `warnings.catch_warnings`, which affects all threads.
    """
    global _others
    if warnings.showwarning is not _note:
        _others, warnings.showwarning = warnings.showwarning, _note
        # By default the same warning for a second image would be dropped.
        warnings.filterwarnings("always", category=UserWarning, module=r"(PIL|pillow_heif)\b")
    notes: list[str] = []
    _reading.notes = notes
    try:
        yield
    finally:
        _reading.notes = None
    for note in dict.fromkeys(notes) if name else ():
        print(f"{name} was read with a warning: {shown(note)}", file=sys.stderr)


_others = warnings.showwarning


def _note(message: Warning | str, category: type[Warning], *where: Any, **named: Any) -> None:
    notes = getattr(_reading, "notes", None)
    if notes is None:
        _others(message, category, *where, **named)
    elif not issubclass(category, Image.DecompressionBombWarning):  # we have our own limit
        notes.append(" ".join(str(message).split()))


def _heif() -> bool:
    """Register the HEIC reader; return whether it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    if "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()
    return True


def _decoded(path: Path, source: IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    with Image.open(source, formats=formats) as image:  # reads the header only
        width, height = image.size
        if width * height > MAX_PIXELS:
            claim = f"{path} claims {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}"
            raise InputError(f"{claim}; {SMALLER}.")
        check_proportions(path, width, height)
        if DNG_VERSION in (tags := _tags(image)) or tags.get(PREVIEW) == 1:
            raise InputError(f"{path} cannot be read as an image: {IS_RAW}.")
        factor = _factor(width, height)
        with _large if factor > 1 else contextlib.nullcontext():
            if factor > 1:
                image.draft(None, (width // factor, height // factor))  # JPEG can decode at a reduced size
            image.load()
            return _rgb(path, image, 1 if image.width * image.height < width * height else factor)


def _factor(width: int, height: int) -> int:
    """Return the divisor of an image's sides: 1 unless it is enormous, so that other images keep their pixels."""
    factor = 1
    while factor < 8 and width * height > WORKING_PIXELS * factor**2 and min(width, height) >= 2 * factor * SHORT_SIDE:
        factor *= 2
    return factor


def flat_rgb(image: Image.Image, *, name: str = "the image") -> Image.Image:
    """Return an image in memory as one from a file would be.

    Raises InputError with its `name` if it is damaged or empty.
    """
    with _noting(f"{name[:1].upper()}{name[1:]}"), _guard(Path(name)):
        image.load()
        if not all(image.size):
            raise InputError(f"{name} has no pixels; give another.")
        return _rgb(Path(name), image, 1)


def _rgb(path: Path, image: Image.Image, factor: int) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_grey(path, image))
    wanted = "RGBA" if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info else "RGB"
    if factor > 1:
        image = (image if image.mode == wanted else image.convert(wanted)).reduce(factor)
    if turn is not None:
        image = image.transpose(turn)
    if wanted == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """Read the EXIF orientation. ImageOps.exif_transpose rewrites the EXIF and fails on one wrong field."""
    try:
        with _guard(Path()):
            return image.getexif().get(ORIENTATION, 1)  # Pillow has already rotated a TIFF
    except InputError as error:
        _reading.notes.append(f"its EXIF cannot be read ({error.__cause__}), so it is not rotated")
        return 1


def _tags(image: Image.Image) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _depth(tags: Mapping[int, Any]) -> tuple[int, bool, bool]:
    """Return the bits of an integer sample, whether it is signed, and whether 0 is white."""
    return tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == 2, tags.get(PHOTOMETRIC) == 0


def _grey(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    """Scale greys of more than 8 bits by the range of their type; Pillow would clip them at 255.

    Floats are scaled from 0..1, 0..255 or 0..65,535, whichever holds them, with a margin for overshoot from resizing.
    """
    values = np.asarray(image)
    bits, signed, inverted = _depth(_tags(image))
    low, high = values.min().item(), values.max().item()
    if image.mode == "F":
        top = next((top for top in (1, 255, 65_535) if -0.1 * top <= low <= high <= 1.1 * top), None)
        if top is None:  # also if one is NaN
            raise InputError(f"{path} has values from {low:g} to {high:g}, {RANGE}.")
        grey = (np.clip(values, 0, top) * (255 / top)).astype(np.uint8)
    else:
        values = values.view(np.uint32) if bits == 32 and not signed else np.maximum(values, 0)
        grey = (values >> (bits - signed - 8)).astype(np.uint8)
    if low < high and grey.max() < BLACK:
        raise InputError(f"{path} is almost black: it has values from {low:g} to {high:g}, {RANGE}.")
    return 255 - grey if inverted else grey


BLACK = 16  # of 255
RANGE = "which do not define black and white; scale them to the full range of 8 or 16 bits"
