"""The demo page in a real browser: a flower is named, a wrong file gets a sentence, nothing leaves the machine."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

import harness
from harness.base.words import percent
from harness.cli.commands import main
from harness.config.find import find
from harness.datasets.image_folder import ImageFolder
from harness.serving.demo_page import build_app, heading, note_of, uploaded, write_examples
from harness.serving.predict import Predictor, load_predictor
from tests.browser import page
from tests.cli.test_ui import answers, free_port
from tests.conftest import PROJECT
from tests.faulty import complete
from tests.patience import PATIENCE_SECONDS
from tests.refusal import assert_refused
from tests.small import study_in

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Path:
    """A folder with a finished study and one flower."""
    home = tmp_path_factory.mktemp("home")
    study, _ = study_in(home, image_cache)
    complete(study, home / "studies")
    data = study.train.data
    data.open(data.samples("test")[0][0]).save(home / "flower.png")
    return home


@pytest.fixture(scope="module")
def predictor(home: Path) -> Predictor:
    return load_predictor(find(str(home / "studies" / "tiny.py")), None, "cpu")


# The server's own process: it says on stderr whom it asks for an address, or calls, beyond this machine.
WATCHED = """
import sys

def watch(event, arguments):
    place = {"socket.connect": lambda: arguments[1], "socket.getaddrinfo": lambda: arguments[:2]}.get(event)
    if place and isinstance(place(), tuple) and place()[0] != "127.0.0.1":
        print("asked for", place(), file=sys.stderr)

sys.addaudithook(watch)
from harness.cli.commands import process
process(sys.argv[1:])
"""


def start(home: Path, port: int) -> subprocess.Popen[str]:
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[demo]"')
    temporary = home / "temporary"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED, "demo", "tiny", "--port", str(port)],
        cwd=home,
        env={
            **os.environ,
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(PROJECT),
        },  # the study's file imports these tests
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """The address of the page, served by the real command."""
    port = free_port()
    process = start(home, port)
    address = f"http://127.0.0.1:{port}/"
    try:
        assert answers(address, PATIENCE_SECONDS), process.stderr
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)


def submit(page: Page, file: Path | None) -> None:
    if file is not None:
        page.set_input_files("#photograph input[type=file]", file)
        page.wait_for_selector("#photograph img", state="attached")  # one that cannot be shown has no size
    page.get_by_role("button", name="Submit").click()


# -- in the browser ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flower_gets_its_likeliest_classes(url: str, home: Path, predictor: Predictor) -> None:
    guesses = predictor.guesses(predictor.photograph(home / "flower.png").unsqueeze(0), 5)[0]
    with page() as browser:
        browser.goto(url)
        submit(browser, home / "flower.png")
        browser.wait_for_selector("#answer .bar")
        shown = browser.inner_text("#answer")
        assert browser.locator("#answer .bar").count() == 5
    for guess in guesses:
        assert guess.name in shown
        assert f"{guess.probability:.0%}" in shown


@pytest.mark.slow
def test_an_example_can_be_chosen(url: str) -> None:
    with page() as browser:
        browser.goto(url)
        browser.locator("#examples button").first.click()
        browser.wait_for_selector("#photograph img")
        assert browser.locator("#examples button img").count() == 8
        submit(browser, None)
        browser.wait_for_selector("#answer .bar")


@pytest.mark.slow
def test_the_browser_asks_nobody_but_the_page_s_server(url: str, home: Path) -> None:
    asked: list[str] = []
    with page() as browser:
        browser.on("request", lambda request: asked.append(request.url))
        browser.goto(url, wait_until="load")
        submit(browser, home / "flower.png")
        browser.wait_for_selector("#answer .bar")
        browser.wait_for_load_state("networkidle")
    assert len(asked) > 5
    assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []


@pytest.mark.slow
def test_what_is_no_flower_gets_a_sentence(url: str, home: Path, tmp_path: Path) -> None:
    whole = (home / "flower.png").read_bytes()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "damaged.png").write_bytes(whole[: len(whole) // 2])
    header = struct.pack(">II", 60_000, 10_000)  # where a PNG says how large it is
    (tmp_path / "huge.png").write_bytes(
        whole[:16]
        + header
        + whole[24:29]
        + struct.pack(">I", zlib.crc32(whole[12:16] + header + whole[24:29]))
        + whole[33:]
    )
    Image.new("RGB", (1, 30_000)).save(tmp_path / "narrow.png")
    said = {
        "text.png": "cannot be read as an image",
        "damaged.png": "cannot be read as an image",
        "huge.png": "60000 x 10000 pixels",
        "narrow.png": "too narrow",
    }
    with page() as browser:
        browser.goto(url)
        submit(browser, None)
        browser.wait_for_selector("#note >> text=There is no image yet")
        for name, words in said.items():
            submit(browser, tmp_path / name)
            browser.wait_for_selector(f"#note >> text={words}")
            assert name in browser.inner_text("#note")
            assert str(tmp_path) not in browser.inner_text("#note")
            assert browser.locator("#answer .bar").count() == 0
            browser.get_by_role("button", name="Clear").click()
            browser.wait_for_selector("#photograph img", state="detached")
        submit(browser, home / "flower.png")
        browser.wait_for_selector("#answer .bar")
        assert browser.inner_text("#note") == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "words"),
    [("notes.txt", 10, "Only image/* allowed"), ("large.png", 53_000_000, "maximum allowed size of 50")],
)
def test_a_file_of_another_kind_or_too_large_is_refused_at_once(
    url: str, tmp_path: Path, name: str, size: int, words: str
) -> None:
    (tmp_path / name).write_bytes(bytes(size))
    with page() as browser:
        browser.goto(url)
        browser.set_input_files("#photograph input[type=file]", tmp_path / name)
        browser.get_by_text(words).wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_window(url: str, home: Path, width: int, dark: bool) -> None:
    with page(width=width, dark=dark) as browser:
        browser.goto(url)
        before = browser.locator("#photograph").bounding_box()
        submit(browser, home / "flower.png")
        browser.wait_for_selector("#answer .bar")
        assert browser.locator("#photograph").bounding_box() == before  # nothing jumps
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.evaluate("document.body.classList.contains('dark')") == dark


@pytest.mark.slow
def test_it_says_whose_number_it_gives_and_whether_the_model_was_trained_on_the_examples(predictor: Predictor) -> None:
    description = predictor.saved.description
    test = description["test"]
    assert f"from seed 0, it was right on {test['correct']} of the {test['total']} test images" in heading(description)
    assert f"({percent(test['accuracy'])})" in heading(description), "as in the card"
    assert "was trained on them too" in note_of(description)
    assert "was not trained on them." in note_of({**description, "fit_on": "train"})


@pytest.mark.slow
@pytest.mark.slow
def test_a_study_whose_images_are_not_here_has_a_page_without_examples(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = predictor.saved
    config = dataclasses.replace(saved.config, data=ImageFolder(root=str(tmp_path / "nowhere")))
    moved = Predictor(dataclasses.replace(saved, config=config), torch.device("cpu"))
    assert write_examples(moved, tmp_path) == []
    assert "The page shows no examples: There is no folder" in capsys.readouterr().err


# -- what its API answers for ----------------------------------------------------------------------------------------

ELSEWHERE = {
    "a URL": "{server}/rose.png",
    "a URL with a name": "http://rose.invalid/rose.png",
    "a file's URL": "file:///etc/hostname",
    "a file of the machine": "/etc/hostname",
    "a file above the folder": "{folder}/../secret.png",
    "a link out of the folder": "{folder}/link.png",
    "a file of the working directory": "secret.png",
    "a picture in the address": "data:image/png;base64,AAAA",
}


def test_a_file_s_place_is_looked_at_wherever_it_is_named(tmp_path: Path) -> None:
    inside = {"path": str(tmp_path / "a.png"), "meta": {"_type": "gradio.FileData"}}
    assert uploaded([inside, None, 3, {"path": None}, "text"], tmp_path)
    for place in ("http://rose.invalid/", "/etc/hostname", f"{tmp_path}/../a.png", f"{tmp_path}x/a.png", "a.png", 3):
        assert not uploaded([inside, {"files": [{"path": place}]}], tmp_path)


@pytest.fixture(scope="module")
def app(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The page as an application in this process, and its folder."""
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[demo]"')
    from fastapi.testclient import TestClient

    folder = tmp_path_factory.mktemp("page") / "folder"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", "")  # the page sets it; afterwards it is as before
        environment.setenv("GRADIO_ANALYTICS_ENABLED", "")
        with TestClient(build_app(predictor, folder)) as client:
            yield client, folder


def ask(client: Any, path: str) -> str:
    """What the page's API says about a file."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event = client.post("/gradio_api/call/answer", json={"data": [file]}).json()["event_id"]
    said: str = client.get(f"/gradio_api/call/answer/{event}").text
    return said


@pytest.mark.slow
@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_only_uploaded_files_are_answered(
    app: tuple[Any, Path], home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    client, folder = app
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    flower = (home / "flower.png").read_bytes()
    (folder.parent / "secret.png").write_bytes(flower)
    (folder / "link.png").unlink(missing_ok=True)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    monkeypatch.chdir(folder.parent)
    looked_up: list[str] = []
    real = socket.getaddrinfo
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *rest, **more: looked_up.append(host) or real(host, *rest))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = place.format(server=f"http://127.0.0.1:{server.server_port}", folder=folder)
        before = sorted(folder.rglob("*"))
        said = ask(client, path)
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
        server.shutdown()
    assert "event: error" in said
    assert "This page accepts uploaded files only." in said
    assert asked == looked_up == []
    assert sorted(folder.rglob("*")) == before, "it was copied"


@pytest.mark.slow
def test_an_uploaded_file_is_answered(app: tuple[Any, Path], home: Path, predictor: Predictor) -> None:
    client, folder = app
    files = {"files": ("flower.png", (home / "flower.png").read_bytes())}
    [path] = client.post("/gradio_api/upload", files=files).json()
    assert Path(path).is_relative_to(folder)
    said = ask(client, path)
    assert "event: complete" in said
    assert predictor.guesses(predictor.photograph(home / "flower.png").unsqueeze(0), 1)[0][0].name in said


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_of_the_machine_are_not_served(url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in ("/etc/passwd", "studies/tiny.db", "flower.png"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            direct.open(f"{url}gradio_api/file={path}", timeout=PATIENCE_SECONDS)
        assert refused.value.code in (403, 404)


@pytest.mark.slow
def test_ctrl_c_ends_it_quietly_and_it_called_nobody(home: Path) -> None:
    port = free_port()
    process = start(home, port)
    assert answers(f"http://127.0.0.1:{port}/", PATIENCE_SECONDS)
    with page() as browser:
        browser.goto(f"http://127.0.0.1:{port}/")  # keeps a connection open
        browser.get_by_role("button", name="Submit").wait_for()
        before = set((home / "temporary").iterdir())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert out == f"The page opens at http://127.0.0.1:{port} (Ctrl-C ends it).\n"
    assert err == "Interrupted.\n"
    assert len(before - set((home / "temporary").iterdir())) == 1


@pytest.mark.slow
def test_a_taken_port_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[demo]"')
    monkeypatch.chdir(home)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert_refused(home, capsys, ["demo", "tiny", "--port", port], ["give another --port"])


def test_without_gradio_a_sentence_says_how_to_get_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "tiny"]) == 2
    assert 'pip install -e ".[demo]"' in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_without_a_model_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[demo]"')
    monkeypatch.chdir(home)
    model = home / "studies" / "tiny.model"
    model.rename(model.with_name("aside"))
    try:
        assert_refused(home, capsys, ["demo", "tiny", "--port", str(free_port())], ["holds no model"])
    finally:
        model.with_name("aside").rename(model)


def test_it_says_that_its_weights_are_not_the_tested_ones(predictor: Predictor) -> None:
    retrained = {**predictor.saved.description, "weights": {"tested": False}}
    assert "retrained after the tested ones were lost" in heading(retrained)
    assert "retrained" not in heading(predictor.saved.description)


def test_images_that_are_not_on_this_machine_are_not_downloaded_for_examples(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.datasets.flowers102._download", pytest.fail)
    config = dataclasses.replace(predictor.saved.config, data=harness.Flowers102(root=str(tmp_path / "none")))
    there = Predictor(dataclasses.replace(predictor.saved, config=config), torch.device("cpu"))
    assert write_examples(there, tmp_path) == []
