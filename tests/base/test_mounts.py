"""Which file system a file lies on, by lists of mounts as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.base import mounts
from harness.base.mounts import file_system, network_of, warning
from harness.cli.commands import main
from harness.config import find as catalogue
from harness.store.opening import open_store

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 0 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 27 0:40 / /home rw,relatime shared:9 - autofs systemd-1 rw,fd=31
31 30 0:41 / /home rw,relatime shared:10 master:2 - nfs4 server:/export/home rw,vers=4.2
32 27 0:42 / /mnt/my\040share rw - cifs //server/my\040share rw
33 27 0:43 / /homework rw - xfs /dev/vdb rw
34 31 0:44 / /home/ann/local rw - tmpfs tmpfs rw
35 27 0:45 / /mnt/back\134slash rw - fuse.sshfs ann@host: rw
36 27 0:46 / /mnt/lustre rw - lustre 10.0.0.1@tcp:/scratch rw
37 27 0:47 / /mnt/b\303\266se rw - beegfs beegfs_nodev rw
38 27 0:48 / /mnt/apps rw - fuse.appimage app rw
no mount at all
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/studies/demo.db", "ext4"),
        ("/home/ann/studies/demo.db", "nfs4"),  # which hides the automounter
        ("/home/ann/local/demo.db", "tmpfs"),  # the longest place
        ("/homework/demo.db", "xfs"),  # begins with the name of another place
        ("/mnt/my share/demo.db", "cifs"),
        ("/mnt/back\\slash/demo.db", "fuse.sshfs"),
        ("/mnt/lustre", "lustre"),
        ("/mnt/böse/demo.db".encode().decode(errors="surrogateescape"), "beegfs"),
    ],
)
def test_the_longest_mount_decides(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTINFO) == kind


def test_without_a_fitting_mount_nothing_is_known() -> None:
    assert file_system(Path("/a"), "") is None
    assert file_system(Path("/a"), "31 30 0:41 / /home rw - nfs4 server:/ rw\n") is None


def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Path:
    """A folder that is said to be of this kind."""
    folder = tmp_path / "my share"
    folder.mkdir(exist_ok=True)
    place = str(folder.resolve()).replace(" ", "\\040")
    (tmp_path / "mountinfo").write_text(
        f"27 0 254:1 / / rw - ext4 /dev/vda1 rw\n31 27 0:41 / {place} rw - {kind} x rw\n"
    )
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
    return folder


NETWORK = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "fuse.sshfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "afs",
    "glusterfs",
    "fuse.glusterfs",
]


@pytest.mark.parametrize("kind", NETWORK)
def test_a_study_on_a_network_file_system_is_warned_of(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mounted(tmp_path, monkeypatch, kind)
    said = warning(folder / "demo.db")
    assert said is not None
    assert f"{folder / 'demo.db'} is on a network file system ({kind})" in said
    assert "local disk, or a PostgreSQL server" in said
    (tmp_path / "link").symlink_to(folder)
    assert network_of(tmp_path / "link" / "demo.db") == kind
    assert network_of(tmp_path / "demo.db") is None


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "fuseblk", "fuse.appimage"])
def test_a_local_disk_is_not(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert warning(mounted(tmp_path, monkeypatch, kind) / "demo.db") is None


def test_a_command_says_so_in_one_line_at_its_start(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mounted(workspace, monkeypatch, "nfs4")
    url = f"sqlite:///{folder}/demo.db"
    found = catalogue.find("demo")
    with open_store(found.study, url):
        pass
    # It is refused, but not for where the study lies.
    assert main(["run", "--study", "demo", "--storage", url, "--set", "epochs=5"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"Warning: {folder / 'demo.db'} is on a network file system (nfs4)")
    assert "epochs was 6, is 5" in second


def test_where_there_is_no_list_of_mounts_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "none")
    assert warning(tmp_path / "demo.db") is None
