"""Which Triton kernels a call launches, and with what."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def launches() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What is launched, by name and arguments; it still runs."""
    from atman_kernels.backends.triton import launch  # Triton need not be installed

    found: list[tuple[str, dict[str, Any]]] = []

    def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], ready: Any = None) -> Any:
        found.append((kernel.fn.__name__, arguments))
        return launch.on_stream(kernel, grid, arguments, ready)

    with launch.intercepted(run):
        yield found
