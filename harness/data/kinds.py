"""Identify a file by its first bytes: a supported image, or another kind with an image's name."""

from __future__ import annotations

import codecs

HEAD = 4096  # bytes to read
HEIC = "HEIC"
REPLACE = "replace or remove it"
OUT = "remove it"
CONVERT = "convert it to JPEG or PNG, or remove it"
NO_HEIF = f'it is {HEIC}; install its reader with pip install -e ".[heic]", or {CONVERT}'

READ: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8",),
    "PNG": (b"\x89PNG",),
    "BMP": (b"BM",),
    "GIF": (b"GIF8",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"),
}
# Brands in the container that HEIC, AVIF and videos use.
AVIF_BRANDS = {b"avif", b"avis"}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}

RAW, FILM = "a camera's raw file", "a video"
APPLE_DOUBLE = "a macOS metadata file (AppleDouble)"
# The first bytes of unsupported kinds, and later bytes with their offsets.
OTHERS: dict[str, tuple[bytes, ...]] = {
    "PostScript": (b"%!", b"\xc5\xd0\xd3\xc6"),
    "PDF": (b"%PDF",),
    "a Photoshop file (PSD)": (b"8BPS",),
    "a GIMP file (XCF)": (b"gimp xcf",),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "JPEG 2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "JPEG XR": (b"II\xbc\x01",),
    "an icon (ICO)": (b"\0\0\1\0",),
    "an icon (ICNS)": (b"icns",),
    "a texture (DDS)": (b"DDS ",),
    "QOI": (b"qoif",),
    "PCX": (b"\x0a\x05\x01",),
    "SGI": (b"\x01\xda",),
    "OpenEXR": (b"v/1\x01",),
    "Radiance HDR": (b"#?RADIANCE",),
    "FITS": (b"SIMPLE  =",),
    "HDF5": (b"\x89HDF",),
    "a NumPy array": (b"\x93NUMPY",),
    "a drawing (WMF)": (b"\xd7\xcd\xc6\x9a",),
    RAW: (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILM", b"FOVb"),
    FILM: (b"\x1aE\xdf\xa3", b"\0\0\1\xba"),
    "a ZIP archive": (b"PK\x03\x04",),
    "a RAR archive": (b"Rar!",),
    "a 7z archive": (b"7z\xbc\xaf",),
    "a gzip archive": (b"\x1f\x8b",),
    APPLE_DOUBLE: (b"\0\5\x16\7",),
    "a Windows or Office file": (b"\xd0\xcf\x11\xe0",),
    "a database": (b"SQLite format",),
    "a program": (b"\x7fELF", b"MZ"),
}
FARTHER = ((8, b"CR\x02", RAW), (8, b"AVI ", FILM), (128, b"DICM", "DICOM"), (257, b"ustar", "a tar archive"))
LFS, DRAWING, PAGE = "a Git LFS pointer", "a drawing (SVG)", "a web page (HTML)"
NO_IMAGES = (FILM, APPLE_DOUBLE, "a NumPy array", "a Windows or Office file", "a database", "a program")
REMEDIES = dict.fromkeys(NO_IMAGES, OUT) | {
    LFS: "fetch the file itself with git lfs pull",
    DRAWING: CONVERT,
    PAGE: "save the picture itself",
}
IS_RAW = f"it is {RAW}; {CONVERT}"


def format_of(head: bytes) -> str:
    """Return the format of a supported image from the file's first bytes; empty for anything else."""
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[place : place + 4] for place in range(16, end, 4))}
        if brands & AVIF_BRANDS:
            return "AVIF"
        return HEIC if brands & HEIF_BRANDS and b"crx " not in brands else ""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((name for name, starts in READ.items() if head.startswith(starts)), "")


def refusal(head: bytes, found: str, heif: bool = False) -> str | None:
    """Return why a file is rejected and what to do, from its first bytes and format, if any; None if it is accepted.

    HEIC is accepted if its reader is installed (`heif`).
    """
    if found == HEIC:
        return None if heif else NO_HEIF
    # A camera's raw file may look like a TIFF; and TGA has no signature.
    if found in ("", "TIFF", "TGA") and (name := _other(head)) is not None:
        remedy = "unpack it, or remove it" if name.endswith("archive") else REMEDIES.get(name, CONVERT)
        return f"it is {name}; {remedy}"
    if found:
        return None
    if not head:
        return f"it is empty; {REPLACE}"
    if not any(head):
        return f"it begins with zeros only, as an interrupted copy does; {REPLACE}"
    name = _text(head) or "of an unknown kind"
    return f"it is {name}; {REMEDIES.get(name, REPLACE)}"


def _other(head: bytes) -> str | None:
    if head[4:8] == b"ftyp" and not format_of(head):
        return RAW if head[8:12] == b"crx " else FILM
    inside = (name for place, start, name in FARTHER if head.startswith(start, place))
    return next(inside, next((name for name, starts in OTHERS.items() if head.startswith(starts)), None))


def _text(head: bytes) -> str | None:
    """Return the kind of text, None for binary."""
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
