"""Load a model that MLflow keeps in a process without this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from harness.tracking.library import StoreFault

CHECK_SECONDS = 600
NO_VERDICT = ("ModuleNotFoundError", "No space left on device", "MemoryError")  # of a traceback's last line

# It waits for the paths with MLflow's libraries imported, and what torch imports to read a first program. It ends with
# the process that asks.
SCRIPT = """
import io
import json
import os
import sys

import mlflow.pyfunc
import mlflow.pytorch
import numpy
import torch

file = io.BytesIO()
torch.export.save(torch.export.export(torch.nn.Flatten(), (torch.zeros(2, 1),)), file)
torch.export.load(file).module()

model, images, logits = json.loads(sys.stdin.readline())
numpy.save(logits, mlflow.pyfunc.load_model(model).predict(numpy.load(images, allow_pickle=False)))
os._exit(0)  # taking the libraries down would take as long as reading the model
"""


class Checker:
    """A process that computes a model's logits, once; it imports its libraries beside what is done in between.

    A context manager.
    """

    def __enter__(self) -> Checker:
        # MLflow would load a CPU model on the first GPU; and only tensors may be unpickled.
        settings = {"MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SCRIPT],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def lives(self) -> bool:
        return self._process.poll() is None

    def logits(self, model: Path, images: NDArray[Any]) -> NDArray[Any] | str:
        """Return the logits of standardised images; or, as a clause, why there are none.

        Raises StoreFault if the process was killed, found no room or lacks a package: the model may be good.
        """
        with tempfile.TemporaryDirectory() as place:
            given, found = Path(place) / "images.npy", Path(place) / "logits.npy"
            numpy.save(given, images)
            try:
                asked = json.dumps([str(model), str(given), str(found)])
                _, errors = self._process.communicate(asked, timeout=CHECK_SECONDS)
            except subprocess.TimeoutExpired:
                raise StoreFault(f"the process that checked it did not answer within {CHECK_SECONDS} s") from None
            if self._process.returncode < 0:
                raise StoreFault(f"the process that checked it was ended by signal {-self._process.returncode}")
            if self._process.returncode != 0:
                why = (errors.strip() or "no reason given").splitlines()[-1]
                if any(word in why for word in NO_VERDICT):
                    raise StoreFault(f"the process that checked it failed: {why}")
                return f"cannot be loaded ({why})"
            logits: NDArray[Any] = numpy.load(found, allow_pickle=False)
            return logits
