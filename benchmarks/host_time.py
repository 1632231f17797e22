"""What a call on a GPU costs the host: checks, dispatch, plan and launches, over a driver that launches nothing.

    python -m benchmarks.host_time [--calls 300] [--rounds 9]

Needs Triton and no GPU: tensors are the CPU's, kernels are compiled for sm_90 and not run. CUDA's own part of launches
and allocations is not in the figures; of a backward, torch's way to it is. The smallest of the rounds' means is what an
idle core takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.driver import driver

from atman_kernels import ops
from atman_kernels.backends import triton as backend
from atman_kernels.backends.triton import offline
from atman_kernels.ops import validation
from atman_kernels.pack import VariantPack

CAPABILITY, MULTIPROCESSORS = (9, 0), 132
HEADS, KV_HEADS, DIM = 32, 8, 128


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Driver(offline._Driver):
    """Loads and launches nothing."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        load_binary=lambda *arguments: (1, 1, 32, 0, 1024),
    )


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Backend "triton" takes tensors of the CPU, compiles for an H100 and launches nothing."""
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    instead: list[tuple[Any, str, Callable[..., Any]]] = [
        (backend, "unavailable_reason", lambda device_type: None),
        (validation, "check_factor_values", lambda factor, query: None),  # no call on a GPU reads them
        (torch.cuda, "get_device_properties", lambda device: properties),
        (torch.cuda, "get_device_capability", lambda *device: CAPABILITY),
    ]
    before = driver._active, [getattr(owner, name) for owner, name, _ in instead]
    driver.set_active(_Driver(90))
    for owner, name, function in instead:
        setattr(owner, name, function)
    try:
        yield
    finally:
        driver.set_active(before[0])
        for (owner, name, _), function in zip(instead, before[1], strict=True):
            setattr(owner, name, function)


def calls() -> dict[str, Callable[[], Any]]:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def backward(forward: Callable[[], torch.Tensor], *tensors: torch.Tensor) -> Callable[[], Any]:
        """The gradients of a call by these tensors; the call itself is made before."""
        for tensor in tensors:
            tensor.requires_grad_()

        @cache
        def made() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                output = forward()
            return output, torch.zeros_like(output)

        return lambda: torch.autograd.grad(made()[0], tensors, made()[1], retain_graph=True)

    def dense(rows: int, keys: int, has_factor: bool, differentiated: bool = False) -> Callable[[], Any]:
        query, key, value = zeros(1, HEADS, rows, DIM), zeros(1, KV_HEADS, keys, DIM), zeros(1, KV_HEADS, keys, DIM)
        factor = torch.ones(1, keys) if has_factor else None

        def call() -> Any:
            return ops.suppressed_attention(query, key, value, factor, is_causal=True, backend="triton")

        return backward(call, query, key, value) if differentiated else call

    def packed(rows: int, has_factor: bool, differentiated: bool = False) -> Callable[[], Any]:
        variants, prefix = 64, 512
        pack = VariantPack.build([rows] * variants, [prefix] * variants)
        query, key, value = (zeros(heads, pack.num_rows, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        base = zeros(KV_HEADS, prefix, DIM)
        factor = torch.ones(variants, pack.longest) if has_factor else None

        def call() -> Any:
            return ops.packed_suppressed_attention(query, key, value, base, base, pack, factor, backend="triton")

        return backward(call, query, key, value, base) if differentiated else call

    return {
        "dense": dense(2048, 2048, False),
        "dense, factors": dense(2048, 2048, True),
        "decode, factors, split": dense(1, 8192, True),
        "pack": packed(32, False),
        "pack, factors": packed(32, True),
        "backward, dense, factors": dense(2048, 2048, True, differentiated=True),
        "backward, pack, factors": packed(32, True, differentiated=True),
    }


def microseconds(call: Callable[[], Any], count: int, rounds: int) -> tuple[float, float]:
    """The smallest and the median of the rounds' means."""
    for _ in range(20):
        call()
    means = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            call()
        means.append((time.perf_counter() - start) / count * 1e6)
    return min(means), statistics.median(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300, help="in a round")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with nothing_runs(), torch.no_grad():
        for name, call in calls().items():
            least, median = microseconds(call, options.calls, options.rounds)
            print(f"{name:26}{least:8.1f} us, median {median:.1f}", flush=True)


if __name__ == "__main__":
    main()
