"""Ray: joined where an address is given, else started on this machine for as long as it is needed."""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from atman_kernels import arguments
from atman_kernels.errors import InputError
from atman_kernels.scale import extra

OBJECT_STORE_BYTES = 200 << 20  # tasks and results are small: Ray's default is a third of the machine's memory
STARTS = 4  # tries: Ray gives itself 30 seconds, which a busy machine may need more than once


@dataclass(frozen=True)
class Share:
    """What there is of workers, and what each of them gets.

    Args:
        workers: how many; None: one for every GPU that Ray has, else one.
        gpus: of each worker, 0, a fraction of one or 1; None: 1 if Ray has any.
        cpus: of each worker, which has as many threads; None: beside a GPU 1, else this machine's by the workers.
    """

    workers: int | None = None
    gpus: float | None = None
    cpus: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "cpus"):
            if getattr(self, name) is not None:
                shown = {"workers": "workers", "cpus": "cpus_per_worker"}[name]
                arguments.integer(getattr(self, name), shown, least=1, most=100_000)
        if self.gpus is not None:
            expected = "a number from 0 to 1: a worker's model is on one device"
            arguments.real(self.gpus, "gpus_per_worker", expected, lambda x: 0 <= x <= 1)

    def settled(self, gpus: float) -> "Settled":
        """With defaults filled in, on a cluster of so many GPUs."""
        each = min(1.0, gpus) if self.gpus is None else float(self.gpus)
        workers = self.workers or max(1, int(gpus / each) if each else 1)
        return Settled(workers, each, self.cpus or (1 if each else max(1, _cores() // workers)))


@dataclass(frozen=True)
class Settled:
    """As `Share`, without anything left open."""

    workers: int
    gpus: float
    cpus: int

    def placed(self, loading: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `load_model`, which would take a GPU that it was not given."""
        no_gpu = self.gpus == 0 and loading.get("device") is None
        return {**loading, "device": "cpu"} if no_gpu else dict(loading)


@contextmanager
def cluster(address: str | None, share: Share, purpose: str) -> Iterator[Settled]:
    """Ray connected; a cluster that was started here ends with the block, one that was joined is left as it was.

    Args:
        address: of a running cluster ("auto", "10.0.0.1:6379"); None: one of this machine alone, unless this process
            is connected already.

    Raises:
        ImportError: Ray is not installed.
        InputError: there is no cluster at that address.
    """
    if address is not None:
        arguments.text(address, "address", expected="a cluster's address or None")
    ray = extra.ray(purpose)
    if ray.is_initialized():
        if address is not None:
            raise InputError("address: this process is connected to Ray already; leave the address out to use that")
        yield share.settled(ray.cluster_resources().get("GPU", 0))
        return
    folder = None
    try:
        if address is None:
            folder = tempfile.mkdtemp(prefix="atman-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)  # short
            settled = _start(ray, share, folder)
        else:
            _join(ray, address)
            settled = share.settled(ray.cluster_resources().get("GPU", 0))
        yield settled
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _start(ray: Any, share: Share, folder: str) -> Settled:
    """Ray on this machine: no dashboard, a bounded object store, a token that no file holds."""
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Ray asks for a token by default, and would write one into the home folder; it keeps this while the process is
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    settled = share.settled(_gpus())
    options: dict[str, Any] = {
        "num_cpus": settled.workers * settled.cpus,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
    }
    for remaining in reversed(range(STARTS)):
        try:
            with _loopback_alone():
                ray.init(**options)
            break
        except Exception as error:  # Ray has many of its own
            with suppress(Exception):
                ray.shutdown()
            if not remaining:
                raise RuntimeError(f"Ray does not start on this machine: {type(error).__name__}: {error}") from error
    return settled


@contextmanager
def _loopback_alone() -> Iterator[None]:
    """Ray started inside is at 127.0.0.1, and listens there alone.

    Else it takes the machine's outward address even where it is told the other, and listens on all. Where clusters are
    switched off it does not; the switch, made for Windows and macOS, is read when Ray is imported, and by its children.
    """
    from importlib import import_module

    constants: Any = import_module("ray._private.ray_constants")
    before, variable = getattr(constants, "ENABLE_RAY_CLUSTER", None), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    outer = os.environ.get(variable)
    constants.ENABLE_RAY_CLUSTER, os.environ[variable] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        del os.environ[variable]
        if outer is not None:
            os.environ[variable] = outer


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray has many of its own
        with suppress(Exception):
            ray.shutdown()
        raise InputError(f"address {address!r}: no cluster answers there ({type(error).__name__}: {error})") from error


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
