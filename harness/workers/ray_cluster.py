"""Join a Ray cluster, and compute each worker's resources."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from harness.base.errors import InputError, first_line
from harness.workers.wire import parts

PROBE_SECONDS = 3.0  # timeout of a port; Ray itself would retry for minutes
# Read when Ray is imported. Ray's log messages about nodes are replaced by our own lines.
QUIET = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
NOBODY = "start one with `ray start --head`, or give another address."
GONE = "run `ray stop`, then start one with `ray start --head`, or join one with `ray start --address HOST:PORT`."
# Environment variables that workers inherit from the coordinator.
TAKEN_OVER = ("PYTHONPATH", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The number of workers, and the resources of each."""

    workers: int
    cpus: int
    gpus: float  # a fraction if several workers share one
    places: int  # number of workers that the cluster has room for now

    def environment(self) -> dict[str, str]:
        """Return environment variables for each worker's process."""
        taken_over = {name: os.environ[name] for name in TAKEN_OVER if name in os.environ}
        return taken_over | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.cpus))}


def connect(address: str | None) -> None:
    """Join the cluster at "auto" (the cluster of this machine) or HOST:PORT; once per process.

    Raises InputError if Ray is not installed, or there is no such cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError('--engine ray needs Ray; install it with pip install -e ".[ray]".')
    option, given = check_address(address)
    os.environ |= QUIET
    import ray

    if ray.is_initialized():
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    place = given
    try:
        if given == "auto":
            place = _last_joined()
            _probe(place, f"The last Ray cluster of this machine, at {place}, does not answer", GONE)
        else:
            _probe(place, f"No Ray cluster answers at {option} {place}", NOBODY)
        ray.init(address=place, log_to_driver=False, logging_level=logging.CRITICAL)
    except ConnectionError as error:
        raise InputError(
            "No Ray cluster runs on this machine; start one with `ray start --head`, give the --ray-address HOST:PORT "
            "of a cluster that it has joined, or omit --engine ray. (A cluster with a token needs "
            "RAY_AUTH_MODE=token in the environment.)"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"The Ray cluster at {place} cannot be joined: {_why(error)}") from error
    finally:
        for number, handler in handlers.items():  # Ray replaces the handler of SIGTERM
            signal.signal(number, handler)


def check_address(given: str | None) -> tuple[str, str]:
    """Return the option or variable that gives the cluster's address, and its value: "auto" or HOST:PORT.

    "auto" means RAY_ADDRESS if that is set, as everywhere in Ray. Raises InputError for another format.
    """
    option, address = "--ray-address", given or "auto"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        option, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    if address != "auto" and parts(address) is None:
        raise InputError(f"{option} {address!r} is neither auto nor HOST:PORT, as `ray start --head` prints it.")
    return option, address


def _last_joined() -> str:
    """Return the HOST:PORT of "auto", as Ray does: of a node on this machine, else from its address file.

    Raises ConnectionError if this machine belongs to no cluster.
    """
    from ray._private.services import get_ray_address_from_environment

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # hide which of several nodes it uses
    found: str = get_ray_address_from_environment("auto", None)
    if parts(found) is None:
        raise ConnectionError(f"Ray's address file holds {found!r}")
    return found


def _probe(address: str, message: str, remedy: str) -> None:
    """Raise InputError with `message`, the reason and `remedy` unless a Ray cluster listens at HOST:PORT."""
    try:
        socket.create_connection(parts(address), PROBE_SECONDS).close()  # type: ignore[arg-type]
    except (OSError, UnicodeError) as error:  # the second: of a name such as first..example
        why = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{message} ({why}); {remedy}") from error
    import ray
    from ray.exceptions import AuthenticationError, RayError

    try:
        ray._raylet.GcsClient(address=address)  # the first step of `ray.init`, which would retry for minutes
    except AuthenticationError as error:
        raise InputError(
            f"The Ray cluster at {address} asks for a token; set RAY_AUTH_MODE=token, with its token in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN."
        ) from error
    except RayError as error:
        raise InputError(
            f"The service at {address} is not a Ray cluster ({first_line(error)}); give the --ray-address that "
            "`ray start --head` prints."
        ) from error


def _why(error: Exception) -> str:
    """Return why a cluster cannot be joined, with a remedy; Ray lists differing versions on separate lines."""
    versions = re.findall(r"\b(?:Ray|Python): (\S+)", str(error))
    if len(versions) == 4:
        runs = "it runs Ray {} and Python {}, but this machine has Ray {} and Python {}".format(*versions)
        return f"{runs}; install the same versions on all of its nodes."
    return f"{first_line(error)}; make this machine one of its nodes with `ray start --address HOST:PORT`."


def needs(workers: int | None, per_gpu: int, device: str) -> Needs:
    """Return the resources of a study's workers on `device` (a torch device type); `workers` None is as many as fit.

    That is one per GPU (or `per_gpu`), without GPUs one per node. They share the cores evenly. Raises InputError if
    `workers` is None and the cluster has no room for any.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_gpus = device == "cuda"
    usable = [node for node in nodes if node.get("GPU" if on_gpus else "CPU", 0) >= 1]
    cores = [int(node.get("CPU", 0)) for node in usable]
    shares = [int(node["GPU"] * per_gpu) for node in usable] if on_gpus else cores  # maximum number of workers per node
    if on_gpus:
        each = max(1, min((core // share for core, share in zip(cores, shares, strict=True)), default=1))
    else:
        each = _share(cores, workers or max(1, len(cores)))
    places = sum(min(share, core // each) for core, share in zip(cores, shares, strict=True))
    count = workers or max(1, places if on_gpus else len(cores))
    asked = Needs(workers=count, cpus=each, gpus=1 / per_gpu if on_gpus else 0, places=places)
    if asked.places == 0 and workers is None:  # Ray does not say whether an autoscaler would add a node
        has = f"{sum(int(node.get('CPU', 0)) for node in nodes)} CPUs and {sum(node.get('GPU', 0) for node in nodes):g}"
        raise InputError(
            f"No node of the Ray cluster has room for a worker, which needs {in_words(asked)}; all nodes together have "
            f"{has} GPUs. Add a node, or give another --device; if an autoscaler adds nodes, give the number of "
            "workers with --workers."
        )
    return asked


def in_words(needs: Needs) -> str:
    """Return a worker's resources as text."""
    cores = f"{needs.cpus} CPU{'s' if needs.cpus > 1 else ''}"
    if not needs.gpus:
        return cores
    return f"{cores} and a GPU" if needs.gpus == 1 else f"{cores} and {needs.gpus:.2g} of a GPU"


def _share(cores: Sequence[int], workers: int) -> int:
    """Return the most cores per worker such that the nodes have room for all; 1 if they have not."""
    shares = range(sum(cores) // workers, 1, -1)
    return next((share for share in shares if sum(core // share for core in cores) >= workers), 1)
