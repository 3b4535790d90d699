"""What a file is by its first bytes: an image that is read, or what else there is under the name of one."""

from __future__ import annotations

import codecs

HEAD = 4096  # bytes that tell
HEIC = "HEIC"
REPLACE = "replace it or take it out"
OUT = "take it out"
CONVERT = "convert it to JPEG or PNG, or take it out"
NO_HEIF = f'it is {HEIC}; install its reader with pip install -e ".[heic]", or {CONVERT}'

READ = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    **{b"P%d" % number: "PPM" for number in range(1, 7)},
    b"Pf": "PPM",
}
# Of the container that HEIC and AVIF share with films.
AVIF_BRANDS = {b"avif", b"avis"}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}

RAW, FILM = "a camera's raw file", "a film"
OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%!", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "a Photoshop file (PSD)"),
    (0, b"gimp xcf", "a GIMP file (XCF)"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II\xbc\x01", "JPEG XR"),
    (0, b"\0\0\1\0", "an icon (ICO)"),
    (0, b"icns", "an icon (ICNS)"),
    (0, b"DDS ", "a texture (DDS)"),
    (0, b"qoif", "QOI"),
    (0, b"\x0a\x05\x01", "PCX"),
    (0, b"\x01\xda", "SGI"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"\x93NUMPY", "an array of NumPy"),
    (0, b"\xd7\xcd\xc6\x9a", "a drawing (WMF)"),
    (128, b"DICM", "DICOM"),
    (8, b"CR\x02", RAW),
    (0, b"IIRO", RAW),
    (0, b"IIRS", RAW),
    (0, b"MMOR", RAW),
    (0, b"IIU\0", RAW),
    (0, b"FUJIFILM", RAW),
    (0, b"FOVb", RAW),
    (0, b"\x1aE\xdf\xa3", FILM),
    (8, b"AVI ", FILM),
    (0, b"\0\0\1\xba", FILM),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\0\5\x16\7", "what macOS keeps beside a file (AppleDouble)"),
    (0, b"\xd0\xcf\x11\xe0", "a Windows or Office file"),
    (0, b"SQLite format", "a database"),
    (0, b"\x7fELF", "a program"),
    (0, b"MZ", "a program"),
)
LFS, DRAWING, PAGE = "a pointer of Git LFS", "a drawing (SVG)", "a web page (HTML)"
REMEDIES = {
    FILM: OUT,
    "a program": OUT,
    "a database": OUT,
    "a Windows or Office file": OUT,
    "what macOS keeps beside a file (AppleDouble)": OUT,
    "an array of NumPy": OUT,
    LFS: "fetch the file itself with git lfs pull",
    DRAWING: CONVERT,
    PAGE: "save the picture itself",
}
IS_RAW = f"it is {RAW}; {CONVERT}"


def format_of(head: bytes) -> str:
    """The format of an image that is read, given the file's first bytes; empty for everything else."""
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[place : place + 4] for place in range(16, end, 4))}
        if brands & AVIF_BRANDS:
            return "AVIF"
        return HEIC if brands & HEIF_BRANDS and b"crx " not in brands else ""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in READ.items() if head.startswith(start)), "")


def refusal(head: bytes, found: str, heif: bool = False) -> str | None:
    """Why a file is not read and what to do, given its first bytes and its format if it has one; None: it is read.

    HEIC is read where its reader is installed (`heif`).
    """
    if found == HEIC:
        return None if heif else NO_HEIF
    # A camera's raw file may look like a TIFF; and TGA has no signature.
    if found in ("", "TIFF", "TGA") and (name := _other(head)) is not None:
        remedy = "unpack it, or take it out" if name.endswith("archive") else REMEDIES.get(name, CONVERT)
        return f"it is {name}; {remedy}"
    if found:
        return None
    if not head:
        return f"it is empty; {REPLACE}"
    if not any(head):
        return f"it begins with zeros only, as an interrupted copy does; {REPLACE}"
    name = _text(head) or "of no kind that is known"
    return f"it is {name}; {REMEDIES.get(name, REPLACE)}"


def _other(head: bytes) -> str | None:
    if head[4:8] == b"ftyp" and not format_of(head):
        return RAW if head[8:12] == b"crx " else FILM
    return next((name for place, start, name in OTHERS if head.startswith(start, place)), None)


def _text(head: bytes) -> str | None:
    """What kind of text it is, if it is text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()
    except UnicodeDecodeError:
        return None
    if text.startswith("version https://git-lfs"):
        return LFS
    start = text[:1024].lower()
    if start.startswith("<") and "<svg" in start:
        return DRAWING
    if start.startswith("<") and "<html" in start:
        return PAGE
    return "text" if all(sign.isprintable() or sign.isspace() for sign in text) else None
