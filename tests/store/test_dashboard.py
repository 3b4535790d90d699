"""Optuna's own dashboard on a study: it shows the learning curves, and does not disturb a study that runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.data.augment import IMAGENET
from harness.data.splits import prepare
from harness.report.overview import digest
from harness.store.opening import open_store, read_store
from tests import browser
from tests.analytic import run_analytic
from tests.cli.test_ui import answers, free_port
from tests.final.test_audit import place_of, run_to_the_end
from tests.forked import Process
from tests.patience import PATIENCE_SECONDS
from tests.small import study_in

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow
# The traces of the plot under "Intermediate values": {"trial #0": {"1": 0.4, "2": 0.5}, ...}
CURVES = """
() => Object.fromEntries(
    [...document.querySelectorAll(".js-plotly-plot")].flatMap(plot => plot.data)
    .filter(trace => (trace.name || "").startsWith("trial #"))
    .map(trace => [trace.name.trim(), Object.fromEntries([...trace.x].map((step, place) => [step, trace.y[place]]))])
)
"""


@contextmanager
def dashboard(url: str, folder: Path) -> Iterator[str]:
    """`optuna-dashboard URL`, as a user starts it; yields its address. Skips the test where it is missing."""
    program = shutil.which("optuna-dashboard", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip('no optuna-dashboard; pip install -e ".[test]"')
    port = free_port()
    with (folder / "dashboard.txt").open("wb") as said:
        process = subprocess.Popen([program, url, "--port", str(port)], stdout=said, stderr=said)
    address = f"http://127.0.0.1:{port}"
    try:
        assert answers(f"{address}/dashboard/", PATIENCE_SECONDS), (folder / "dashboard.txt").read_text()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=PATIENCE_SECONDS)


def curves(page: Page) -> dict[str, Any]:
    """The learning curves on the study's page, by trial, once they are drawn."""
    page.wait_for_function(
        f"() => Object.keys(({CURVES})()).length > 0",
    )
    found: dict[str, Any] = page.evaluate(CURVES)
    return found


def test_the_dashboard_shows_every_learning_curve(tmp_path: Path, image_cache: Path) -> None:
    study, url = study_in(tmp_path, image_cache)
    with open_store(study, url) as store:
        run_analytic(study, store, 12)
        before = digest(store)
        expected = {
            f"trial #{trial.number}": {str(epoch): value for epoch, value in trial.curve.items()}
            for trial in store.trials()
            if trial.state != "failed"
        }
    assert len(expected) == 12
    with dashboard(url, tmp_path) as address, browser.page() as page:
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{address}/dashboard/")
        page.get_by_text("tiny").first.click()
        assert curves(page) == expected
        assert faults == []
    with read_store("tiny", url) as store:
        assert digest(store) == before


def test_a_study_that_runs_is_not_disturbed(tmp_path: Path, image_cache: Path) -> None:
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    for folder in (alone, watched):
        folder.mkdir()
        study = place_of(folder, image_cache)
    run_to_the_end(study, alone)
    url = f"sqlite:///{watched}/studies/tiny.db"
    content = {"data": prepare(study.train.data, IMAGENET), "weights": study.train.backbone.fingerprint()}
    with open_store(study, url, content):
        pass  # the dashboard wants a database that is there
    with dashboard(url, tmp_path) as address, browser.page() as page:
        page.goto(f"{address}/dashboard/studies/1")
        page.get_by_text("tiny (id=1)").wait_for()
        run = Process(["-m", "harness", "run", "--study", "tiny"], cwd=watched)
        seen = set()
        while run.poll() is None:  # what the page asks for every few seconds, and much more often
            answer = page.request.get(f"{address}/api/studies/1")
            assert answer.ok, answer.text()
            seen.add(len(answer.json()["trials"]))
        said, _ = run.communicate()
        page.reload()
        assert len(curves(page)) == study.trials
    assert run.returncode == 0, said
    assert "locked" not in said
    assert len(seen) > 2, "it was watched while trials came"
    digests = []
    for folder in (alone, watched):
        with read_store("tiny", f"sqlite:///{folder}/studies/tiny.db") as store:
            digests.append(digest(store))
    assert digests[0] == digests[1]
