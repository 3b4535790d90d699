"""Oxford Flowers-102: an answer at once when it is not there, and the official split when it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from harness.base.errors import InputError
from harness.datasets.flowers102 import Flowers102
from tests.conftest import PROJECT

SHARED = PROJECT.parent / "shared"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download goes to a port of this machine where nobody listens."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("offline")
@pytest.mark.timeout(60)
def test_a_missing_root_without_network_names_the_folder_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Flowers102(root=str(tmp_path / "nowhere")).samples("train")
    assert str(tmp_path / "nowhere" / "flowers-102") in str(caught.value)
    assert "--data-root" in str(caught.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.timeout(60)
def test_a_download_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    """As `InputError` promises: nothing has been written when it is raised."""
    with pytest.raises(InputError):
        Flowers102(root=str(tmp_path / "nowhere")).samples("train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
@pytest.mark.timeout(60)
def test_label_files_with_a_wrong_checksum_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for name in ("imagelabels.mat", "setid.mat"):
        (folder / name).write_bytes(b"not the published labels")
    with pytest.raises(InputError, match="md5"):
        Flowers102(root=str(tmp_path)).samples("train")


@pytest.mark.skipif(not (SHARED / "flowers-102").is_dir(), reason="Flowers-102 does not lie beside the project")
@pytest.mark.parametrize(("split", "count"), [("train", 1020), ("val", 1020), ("test", 6149)])
def test_the_official_split(split: str, count: int) -> None:
    data = Flowers102(root=str(SHARED))
    samples = data.samples(split)
    per_class = Counter(label for _, label in samples)
    assert len(samples) == count
    assert len(data.classes()) == 102
    assert sorted(per_class) == list(range(102))
    if split != "test":
        assert set(per_class.values()) == {10}


@pytest.mark.skipif(not (SHARED / "flowers-102").is_dir(), reason="Flowers-102 does not lie beside the project")
def test_the_official_splits_share_no_image_and_miss_none() -> None:
    data = Flowers102(root=str(SHARED))
    parts = [{path for path, _ in data.samples(split)} for split in ("train", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 8189
