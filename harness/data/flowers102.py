"""Oxford Flowers-102 (Nilsback and Zisserman, 2008) through torchvision's own class, official split."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.config import SplitName, location
from harness.data.cache import ImageFiles
from harness.data.garden import check_sizes
from harness.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Flowers102(ImageFiles):
    """8,189 photographs of 102 species: 1,020 to train on, 1,020 to validate on, 6,149 to test on.

    `root` is the folder that holds torchvision's `flowers-102`; what is missing is downloaded and checked by its md5.
    """

    root: str = location("data")
    image_size: int = 224
    stored_size: int = 256
    limit: int | None = None  # at most that many images per split, spread over the classes
    cache: str = location("data/cache")

    def __post_init__(self) -> None:
        check_sizes(self.image_size, self.stored_size, self.limit)

    def classes(self) -> tuple[str, ...]:
        from torchvision.datasets import Flowers102 as Source

        return tuple(Source.classes)

    def samples(self, split: SplitName) -> list[tuple[Path, int]]:
        """Raises InputError when the data are not there and cannot be downloaded, or a file is missing."""
        samples = _listing(self.root, split)
        for path, _ in samples:
            if not path.is_file():
                raise InputError(f"{path} is missing; remove {path.parent.parent} and let it be downloaded again.")
        return samples


@cache
def _listing(root: str, split: SplitName) -> list[tuple[Path, int]]:
    from torchvision.datasets import Flowers102 as Source

    folder = Path(root) / "flowers-102"
    absent = [place for place in (folder, folder.parent) if not place.exists()]
    try:
        source = Source(root, split, download=not _complete(folder))
    except (OSError, RuntimeError) as error:
        for place in absent:  # torchvision makes them before it downloads
            with contextlib.suppress(OSError):
                place.rmdir()
        raise InputError(
            f"{folder} does not hold Oxford Flowers-102 (jpg/, imagelabels.mat and setid.mat with their published "
            f"md5) and it cannot be downloaded ({error}); give the folder above flowers-102 with --data-root."
        ) from error
    return list(zip(source._image_files, source._labels, strict=True))


def _complete(folder: Path) -> bool:
    """Whether torchvision would find its files; it also checks the label files' md5 and fetches wrong ones again."""
    return (folder / "jpg").is_dir() and all((folder / name).is_file() for name in ("imagelabels.mat", "setid.mat"))
