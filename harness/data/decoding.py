"""Turn an image file into pixels: which formats are read, and what every other file is called.

One closed list for training, `predict` and the page. Left alone, Pillow chooses among all of its plugins by what is in
a file, and one of them starts a program (Ghostscript, for PostScript under any name).
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
# A file in a folder is taken for an image by its name; how it is read is decided by what is in it.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".heic", ".heif", ".hif"),
}
MAX_PIXELS = 500_000_000  # a small file can claim more than memory holds; the largest cameras take 400 million
WORKING_PIXELS = 100_000_000  # what has more is halved, quartered or divided by 8 on its way, one image at a time
SHORT_SIDE = 1024  # pixels that an image so reduced keeps on its short side

# Each plugin registers its format; asked for one that is missing, Pillow would load them all.
for name in ("Avif", "Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tga", "Tiff", "WebP"):
    import_module(f"PIL.{name}ImagePlugin")
Image.WARN_POSSIBLE_FORMATS = True  # where no plugin takes an image, those that tried say why
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow also looks at an image's parts, before it makes room for them
# One colour profile or text may be as long as all of an image's together; Pillow's own bound is 1 MB for each.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 0x0102, 0x0106, 0x0153  # tags of TIFF, the first of EXIF too
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
_reading = threading.local()  # `notes`: what Pillow warns of while this thread decodes an image


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB, upright as its EXIF orientation says; of several images in it the first.

    One of more than WORKING_PIXELS comes reduced. Raises InputError naming the file when it is damaged, of a kind that
    is not read, or too large to be decoded safely. What Pillow warns of is printed, with the file's name, in one line.
    """
    with _guard(path), path.open("rb") as file:
        return decode(path, file if file.seekable() else io.BytesIO(file.read()))


def decode(path: Path, source: IO[bytes]) -> Image.Image:
    """What `open_image` gives, for the content of a file of that name."""
    with _noting() as notes, _guard(path):
        head = source.read(HEAD)
        source.seek(0)
        # TGA has no signature: almost anything could be one.
        named = ("TGA",) if path.suffix.lower() == ".tga" else ()
        found = format_of(head) or "".join(named)
        if (why := refusal(head, found, heif=found == HEIC and _heif())) is not None:
            raise InputError(f"{path} cannot be read as an image: {why}.")
        with _guard(path, found):
            image = _decoded(path, source, (*FORMATS, *named, *(("HEIF",) if found == HEIC else ())))
    for note in dict.fromkeys(notes):
        print(f"{shown(str(path))} was read with a warning: {shown(note)}", file=sys.stderr)
    return image


def revision(content: bytes) -> bytes:
    """What counts as a part of a file's content where earlier versions decoded it to other pixels; mostly nothing.

    So the caches of all other images, and the studies that were begun on them, stay as they are.
    """
    if content[:2] not in (b"P2", b"P5", b"Pf", b"II", b"MM"):
        return b""
    with contextlib.suppress(InputError), _noting(), _guard(Path()):  # a damaged one is refused when it is decoded
        image = Image.open(io.BytesIO(content), formats=("TIFF", "PPM"))
        tags = _tags(image)
        greys = image.mode in ("I", "F") or (image.mode.startswith("I;16") and _depth(tags) != (16, False, False))
        if greys or image.mode == "RGBa" or tags.get(ORIENTATION, 1) != 1:
            return b"\x1f2"
    return b""


def check_proportions(item: Any, width: int, height: int, size: int = 32) -> None:
    """Raise InputError naming the item when its image is too narrow to be made a square of `size` pixels safely."""
    # The short side is resized to `size` first: a line of pixels would become an image that fills the memory.
    if max(width, height) * size**2 > WORKING_PIXELS * min(width, height):
        raise InputError(f"{item} has {width} x {height} pixels, which is too narrow; cut out the part that matters.")


@contextlib.contextmanager
def _guard(path: Path, kind: str = "") -> Iterator[None]:
    """Whatever a decoder raises becomes an InputError that names the file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} says that it has more than {MAX_PIXELS:,} pixels; {SMALLER}.") from error
    except Exception as error:
        # No list of types: on damaged bytes decoders raise RuntimeError, IndexError, TypeError, struct.error, ...
        why, remedy = first_line(error), REPLACE
        if isinstance(error, UnidentifiedImageError):
            said = [note.partition(" opening failed. ")[2] for note in _reading.notes]
            why, remedy = next(filter(None, reversed(said)), "its start is damaged"), CONVERT
        what = f"{kind}: {why}" if kind else why
        raise InputError(f"{path} cannot be read as an image ({what}); {remedy}.") from error


SMALLER = "replace it by a smaller one or take it out"


@contextlib.contextmanager
def _noting() -> Iterator[list[str]]:
    """What Pillow warns of in this thread meanwhile. Not `warnings.catch_warnings`, which holds for all threads."""
    global _others
    if warnings.showwarning is not _note:
        _others, warnings.showwarning = warnings.showwarning, _note
        # By default a second image with the same fault would go without a word.
        warnings.filterwarnings("always", category=UserWarning, module=r"(PIL|pillow_heif)\b")
    _reading.notes = []
    try:
        yield _reading.notes
    finally:
        _reading.notes = None


_others = warnings.showwarning


def _note(message: Warning | str, category: type[Warning], *where: Any, **named: Any) -> None:
    notes = getattr(_reading, "notes", None)
    if notes is None:
        _others(message, category, *where, **named)
    elif not issubclass(category, Image.DecompressionBombWarning):  # ours is the bound
        notes.append(" ".join(str(message).split()))


def _heif() -> bool:
    """Whether the reader of HEIC is installed, and then ready."""
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
            claim = f"{path} says that it has {width} x {height} pixels, and more than {MAX_PIXELS:,} are not decoded"
            raise InputError(f"{claim}; {SMALLER}.")
        check_proportions(path, width, height)
        if DNG_VERSION in (tags := _tags(image)) or tags.get(PREVIEW) == 1:
            raise InputError(f"{path} cannot be read as an image: {IS_RAW}.")
        factor = _factor(width, height)
        with _large if factor > 1 else contextlib.nullcontext():
            if factor > 1:
                image.draft(None, (width // factor, height // factor))  # what JPEG can leave out while it decodes
            image.load()
            return _rgb(path, image, 1 if image.width * image.height < width * height else factor)


def _factor(width: int, height: int) -> int:
    """By what an image's sides are divided: 1 for all that are not enormous, whose pixels stay as they always were."""
    factor = 1
    while factor < 8 and width * height > WORKING_PIXELS * factor**2 and min(width, height) >= 2 * factor * SHORT_SIDE:
        factor *= 2
    return factor


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
    """Not ImageOps.exif_transpose: that writes the whole EXIF anew and fails at a single wrong field."""
    try:
        with _guard(Path()):
            return image.getexif().get(ORIENTATION, 1)  # a TIFF is upright already, and says so
    except InputError as error:
        _reading.notes.append(f"its EXIF cannot be read ({error.__cause__}), so it is not turned")
        return 1


def _tags(image: Image.Image) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _depth(tags: Mapping[int, Any]) -> tuple[int, bool, bool]:
    """Of whole numbers: how many bits they have, whether one is the sign, and whether 0 is white."""
    return tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == 2, tags.get(PHOTOMETRIC) == 0


def _grey(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    """Greys of more than 8 bits, of which Pillow would cut off everything above 255, by the range of their type.

    Floats are taken from 0 to 1, to 255 or to 65,535, whichever holds them, with a little more for what resizing adds.
    """
    values = np.asarray(image)
    bits, signed, inverted = _depth(_tags(image))
    low, high = values.min().item(), values.max().item()
    if image.mode == "F":
        top = next((top for top in (1, 255, 65_535) if -0.1 * top <= low <= high <= 1.1 * top), None)
        if top is None:  # also where one is no number
            raise InputError(f"{path} holds numbers from {low:g} to {high:g}, {RANGE}.")
        grey = (np.clip(values, 0, top) * (255 / top)).astype(np.uint8)
    else:
        values = values.view(np.uint32) if bits == 32 and not signed else np.maximum(values, 0)
        grey = (values >> (bits - signed - 8)).astype(np.uint8)
    if low < high and grey.max() < BLACK:
        raise InputError(f"{path} is almost black: it holds numbers from {low:g} to {high:g}, {RANGE}.")
    return 255 - grey if inverted else grey


BLACK = 16  # of 255
RANGE = "which do not say what is black and what is white; scale them to the whole range of 8 or 16 bits"
