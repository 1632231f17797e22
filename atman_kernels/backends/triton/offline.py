"""Compile the kernels for a GPU that need not be there, through the same launches as a real call.

Example:
    >>> from atman_kernels.backends.triton.offline import Call, compile_call  # doctest: +SKIP
    >>> compile_call(90, Call("packed", torch.bfloat16, head_dim=128))  # doctest: +SKIP
    [Compiled(kernel='prepare_factors', …), …, Compiled(kernel='attention', registers=254, spilled=0, shared=163840)]
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from atman_kernels.backends.triton import configs, launch, launch_backward
from atman_kernels.backends.triton.configs import KernelConfig, Key
from atman_kernels.formula import Saved, ScoreOptions

SERIALIZED = "wgmma.mma_async instructions are serialized"
BATCH, HEADS, KV_HEADS, ROWS, KEYS, VARIANTS = 2, 8, 2, 256, 512, 16
SCALE = 0.1


@dataclass(frozen=True)
class Compiled:
    """One kernel as a GPU would run it; bytes spilled are per thread, bytes shared per block."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    wgmma: int  # warpgroup products in the code; 0 where the GPU has none, or the tile is too low for them
    serialized: bool  # the assembler waits for each of them, since their accumulators do not stay in registers


@dataclass(frozen=True)
class Call:
    """What to compile for: every feature that changes the code."""

    kind: str  # dense | packed
    dtype: torch.dtype
    head_dim: int
    value_dim: int | None = None
    config: KernelConfig | None = None
    splits: int = 1
    mode: str = "log_additive"
    factor: bool = True
    is_causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    key_mask: bool = False
    bias: bool = False
    gradients: tuple[str, ...] = ()  # some of `launch_backward.NAMES`: the call's backward instead of its forward

    def fitted(self, config: KernelConfig) -> KernelConfig:
        """What such a call makes of a table's entry."""
        holds_terms = configs.holds_terms(self.kind == "packed", self.factor, self.mode, self.softcap, SCALE)
        return configs.fitted(config, self.head_dim, self.value_dim or self.head_dim, self.bias, holds_terms)

    def launch(self) -> None:
        """The call on tensors of the right kinds; their values do not matter where nothing runs."""
        value_dim = self.value_dim or self.head_dim

        def zeros(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cpu")

        def indices(length: int) -> Tensor:
            return zeros(length, dtype=torch.int32)

        packed = self.kind == "packed"
        batch, variants = (1, VARIANTS) if packed else (BATCH, BATCH)
        layout = launch.Layout(
            zeros(1, KV_HEADS, ROWS, self.head_dim),
            zeros(1, KV_HEADS, ROWS, value_dim),
            indices(VARIANTS + 1),
            indices(VARIANTS),
            indices(VARIANTS),
            indices(ROWS),
        )
        extras = launch.Extras(
            torch.ones(variants, KEYS, dtype=torch.float32, device="cpu") if self.factor else None,
            zeros(batch, KEYS, dtype=torch.bool) if self.key_mask else None,
            zeros(HEADS) if self.sinks else None,
            zeros(1, HEADS, ROWS, KEYS) if self.bias else None,
        )
        options = ScoreOptions(self.mode, self.is_causal, SCALE, self.sliding_window, self.softcap, True)
        query, key = zeros(batch, HEADS, ROWS, self.head_dim), zeros(batch, KV_HEADS, KEYS, self.head_dim)
        value = zeros(batch, KV_HEADS, KEYS, value_dim)
        call = query, key, value, layout if packed else None, extras, options
        with configs.forced(self.config, self.splits):
            if not self.gradients:
                launch.attend(*call)
                return
            output = zeros(batch, HEADS, ROWS, value_dim)
            lse = zeros(batch, HEADS, ROWS, dtype=torch.float32)
            launch_backward.gradients(*call, Saved(output, lse, output, None), set(self.gradients))


def compile_call(capability: int, call: Call) -> list[Compiled]:
    """Every kernel of a call, compiled for ``sm_<capability>``."""
    if launch.INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process; compile without TRITON_INTERPRET")
    if call.config is None:
        table = configs.load(configs.architecture(divmod(capability, 10)))
        dim = max(configs.padded(call.head_dim), configs.padded(call.value_dim or call.head_dim))
        dtype = "16-bit" if call.dtype.itemsize == 2 else "32-bit"
        call = replace(call, config=call.fitted(table[Key(dtype, call.kind, dim)]))
    with _target(capability), _collected() as kernels:
        call.launch()
    return [_measured(kernel) for kernel in kernels]


@contextmanager
def _target(capability: int) -> Iterator[None]:
    """Triton believes in a GPU of this capability."""
    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver.set_active(before)


@contextmanager
def _collected() -> Iterator[list[Any]]:
    """Launches compile, and run nothing."""
    kernels: list[Any] = []

    def compiled(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], ready: Any = None) -> None:
        kernels.append(kernel.warmup(grid=grid, **arguments))

    with launch.intercepted(compiled):
        yield kernels


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0


def _measured(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", found.stdout + found.stderr)}
    ptx = kernel.asm["ptx"]
    wgmma = ptx.count("wgmma.mma_async")
    serialized = wgmma > 0 and SERIALIZED in assembler_log(ptx)
    return Compiled(kernel.metadata.name, usage["REG"], usage["STACK"], kernel.metadata.shared, wgmma, serialized)


def assembler_log(ptx: str) -> str:
    """What ptxas says when it assembles as Triton has it do; Triton itself keeps that to itself."""
    target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        options = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={target}", "--output-file=/dev/null"]
        command = [triton.knobs.nvidia.ptxas.path, *options, source.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
