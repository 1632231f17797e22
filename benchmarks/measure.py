"""What is measured around a contender: time, rows, attention, the machine's matrix-product rate, memory."""

import ctypes
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    pass  # which needs click: a GPU machine may not have it


@dataclass
class Meter:
    """Counts what a contender sends through the model, while `metered` is active.

    Attributes:
        seconds: wall time of the whole block.
        attention_seconds: wall time inside the attention function.
        forwards: (batch, rows) of every forward, as its first attention layer saw it.
    """

    seconds: float = 0.0
    attention_seconds: float = 0.0
    forwards: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens through the model's layers."""
        return sum(batch * rows for batch, rows in self.forwards)

    @property
    def largest_forward(self) -> int:
        return max(batch * rows for batch, rows in self.forwards)


@contextmanager
def metered() -> Iterator[Meter]:
    """Time the block, and what of it passes in attention, whichever function registered with transformers does it."""
    meter = Meter()
    first: nn.Module | None = None
    depth = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth, first
            if depth:  # one registered function may hand over to another
                return function(module, query, *args, **kwargs)
            first = first or module
            if module is first:
                meter.forwards.append((query.shape[0], query.shape[2]))
            depth += 1
            start = time.perf_counter()
            try:
                return function(module, query, *args, **kwargs)
            finally:
                meter.attention_seconds += time.perf_counter() - start
                depth -= 1

        return attend

    names = list(ALL_ATTENTION_FUNCTIONS)
    for name in names:  # local entries shadow the registered ones and go without a trace
        ALL_ATTENTION_FUNCTIONS[name] = counted(ALL_ATTENTION_FUNCTIONS[name])
    start = time.perf_counter()
    try:
        yield meter
    finally:
        meter.seconds = time.perf_counter() - start
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]


# Floating-point operations --------------------------------------------------------------------------------------


def layer_linears(model: Any) -> list[nn.Linear]:
    return [module for module in model.base_model.modules() if isinstance(module, nn.Linear)]


def linear_flops(model: Any, rows: int) -> int:
    return sum(2 * layer.weight.numel() for layer in layer_linears(model)) * rows


def explanation_flops(model: Any, case: Any, tokens: int) -> int:
    """What an explanation of every prompt token by packed suffixes computes, without its probe's attention.

    Layers: 2 * weights * tokens, for all tokens that passed. Attention: 4 * Hq * D * visible keys, for the rows of
    the base and of every variant. Head: 2 * hidden * vocabulary for each target row of the base and of every variant.
    """
    positions = range(case.prompt_tokens)
    config = model.config
    length = len(case.inputs)
    visible = _keys_seen(0, length) + sum(_keys_seen(position, length) for position in positions)
    heads, head_dim = config.num_attention_heads, layer_head_dim(config)
    attention = 4 * heads * head_dim * visible * config.num_hidden_layers
    target_rows = len(case.target_ids) * (len(positions) + 1)
    head = 2 * config.hidden_size * config.vocab_size * target_rows
    return linear_flops(model, tokens) + attention + head


def layer_head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _keys_seen(first: int, length: int) -> int:
    """Sum over the rows first … length - 1 of the keys that each sees, itself included."""
    return (first + 1 + length) * (length - first) // 2


@torch.inference_mode()
def linear_rate(model: Any, rows: int, repeats: int = 3) -> float:
    """FLOP/s of the layers' own linear maps at this number of rows, one after the other with nothing between them.

    A pass over all layers, weighted by FLOPs through being one; the median of `repeats`.
    """
    layers = layer_linears(model)
    inputs = {width: torch.randn(1, rows, width, dtype=model.dtype) for width in {x.in_features for x in layers}}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        seconds.append(time.perf_counter() - start)
    return linear_flops(model, rows) / median(seconds)


# Memory ---------------------------------------------------------------------------------------------------------


def can_measure_peak() -> bool:
    """Linux alone lets a process forget its highest resident size."""
    try:
        _forget_peak()
    except OSError:
        return False
    return "VmHWM" in Path("/proc/self/status").read_text()


def peak_bytes(work: Callable[[], Any]) -> int:
    """By how much the process's highest resident size during `work` lies above its size before.

    Counts what has not been freed before as much as possible: call it once per process.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what loading left in the heap would hide the first of the growth
    _forget_peak()
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM to the present size


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(match[1]) * 1024
