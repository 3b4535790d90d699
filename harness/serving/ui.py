"""MLflow's own pages of a study's runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from harness.base.errors import InputError
from harness.base.files import sqlite_path, sqlite_url
from harness.tracking.files import ARTIFACTS, move_in
from harness.tracking.places import local_uri, tracker_for


def serve_ui(folder: Path, tracking_uri: str | None, host: str, port: int) -> bool:
    """MLflow's pages of the runs in `folder`, or of a database, until they are ended; whether they ended well.

    Raises InputError when there are no runs, or nothing can listen there.
    """

    uri = tracking_uri or local_uri(folder)
    if not tracking_uri and not (folder / "mlflow.db").is_file():
        raise InputError(f"There are no runs yet ({folder / 'mlflow.db'} does not exist); run a study first.")
    if uri.startswith(("http://", "https://")):
        raise InputError(f"--tracking-uri {uri} is a server with pages of its own; open it in a browser.")
    file = sqlite_path(uri)
    if file is not None and not file.is_file():
        raise InputError(f"--tracking-uri {uri}: there is no such file; give the MLflow database of a study.")
    tracker = tracker_for(uri, folder)
    tracker.check()
    if file is not None:
        move_in(file, file.parent / ARTIFACTS)
    check_port(host, port)
    # Named from its own folder: MLflow would make one of an escaped path's letters.
    store = uri if file is None else sqlite_url(Path(file.name))
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store]
    address = f"http://{host}:{port}"
    print(f"The MLflow UI opens at {address} (Ctrl-C ends it).", flush=True)
    for name, path in tracker.pages():  # the UI itself opens a study on its traces, of which there are none
        print(f"{name:<9} {address}/{path}", flush=True)
    # A session of its own: MLflow's servers have workers, and all of them should go when this process does.
    server = subprocess.Popen(
        [*command, "--host", host, "--port", str(port)],
        start_new_session=True,
        cwd=None if file is None else file.parent,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # its libraries' deprecations are no news to a user
    )
    try:
        return server.wait() == 0
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def check_port(host: str, port: int) -> None:
    """Raise InputError when nothing can listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"Nothing can listen at {host}:{port} ({error}); give another --port or --host.") from error
