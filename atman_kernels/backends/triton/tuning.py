"""Measure tile sizes on the GPU at hand: what `atman bench tune` does."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
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
BUSY_CYCLES = 4_000_000  # of the GPU's clock, about two milliseconds: longer than the host needs to queue a call
DTYPES = {"16-bit": torch.bfloat16, "32-bit": torch.float32}


@dataclass(frozen=True)
class Tuned:
    """One key of the table: what stood there, what is fastest now, and their median times."""

    key: Key
    old: KernelConfig
    old_milliseconds: float
    new: KernelConfig
    new_milliseconds: float


def tune(
    table: Table,
    keys: list[Key],
    device: torch.device,
    processes: int = 1,
    tried: Callable[[Key, KernelConfig, float], None] = lambda key, config, milliseconds: None,
) -> Iterator[Tuned]:
    """The fastest candidate for each key; the old entry stays unless another is measurably faster.

    Args:
        processes: compile candidates in so many at once; 1: in this one.
        tried: is told every time as soon as it is known.
    """
    capability = torch.cuda.get_device_capability(device)
    for key in keys:
        old, times = table[key], {}
        call = workload(key, device)
        others = [config for config in candidates(key) if config != old]
        for config in (old, *fitting(key, others, capability, processes)):
            times[config] = milliseconds(call, config)
            tried(key, config, times[config])
        best = min(times, key=lambda config: times[config])
        new = best if times[best] < 0.98 * times[old] else old
        yield Tuned(key, old, times[old], new, times[new])


def hand_picked(table: Table) -> list[tuple[Key, KernelConfig]]:
    """What is worth a try where minutes are few: the entries that most calls get, and what could beat them.

    The first of each key is what calls get now, with a tile as tall as the workload's rows make it.
    """
    found = []
    for key, entry in table.items():
        if (picked := PICKED.get((key.dtype, key.regime, key.head_dim))) is not None:
            rows = HEADS // KV_HEADS if key.regime == "decode" else 128
            now = replace(entry, block_m=min(entry.block_m, configs.padded(rows)))
            found += [(key, config) for config in dict.fromkeys((now, *picked))]
    return found


# Block of rows, block of keys, warps, stages. 64 x 64 with 4 warps leaves room for two blocks on a processor, so that
# the softmax of one runs beside the products of the other.
PICKED = {
    ("16-bit", regime, dim): [KernelConfig(*numbers) for numbers in picked]
    for regime, dim, picked in (
        ("dense", 128, ((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2))),
        ("dense", 64, ((128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3))),
        ("packed", 128, ((128, 32, 8, 3), (128, 64, 8, 3), (64, 32, 4, 3))),
        ("packed", 64, ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3))),
        ("decode", 128, ((16, 32, 4, 3), (16, 64, 4, 3), (16, 64, 4, 4))),
        ("decode", 64, ((16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 4, 4))),
    )
}


def fitting(
    key: Key, configurations: Iterable[KernelConfig], capability: tuple[int, int], processes: int
) -> Iterator[KernelConfig]:
    """Those that fit, in the order in which they come. Each was compiled for the key's workload meanwhile."""
    if processes <= 1:
        yield from (config for config in configurations if fits(key, config, capability))
        return
    given = list(configurations)
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(min(processes, max(len(given), 1)), mp_context=spawn) as pool:
        tasks = [pool.submit(_compiled, key, config, capability) for config in given]
        for config, task in zip(given, tasks, strict=True):
            if task.result():
                yield config


def _compiled(key: Key, config: KernelConfig, capability: tuple[int, int]) -> bool:
    """In a process of its own: whether a configuration fits. Then its kernels are in Triton's cache."""
    if not fits(key, config, capability):
        return False
    try:
        with configs.forced(config):
            workload(key, torch.device("cuda"))()
        torch.cuda.synchronize()
    except Exception:  # a kernel that its own workload cannot run is no candidate
        return False
    torch.cuda.empty_cache()
    return True


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


def workload(key: Key, device: torch.device, shrink: int = 1) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that the regime stands for, one factor in each row not 1; its lengths divided by `shrink`."""
    dtype, dim = DTYPES[key.dtype], key.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def factors(rows: int, length: int) -> Tensor:
        factor = torch.ones(rows, length, device=device, dtype=torch.float32)
        factor[torch.arange(rows, device="cpu"), torch.arange(rows, device="cpu") * 7 % length] = 0.1
        return factor

    options = ScoreOptions("log_additive", True, dim**-0.5, None, None, False)
    if key.regime == "packed":
        prefix, suffix, variants = 2048 // shrink, 16, 256 // shrink
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
    length = (8192 if key.regime == "decode" else 4096) // shrink
    batch, rows = (8, 1) if key.regime == "decode" else (2, length)
    extras = launch.Extras(factors(batch, length), None, None, None)
    query, key_, value = normal(batch, HEADS, rows, dim), *(normal(batch, KV_HEADS, length, dim) for _ in range(2))
    return lambda: launch.attend(query, key_, value, None, extras, options)


def milliseconds(call: Callable[[], object], config: KernelConfig) -> float:
    """Median time of a call with a configuration, by the device's own clock.

    The device is kept busy until a call is queued: on one that waits, the time of a short call would be the host's.
    """
    times: list[float] = []
    with configs.forced(config):
        for _ in range(WARMUP):
            call()
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times)[ROUNDS // 2]
