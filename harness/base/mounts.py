"""Detect network file systems: SQLite's locks and shared memory work on local disks only."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
# Linux's names, without the prefix `fuse.`; the last four are a host's folders in a virtual machine.
NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "coda", "sshfs", "davfs", "davfs2", "s3fs", "gcsfuse", "rclone"),
    *("lustre", "gpfs", "beegfs", "fhgfs", "ceph", "ceph-fuse", "cephfs", "glusterfs", "orangefs", "pvfs2", "panfs"),
    *("wekafs", "juicefs", "mfs", "moosefs", "seaweedfs", "ocfs2", "gfs2", "goofys", "mount-s3", "blobfuse2"),
    *("9p", "virtiofs", "vboxsf", "vmhgfs-fuse"),
}


def file_system(path: Path, mountinfo: str) -> str | None:
    """Return the file system type of an absolute path from the kernel's list of mounts; None if unknown."""
    found: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        place = Path(_unescaped(fields[4]))
        # A later mount hides an earlier one on the same path, such as an automounter's.
        if path.is_relative_to(place) and (found is None or len(place.parts) >= found[0]):
            found = len(place.parts), _unescaped(after.split(" ")[0])
    return None if found is None else found[1]


def network_of(path: Path) -> str | None:
    """Return the file system type of a path, which need not exist, if it is a network one; else None."""
    try:
        mountinfo = os.fsdecode(MOUNTS.read_bytes())
    except OSError:  # not Linux
        return None
    kind = file_system(path.resolve(), mountinfo)
    return kind if kind is not None and kind.removeprefix("fuse.") in NETWORK else None


def warning(file: Path | None) -> str | None:
    """Return a warning if a study in this SQLite file may lose results, with what to do; else None."""
    kind = None if file is None else network_of(file)
    if kind is None:
        return None
    return (
        f"{file} is on a network file system ({kind}), where SQLite's locks may fail and results may be lost; "
        "give --storage sqlite:////LOCAL/PATH.db on a local disk, or a PostgreSQL server for several machines."
    )


def _unescaped(text: str) -> str:
    r"""Decode the kernel's octal escapes, such as \040 for a space."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), os.fsencode(text)))
