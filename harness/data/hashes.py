"""The contents of files by their sha256, read once: what is known is kept beside the decoded images."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.data.cache import WORKERS
from harness.errors import Halt
from harness.files import replace_file

SHA256 = re.compile("[0-9a-f]{64}")


def content_hashes(stamps: Mapping[Path, str], kept: Path) -> dict[Path, str]:
    """The sha256 of every file, given a mark that changes when the file does; read if `kept` does not know the mark."""
    known = _read(kept)
    unread = [file for file, stamp in stamps.items() if stamp not in known]
    with ThreadPoolExecutor(WORKERS) as pool:
        known |= zip((stamps[file] for file in unread), pool.map(_sha256, unread), strict=True)
    if unread:
        content = json.dumps({stamp: known[stamp] for stamp in stamps.values()}).encode()
        with contextlib.suppress(Halt):  # where nothing can be written, the files are read every time
            replace_file(kept, content)
    return {file: known[stamp] for file, stamp in stamps.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(kept: Path) -> dict[str, str]:
    """What a file of hashes says; nothing when it is not there, or no such file."""
    try:
        known = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {stamp: digest for stamp, digest in known.items() if SHA256.fullmatch(str(digest))}
