"""`python -m harness ui`: the real MLflow server, and what stands in its way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from harness.cli.commands import main
from harness.tracking.client import EXPERIMENT, VIEW, VIEW_TAG, view_of
from harness.tracking.places import local_tracker
from tests.browser import page
from tests.conftest import make_study
from tests.patience import PATIENCE_SECONDS
from tests.refusal import assert_refused


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize("port", ["99999", "-5", "0", "nan", "9" * 5000, "80.0"])
def test_a_port_that_does_not_exist_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert_refused(workspace, capsys, ["ui", "--port", port], ["argument --port", "of at least 1 and at most 65,535"])


@pytest.mark.slow
def test_a_taken_port_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local_tracker(workspace / "mlruns")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert main(["ui", "--port", str(server.getsockname()[1])]) == 2
    assert "give another --port" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["ui"], ["demo", "demo"]])
def test_an_empty_host_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """A socket takes it for every address of the machine."""
    assert_refused(workspace, capsys, [*command, "--host", ""], ["argument --host", "it is empty"])


@pytest.mark.slow
def test_the_page_answers_on_this_machine_and_goes_with_the_command(workspace: Path) -> None:
    tracker = local_tracker(workspace / "mlruns")
    tracker.check()
    number = tracker.client.create_experiment("demo", tags=EXPERIMENT)
    run = tracker.client.create_run(number, run_name="a trial of it").info.run_id
    tracker.client.log_metric(run, "val_accuracy", 0.5)
    tracker.client.log_param(run, "optim.base_lr", "0.1")
    tracker.client.set_experiment_tag(number, VIEW_TAG, view_of(make_study(workspace)))
    port = free_port()
    command = [sys.executable, "-m", "harness", "ui", "--port", str(port)]
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}/"
    opened = f"#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    try:
        assert answers(url, PATIENCE_SECONDS)
        with page() as browser:
            browser.goto(f"{url}{opened}")
            for text in ("a trial of it", "val_accuracy", "optim.base_lr"):
                browser.get_by_text(text).first.wait_for(timeout=1000 * PATIENCE_SECONDS)
    finally:
        os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert f"demo      {url}{opened}\n" in said
    assert not answers(url, seconds=0)


def answers(url: str, seconds: float) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not through the environment's proxy
    deadline = time.monotonic() + seconds
    while True:
        try:
            with direct.open(url, timeout=PATIENCE_SECONDS) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
