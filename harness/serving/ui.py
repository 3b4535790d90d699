"""Serve MLflow's UI for the logged runs."""

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
    """Serve MLflow's UI for the runs in `folder`, or of a database, until it ends; return whether it ended well.

    Raises InputError if there are no runs, or the port is not available.
    """
    uri = tracking_uri or local_uri(folder)
    if not tracking_uri and not (folder / "mlflow.db").is_file():
        raise InputError(f"There are no runs yet ({folder / 'mlflow.db'} does not exist); run a study first.")
    if uri.startswith(("http://", "https://")):
        raise InputError(f"--tracking-uri {uri} is a server with its own UI; open it in a browser.")
    file = sqlite_path(uri)
    if file is not None and not file.is_file():
        raise InputError(f"--tracking-uri {uri}: there is no such file; give the MLflow database of a study.")
    tracker = tracker_for(uri, folder)
    tracker.check()
    if file is not None:
        move_in(file, file.parent / ARTIFACTS)
    check_port(host, port)
    # A path relative to its folder: MLflow would create a folder named like an escaped path.
    store = uri if file is None else sqlite_url(Path(file.name))
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", host, "--port", str(port)]
    address = f"http://{host}:{port}"
    print(f"The MLflow UI opens at {address} (Ctrl-C ends it).", flush=True)
    for name, path in tracker.pages():  # the UI's own links open a study's traces, which are empty
        print(f"{name:<9} {address}/{path}", flush=True)
    # In a new session, so that MLflow's server and its workers can be stopped together.
    server = subprocess.Popen(
        command,
        start_new_session=True,
        cwd=None if file is None else file.parent,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # hide its libraries' deprecation warnings
    )
    try:
        return server.wait() == 0
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def check_port(host: str, port: int) -> None:
    """Raise InputError if the port is not available."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"Cannot listen at {host}:{port} ({error}); give another --port or --host.") from error
