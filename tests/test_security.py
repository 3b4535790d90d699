"""Nothing that is read executes, nothing leaves the machine, and files from outside stay within their bounds."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from scipy.io import savemat
from torchvision.datasets import Flowers102 as Source

from harness.base.errors import InputError
from harness.base.files import Damaged
from harness.cli.arguments import build_parser
from harness.config.contracts import Square
from harness.config.study import Study
from harness.data.cache import ImageFiles
from harness.data.decoding import MAX_PIXELS, open_image
from harness.datasets.flowers102 import Flowers102, _unpack
from harness.models import maxvit
from harness.store.database import check_database
from harness.training.checkpoint import read_tensors
from tests.conftest import PROJECT
from tests.data.arrays import decoded
from tests.small import study_in
from tests.training.test_checkpoint import fresh

CODE = [
    *sorted((PROJECT / "harness").rglob("*.py")),
    *sorted((PROJECT / "studies").glob("*.py")),
    PROJECT / "run_study.py",
]

# --- what the code does not do ---

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
# Calls that are harmless with one setting only.
NEEDED = {
    "torch.load": ("weights_only", True),
    "get_state_dict": ("weights_only", True),
    "load_state_dict_from_url": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
EXTRACTORS = {"extractall", "extract", "unpack_archive", "extract_archive", "download_and_extract_archive"}


def dangers(source: str) -> list[str]:
    """What a file does that could execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(node.module or "")
        if isinstance(node, ast.Call):
            found += _of_call(node)
    return found


def _of_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    last = name.rsplit(".", 1)[-1]
    settings = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
    found = [name] if name in BUILTINS | SHELLS or last in EXTRACTORS else []
    if last in ("load", "load_all", "unsafe_load") and name.split(".")[0] == "yaml":
        found.append(name)
    if settings.get("shell", False) is not False:
        found.append(f"{name}(shell=...)")
    for called, (setting, value) in NEEDED.items():
        if called in (name, last) and settings.get(setting) is not value:
            found.append(f"{name} without {setting}={value}")
    return found


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(PROJECT)))
def test_no_file_executes_what_it_reads(file: Path) -> None:
    assert dangers(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import dill as d",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "weights.get_state_dict(progress=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "os.system(text)",
        "archive.extractall(folder)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert len(dangers(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "torch.load(p, weights_only=True)", "loader.exec_module(m)", "json.load(f)", "re.compile(p)"],
)
def test_the_scan_lets_through_what_is_harmless(source: str) -> None:
    assert dangers(source) == []


def test_the_pages_of_mlflow_are_for_this_machine_alone_unless_told_otherwise() -> None:
    assert build_parser("python -m harness").parse_args(["ui"]).host == "127.0.0.1"


# --- pickles in the place of our files ---


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(params=["pickle", "torch.save", "npy"])
def bomb(request: pytest.FixtureRequest, trace: Path) -> bytes:
    """A crafted file that executes when it is unpickled, as each of the usual writers makes one."""
    file = io.BytesIO()
    if request.param == "pickle":
        pickle.dump(Bomb(trace), file)
    elif request.param == "torch.save":
        torch.save({"model": Bomb(trace)}, file)
    else:
        np.save(file, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    return file.getvalue()


def test_the_crafted_pickle_would_execute(trace: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(trace)))  # noqa: S301
    assert trace.exists()


def test_a_pickle_as_a_checkpoint_is_damaged(
    bomb: bytes, trace: Path, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trial-0.safetensors"
    path.write_bytes(bomb)
    with pytest.raises(Damaged):
        read_tensors(path)
    assert not fresh(path, study.train).restore()
    assert "is damaged" in capsys.readouterr().err
    assert not trace.exists()


@dataclass(frozen=True, kw_only=True)
class Photos(ImageFiles):
    cache: str


def test_a_pickle_as_an_image_cache_is_made_again(
    bomb: bytes, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    photos: Any = Photos(cache=str(tmp_path / "cache"))
    before = np.array(decoded(photos, [tmp_path / "a.png"], Square(4, 4)))
    (array,) = (tmp_path / "cache").glob("*.npy")
    array.write_bytes(bomb)
    # Whoever can write the array can write its checksum too.
    array.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(bomb).hexdigest()}))
    assert np.array_equal(decoded(photos, [tmp_path / "a.png"], Square(4, 4)), before)
    assert "rebuilding it" in capsys.readouterr().err
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_as_pretrained_weights_is_refused(
    bomb: bytes, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "maxvit_t-bc5ab103.pth").write_bytes(bomb)
    with pytest.raises(InputError, match="damaged"):
        maxvit.MaxViTT().check(224)
    for backbone, size in ((maxvit.MaxViTT, 224), (maxvit.TinyMaxViT, 64)):
        with pytest.raises(InputError, match="is not a file of weights"):
            backbone(weights=str(tmp_path / "checkpoints" / "maxvit_t-bc5ab103.pth")).build(16, size)
    assert not trace.exists()


def test_a_pickle_as_a_study_is_refused(bomb: bytes, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(bomb)
    with pytest.raises(InputError, match="cannot be opened"):
        check_database(f"sqlite:///{tmp_path}/a.db")
    assert not trace.exists()


# --- images that claim too much ---


def png(path: Path, width: int, height: int, whole: bool = False) -> Path:
    """A PNG of one bit a pixel with these sides; without its data it is a hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes((-(-width // 8) + 1) * height) if whole else b"", 1))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (30000, 20000), (25001, 20000)])
def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    def decode(*args: Any) -> None:
        raise AssertionError("it is decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(InputError) as caught:
        open_image(png(tmp_path / "bomb.png", width, height))
    assert str(tmp_path / "bomb.png") in str(caught.value)
    assert "pixels" in str(caught.value)


def test_refusing_a_whole_bomb_takes_no_memory(tmp_path: Path) -> None:
    path = png(tmp_path / "bomb.png", 26000, 20000, whole=True)
    assert path.stat().st_size < 1_000_000
    code = (
        "import pathlib, resource, sys\n"
        "from harness.data.decoding import open_image\n"
        "from harness.base.errors import InputError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try:\n    open_image(pathlib.Path(sys.argv[1]))\n"
        "except InputError as error:\n    print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 50_000_000
    assert "Warning" not in done.stderr


def test_an_image_at_the_bound_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PIXELS == 500_000_000
    monkeypatch.setattr("harness.data.decoding.MAX_PIXELS", 12)
    assert open_image(png(tmp_path / "a.png", 4, 3, whole=True)).size == (4, 3)
    with pytest.raises(InputError, match="13 x 1 pixels"):
        open_image(png(tmp_path / "b.png", 13, 1, whole=True))


# --- archives that reach out ---


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The photographs' archive with every trick: ways up, absolute ways, links out and writing through them."""
    folder = tmp_path / "root" / "flowers-102"
    folder.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as made:

        def add(name: str, kind: bytes = tarfile.REGTYPE, to: str = "", content: bytes = b"evil") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, to
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            member.mode = 0o7777
            made.addfile(member, io.BytesIO(content) if kind == tarfile.REGTYPE else None)

        add("jpg", tarfile.DIRTYPE)
        add("jpg/image_00001.jpg", content=b"one")
        add("../escaped")
        add("jpg/../../../escaped")
        add(str(tmp_path / "outside" / "absolute"))
        add("jpg/image_00003.jpg", tarfile.SYMTYPE, to=str(tmp_path / "outside" / "through"))
        add("jpg/image_00004.jpg", tarfile.LNKTYPE, to="../../secret")
        add("jpg/out", tarfile.SYMTYPE, to=str(tmp_path / "outside"))
        add("jpg/out/through")
        add("jpg/image_00003.jpg", content=b"three")
        add("jpg/image_00005.jpg", tarfile.FIFOTYPE)
        add("jpg/image_00002.jpg", content=b"two")
        add("setid.mat")
    (tmp_path / "secret").write_text("secret")
    return folder / "102flowers.tgz"


def written(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}


def test_of_an_archive_only_photographs_are_written_and_only_in_their_folder(archive: Path, tmp_path: Path) -> None:
    before = written(tmp_path)
    _unpack(archive)
    inside = {f"root/flowers-102/jpg/image_0000{number}.jpg" for number in (1, 2, 3)}
    after = written(tmp_path)
    assert after.keys() - before.keys() == inside
    assert {name: after[name] for name in before} == before
    assert [after[name] for name in sorted(inside)] == [b"one", b"two", b"three"]
    assert not [each for each in tmp_path.rglob("*") if each.is_symlink()]
    assert not (tmp_path / "root/flowers-102/jpg/image_00001.jpg").stat().st_mode & 0o7000


@pytest.fixture
def published(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The crafted archive as if its authors had published it, with labels for two photographs; returns the root."""
    folder = archive.parent
    labels, splits = folder / "imagelabels.mat", folder / "setid.mat"
    savemat(labels, {"labels": np.array([[1, 2]])})
    savemat(splits, {"trnid": np.array([[1, 2]]), "valid": np.array([[1, 2]]), "tstid": np.array([[1, 2]])})
    files = dict(zip(("image", "label", "setid"), (archive, labels, splits), strict=True))
    known = {kind: (file.name, hashlib.md5(file.read_bytes()).hexdigest()) for kind, file in files.items()}
    monkeypatch.setattr(Source, "_file_dict", known)
    return folder.parent


def test_a_crafted_archive_gives_its_photographs_to_the_data_set_and_nothing_else(
    published: Path, tmp_path: Path
) -> None:
    samples = Flowers102(root=str(published)).samples("train")
    assert [(path.name, label) for path, label in samples] == [("image_00001.jpg", 0), ("image_00002.jpg", 1)]
    assert written(tmp_path).keys().isdisjoint({"escaped", "outside/absolute", "outside/through"})


def test_an_archive_that_is_none_is_wrong_input(
    published: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.write_bytes(b"no archive at all")
    known = Source._file_dict | {"image": (archive.name, hashlib.md5(archive.read_bytes()).hexdigest())}
    monkeypatch.setattr(Source, "_file_dict", known)
    with pytest.raises(InputError, match="cannot be downloaded"):
        Flowers102(root=str(published)).samples("val")


# --- the network ---

OFFLINE = """
import socket, sys

attempts = []

def guarded(real):
    def connect(self, address):
        host = address[0] if isinstance(address, tuple) else "unix"
        if host not in ("127.0.0.1", "::1", "localhost", "unix"):
            attempts.append(address)
            raise OSError("no network")
        return real(self, address)
    return connect

def look_up(host, *args, real=socket.getaddrinfo, **kwargs):
    if host not in ("127.0.0.1", "::1", "localhost", None):
        attempts.append(host)
        raise socket.gaierror("no network")
    return real(host, *args, **kwargs)

socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
socket.getaddrinfo = look_up

import harness
from harness.cli.commands import main
code = main(sys.argv[1:], "python -m harness")
import threading
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join(5)
print("ATTEMPTS", attempts)
sys.exit(code)
"""


@pytest.fixture
def place(tmp_path: Path, image_cache: Path, empty_mlflow: Path) -> Path:
    study_in(tmp_path, image_cache)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_mlflow, tmp_path / "mlruns" / "mlflow.db")
    return tmp_path


@pytest.mark.slow
def test_a_whole_study_makes_no_connection(place: Path) -> None:
    command = [sys.executable, "-c", OFFLINE, "run", "--study", "tiny", "--trials", "1", "--set", "epochs=1"]
    path = {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=place, env=os.environ | path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ATTEMPTS []"
    assert "Test accuracy" in done.stdout
