"""Oxford Flowers-102 (Nilsback and Zisserman, 2008) through torchvision's own class, official split."""

from __future__ import annotations

import contextlib
import re
import shutil
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from harness.base.errors import InputError
from harness.config.contracts import SplitName
from harness.data.cache import ImageFiles

PHOTOGRAPH = re.compile(r"jpg/image_[0-9]{5}\.jpg")


@dataclass(frozen=True, kw_only=True)
class Flowers102(ImageFiles):
    """8,189 photographs of 102 species: 1,020 for training, 1,020 for validation, 6,149 for testing.

    `root` is the folder that holds torchvision's `flowers-102`; missing files are downloaded and checked by md5.
    """

    licence: ClassVar[str] = (
        "Photographs collected by Nilsback and Zisserman (2008) from the web and from their own; they have no clear "
        "licence and are for research."
    )

    def classes(self) -> tuple[str, ...]:
        from torchvision.datasets import Flowers102 as Source

        return tuple(Source.classes)

    def is_here(self) -> bool:
        return _complete(Path(self.root) / "flowers-102")

    def samples(self, split: SplitName) -> list[tuple[Path, int]]:
        """Return a split. Raises InputError if the data cannot be downloaded or a file is missing."""
        samples = _listing(self.root, split)
        for path, _ in samples:
            if not path.is_file():
                raise InputError(f"{path} is missing; remove {path.parent.parent} to download it again.")
        return samples


@cache
def _listing(root: str, split: SplitName) -> list[tuple[Path, int]]:
    from torchvision.datasets import Flowers102 as Source

    folder = Path(root) / "flowers-102"
    absent = [place for place in (folder, folder.parent) if not place.exists()]
    try:
        if not _complete(folder):
            _download(folder)
        source = Source(root, split)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        for place in absent:  # created before the download
            with contextlib.suppress(OSError):
                place.rmdir()
        raise InputError(
            f"{folder} does not hold Oxford Flowers-102 (jpg/, imagelabels.mat and setid.mat with their published "
            f"md5) and it cannot be downloaded ({error}); give the folder above flowers-102 with --data-root."
        ) from error
    return list(zip(source._image_files, source._labels, strict=True))


def _complete(folder: Path) -> bool:
    """Return whether torchvision finds its files; it also checks the label files' md5 and refetches wrong ones."""
    return (folder / "jpg").is_dir() and all((folder / name).is_file() for name in ("imagelabels.mat", "setid.mat"))


def _download(folder: Path) -> None:
    """Download what torchvision's class would, checked by md5; the label files come last."""
    from torchvision.datasets import Flowers102 as Source
    from torchvision.datasets.utils import download_url

    for kind in ("image", "label", "setid"):
        name, md5 = Source._file_dict[kind]
        download_url(Source._download_url_prefix + name, str(folder), md5=md5)
        if kind == "image":
            _unpack(folder / name)


def _unpack(archive: Path) -> None:
    """Extract an archive's photographs beside it, and nothing else.

    Not `extractall`: in some versions of Python and torchvision, it follows a member's path and links out of the
    folder.
    """
    (archive.parent / "jpg").mkdir(exist_ok=True)
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member) if member.isfile() and PHOTOGRAPH.fullmatch(member.name) else None
            if content is not None:
                with (archive.parent / member.name).open("wb") as file:
                    shutil.copyfileobj(content, file)
