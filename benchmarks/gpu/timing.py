"""Device time of a call with a cold L2, and the rates of the machine that it is held against."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
LEAST_REPEATS, MOST_REPEATS = 5, 50
AHEAD_CYCLES = 4_000_000  # of the GPU's clock: about two milliseconds in which the host queues the call


@dataclass(frozen=True)
class Rates:
    """What this machine reached, measured where the results were."""

    flops_per_second: float  # a large matrix product of random numbers, in the dtype of the run
    bytes_per_second: float  # a large copy on the device, bytes read and written

    def __str__(self) -> str:
        product, copy = self.flops_per_second / 1e12, self.bytes_per_second / 1e9
        return f"matrix product {product:.4g} TFLOP/s, copy {copy:.4g} GB/s"


@dataclass(frozen=True)
class Timing:
    ms: float  # median
    fastest_ms: float
    slowest_ms: float
    host_us: float  # median time until the call returned to Python
    repeats: int
    extra_bytes: int | None  # allocated during the call, output included; None on a CPU

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Stopwatch:
    """Times calls on one device; `small`, to see that everything runs, does not bother to keep it busy."""

    def __init__(self, device: torch.device, seconds_per_call: float = 0.5, small: bool = False) -> None:
        self.device, self.seconds = device, seconds_per_call
        self.cuda = device.type == "cuda"
        self.small = small or not self.cuda
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(1 if small else max(2 * cache, 128 << 20), dtype=torch.int8, device=device)

    def time(self, call: Callable[[], Any]) -> Timing:
        """Warm up, then repeat for about `seconds_per_call`."""
        extra = self._extra_bytes(call)
        for _ in range(WARM_UP - 1):
            call()
        samples = [self._once(call)]
        repeats = int(self.seconds * 1e3 / max(samples[0][0], 1e-3))
        samples += [self._once(call) for _ in range(min(max(repeats, LEAST_REPEATS), MOST_REPEATS) - 1)]
        times = [ms for ms, _ in samples]
        return Timing(median(times), min(times), max(times), median(host for _, host in samples), len(times), extra)

    def _once(self, call: Callable[[], Any]) -> tuple[float, float]:
        """(milliseconds on the device, microseconds on the host)"""
        if not self.cuda:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            return seconds * 1e3, seconds * 1e6
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        # The device waits here while the host issues the call, whose launches would otherwise be timed as gaps.
        # A call that waits for the device itself still pays for it.
        torch.cuda._sleep(AHEAD_CYCLES)
        before.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        after.record()
        after.synchronize()
        return before.elapsed_time(after), host * 1e6

    def _extra_bytes(self, call: Callable[[], Any]) -> int | None:
        if not self.cuda:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def rates(self, dtype: torch.dtype) -> Rates:
        size = 512 if self.small else 8192
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        product = self.time(lambda: left @ right)
        source = torch.randn((1 << 20) if self.small else (1 << 30), device=self.device)
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source))
        return Rates(2 * size**3 / (product.ms / 1e3), 2 * source.numel() * source.element_size() / (copy.ms / 1e3))


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in memory that the next allocations of this size get, so that what nobody wrote is seen."""
    blocks: list[Tensor] = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2)]
    del blocks
