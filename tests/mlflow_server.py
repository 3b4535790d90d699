"""An MLflow server that can be killed, halted and cut off in the middle of an answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.patience import PATIENCE_SECONDS


class Server:
    """`mlflow server` in a process group of its own, so that all of it can be killed or halted."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        """`database` is the URL of an empty one; without it a SQLite file is made in `folder`."""
        self.folder = folder
        self._database = database or f"sqlite:///{folder / 'mlflow.db'}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "backend-store-uri": self._database,
            "artifacts-destination": str(self.folder / "artifacts"),
            "host": "127.0.0.1",
            "port": str(self.port),
            "workers": "1",
        }
        command = [sys.executable, "-m", "mlflow", "server", *(f"--{key}={value}" for key, value in options.items())]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(timeout=PATIENCE_SECONDS)


class Proxy:
    """A connection to the server that can fail in the middle: lose answers, or deliver a request when nobody waits."""

    def __init__(self, server: Server) -> None:
        self.lost = 0  # answers still to be lost
        self.late = 0  # requests still to be delivered late
        self._target = ("127.0.0.1", server.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.deliveries: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as target:
            while request := _message(client):
                if self.late:
                    self.late -= 1
                    self.deliveries.append(threading.Thread(target=self._deliver, args=(request,), daemon=True))
                    client.recv(1)  # until it has given up
                    return
                target.sendall(request)
                answer = _message(target)
                if self.lost:
                    self.lost -= 1
                    return
                client.sendall(answer)

    def _deliver(self, request: bytes) -> None:
        with socket.create_connection(self._target) as target:
            target.sendall(request)
            _message(target)


def _message(connection: socket.socket) -> bytes:
    """The next whole request or answer on a connection; empty when it was closed."""
    content = b""
    while b"\r\n\r\n" not in content:
        if not (part := connection.recv(1 << 20)):
            return b""
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    length = next((int(each.split(b":")[1]) for each in head.lower().split(b"\r\n") if b"content-length:" in each), 0)
    while len(body) < length:
        body += connection.recv(1 << 20)
    return head + b"\r\n\r\n" + body
