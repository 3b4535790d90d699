"""docs/notebook.ipynb: its kernel is killed while a study runs, and the same cell goes on to the same result.

The demo that it runs has fewer images, epochs and final seeds here, for the time's sake.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from harness.base.errors import InputError
from harness.store.opening import read_store
from tests.conftest import PROJECT
from tests.patience import PATIENCE_SECONDS

NOTEBOOK = PROJECT / "docs" / "notebook.ipynb"


def client(folder: Path) -> NotebookClient:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})


@pytest.fixture
def kernels(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    file = workspace / "studies" / "demo.py"
    text = file.read_text(encoding="utf-8")
    for whole, less in (
        ("Garden(val_per_class=30)", "Garden(limit=64)"),
        ("epochs=6", "epochs=2"),
        ("seeds=3", "seeds=1, publish=False"),
    ):
        assert whole in text
        text = text.replace(whole, less)
    file.write_text(text, encoding="utf-8")
    return workspace


def kill_in_mid_study(running: NotebookClient, url: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        try:
            with read_store("demo", url) as store:
                if store.finished() >= 2:
                    os.kill(running.km.provisioner.process.pid, signal.SIGKILL)
                    return
        except InputError:
            pass  # it has not begun
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_killed_kernel_loses_nothing_and_the_notebook_comes_to_the_same_result(
    kernels: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = client(kernels)
    killer = threading.Thread(target=kill_in_mid_study, args=(first, f"sqlite:///{kernels}/studies/demo.db"))
    killer.start()
    with pytest.raises(DeadKernelError):
        first.execute()
    killer.join()

    second = client(kernels)
    second.execute()

    outputs = json.dumps([cell.get("outputs", []) for cell in second.nb.cells])
    assert "was interrupted" in outputs
    assert "Test accuracy" in outputs
    straight = tmp_path_factory.mktemp("straight")
    (straight / "studies").mkdir()
    shutil.copy(kernels / "studies" / "demo.py", straight / "studies")
    code = "import harness; print(harness.run('demo', trials=8, progress=False).digest())"
    done = subprocess.run([sys.executable, "-c", code], cwd=straight, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in outputs
