"""Measure tile sizes on the GPU at hand: what `atman bench tune` does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from atman_kernels.backends.triton import configs, launch
from atman_kernels.backends.triton.configs import KernelConfig, Key, Table
from atman_kernels.backends.triton.offline import Call, compile_call
from atman_kernels.formula import ScoreOptions
from atman_kernels.pack import VariantPack

HEADS, KV_HEADS = 32, 8
WARMUP, ROUNDS = 3, 20
DTYPES = {"16-bit": torch.bfloat16, "32-bit": torch.float32}


@dataclass(frozen=True)
class Tuned:
    """One key of the table: what stood there, what is fastest now, and their median times."""

    key: Key
    old: KernelConfig
    old_milliseconds: float
    new: KernelConfig
    new_milliseconds: float


def tune(table: Table, keys: list[Key], device: torch.device) -> Iterator[Tuned]:
    """The fastest candidate for each key; the old entry stays unless another is measurably faster."""
    capability = torch.cuda.get_device_capability(device)
    for key in keys:
        call = workload(key, device)
        times = {table[key]: milliseconds(call, table[key])}
        for config in candidates(key):
            if config not in times and fits(key, config, capability):
                times[config] = milliseconds(call, config)
        old, best = table[key], min(times, key=lambda config: times[config])
        new = best if times[best] < 0.98 * times[old] else old
        yield Tuned(key, old, times[old], new, times[new])


def candidates(key: Key) -> Iterator[KernelConfig]:
    """Every configuration worth a try, whether or not it fits."""
    most_rows = configs.DECODE_ROWS if key.regime == "decode" else 128
    for block_m, block_n, warps, stages in product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        if block_m <= most_rows and block_m * block_n <= 128 * 128:
            yield KernelConfig(block_m, block_n, warps, stages)


def fits(key: Key, config: KernelConfig, capability: tuple[int, int]) -> bool:
    """Whether all kernels that would use the entry get along without spilling, within the shared memory there is."""
    shared = configs.SHARED_MEMORY[configs.architecture(capability)]
    kinds = ("dense", "packed") if key.regime == "decode" else (key.regime,)
    for kind in kinds:
        call = Call(kind, DTYPES[key.dtype], key.head_dim, config=config, splits=4 if key.regime == "decode" else 1)
        for kernel in compile_call(10 * capability[0] + capability[1], call):
            if kernel.spilled or kernel.shared > shared:
                return False
    return True


def workload(key: Key, device: torch.device) -> Callable[[], object]:
    """A call that the regime stands for, one factor in each row not 1."""
    dtype, dim = DTYPES[key.dtype], key.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def factors(rows: int, length: int) -> Tensor:
        factor = torch.ones(rows, length, device=device, dtype=torch.float32)
        factor[torch.arange(rows, device="cpu"), torch.arange(rows, device="cpu") * 7 % length] = 0.1
        return factor

    options = ScoreOptions("log_additive", True, dim**-0.5, None, None, False)
    if key.regime == "packed":
        prefix, suffix, variants = 2048, 16, 256
        pack = VariantPack.build([suffix] * variants, [prefix] * variants, device=device)
        rows = pack.num_rows
        layout = launch.Layout(
            normal(1, KV_HEADS, rows, dim),
            normal(1, KV_HEADS, rows, dim),
            pack.suffix_starts,
            pack.prefix_lengths,
            pack.base_starts,
            pack.row_variant,
        )
        extras = launch.Extras(factors(variants, pack.longest), None, None, None)
        query, key_, value = normal(1, HEADS, rows, dim), *(normal(1, KV_HEADS, prefix, dim) for _ in range(2))
        return lambda: launch.attend(query, key_, value, layout, extras, options)
    batch, rows, length = (8, 1, 8192) if key.regime == "decode" else (2, 4096, 4096)
    extras = launch.Extras(factors(batch, length), None, None, None)
    query, key_, value = normal(batch, HEADS, rows, dim), *(normal(batch, KV_HEADS, length, dim) for _ in range(2))
    return lambda: launch.attend(query, key_, value, None, extras, options)


def milliseconds(call: Callable[[], object], config: KernelConfig) -> float:
    """Median time of a call with a configuration, by the device's own clock."""
    times = []
    with configs.forced(config):
        for _ in range(WARMUP):
            call()
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times)[ROUNDS // 2]
