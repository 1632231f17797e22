"""From validated tensors to launches: strides, units, splits and grids. Nothing here waits for the device.

What follows from shapes, strides and options alone is a plan. It is made once and kept, so that a call of a kind that
was there before costs the host little more than its launches.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from atman_kernels.backends.triton import configs, forward
from atman_kernels.backends.triton.configs import KernelConfig
from atman_kernels.formula import WIDEST_WINDOW, ScoreOptions

LOG2_E = math.log2(math.e)
INTERPRETED = type(forward.attention).__name__ == "InterpretedFunction"
# What the interpreter stands for: a device of few processors, so that small calls are split there too.
INTERPRETED_ARCHITECTURE, INTERPRETED_PROCESSORS = "sm_90", 4
MOST_REGISTERS = 255  # of a thread: told so, the assembler does not spill to fit more blocks on a processor
ALIGNMENT = 16  # what Triton recognizes: of a number, and of an address in bytes
MOST_KEYS = 128  # of a block
OWN_BLOCK = 256
PREPARED_BLOCK = 512  # times the flags of a chunk: factors that are read at once, at most
CHUNKS, HEADER = forward.CHUNKS.value, forward.HEADER.value
MOST_PLANS = 1024
LAYOUT = ("suffix_starts", "prefix_lengths", "base_starts", "row_variant")


@dataclass(frozen=True)
class Layout:
    """A pack: its rows' own keys and values, and which rows belong to which variant."""

    own_key: Tensor  # (1, Hkv, T, D)
    own_value: Tensor  # (1, Hkv, T, Dv)
    suffix_starts: Tensor  # (V + 1,)
    prefix_lengths: Tensor  # (V,)
    base_starts: Tensor  # (V,)
    row_variant: Tensor  # (T,)


@dataclass(frozen=True)
class Extras:
    """The tensors that a call may do without."""

    factor: Tensor | None  # (V|B, K) or (V|B, Hq, K)
    key_mask: Tensor | None  # (B, keys) bool
    sinks: Tensor | None  # (Hq,)
    bias: Tensor | None  # (1|B, 1|Hq, 1|rows, 1|keys), of a pack (1, 1|Hq, 1|P, 1|P)


def attend(
    query: Tensor,  # (B, Hq, rows, D)
    key: Tensor,  # (1|B, Hkv, keys, D)
    value: Tensor,  # (1|B, Hkv, keys, Dv)
    layout: Layout | None,  # None: a dense batch; else B = 1
    extras: Extras,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, rows, Dv) and lse (B, Hq, rows), or an empty lse if nobody wants one."""
    batch, heads, rows, _ = query.shape
    output = query.new_empty((batch, heads, rows, value.shape[3]))
    lse = query.new_empty((batch, heads, rows) if options.return_lse else (0,), dtype=torch.float32)
    if rows == 0 or batch == 0 or heads == 0:
        return output, lse
    if INTERPRETED and query.dtype == torch.bfloat16:  # it gets products of bfloat16 wrong
        query, key, value = query.float(), key.float(), value.float()
        if layout is not None:
            layout = replace(layout, own_key=layout.own_key.float(), own_value=layout.own_value.float())
    tensors = named(query, key, value, layout, extras)
    plan = _plan_for(tensors, options)
    with on_device(query.device):
        plan.launch(tensors, output, lse if options.return_lse else None)
    return output, lse


class Launcher(Protocol):
    """What puts a kernel on the current stream: `on_stream`, or what `intercepted` has take its place."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], ready: Any = None, /) -> Any:
        """`ready` is what this returned for arguments of the same kind; None: there was no such call yet."""


def on_stream(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], ready: Any = None) -> Any:
    """Puts a kernel on the current stream.

    Arguments of the same kind are alike in all but the addresses of tensors, and these aligned alike. What was returned
    for them, `ready`, spares Triton a look at each of them.
    """
    if ready is None:
        return kernel[grid](**arguments)
    ready[grid](*[arguments[name] for name in kernel.arg_names])
    return ready


_launcher: ContextVar[Launcher] = ContextVar("launcher", default=on_stream)


@contextmanager
def intercepted(launcher: Launcher) -> Iterator[None]:
    """Launches go to `launcher`, which may compile a kernel, or look at its arguments and hand it to `on_stream`."""
    token = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(token)


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], ready: Any = None) -> Any:
    """A launch, by whoever is in charge of it."""
    return _launcher.get()(kernel, grid, arguments, ready)


@dataclass
class Step:
    """A launch but for its tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    ready: Any = None

    def __call__(self, tensors: dict[str, Tensor | None]) -> None:
        ready = run(self.kernel, self.grid, self.arguments | tensors, self.ready)
        if self.ready is None:
            self.ready = ready


Room = dict[str, tuple[tuple[int, ...], torch.dtype]]  # what is to be allocated


@dataclass
class Plan:
    """The launches of one kind of call, in their order, and the room that they want beside inputs and output."""

    attention: Step
    prepare: Step | None = None
    prepared: Room = field(default_factory=dict)
    minimum_pass: Step | None = None
    minimum: Room = field(default_factory=dict)
    merge: Step | None = None
    partial: Room = field(default_factory=dict)

    def launch(self, tensors: dict[str, Tensor | None], output: Tensor, lse: Tensor | None) -> None:
        """Allocates what the launches want beside inputs and results, and puts them on the stream in their order."""
        inputs = tensors.copy()
        factor, sinks = inputs.pop("factor"), inputs["sinks"]
        if self.prepare is not None:
            assert factor is not None
            made = allocated(self.prepared, factor)
            layout = {name: inputs[name] for name in LAYOUT if name != "base_starts"}
            self.prepare({"factor": factor, **layout, **made})
            inputs |= made
        if self.minimum_pass is not None:
            inputs |= allocated(self.minimum, output)
            self.minimum_pass(inputs | {"terms": None, "own_terms": None, "sinks": None})
        if self.merge is None:
            self.attention(inputs | {"output": output, "lse": lse})
        else:
            partial = allocated(self.partial, output)
            self.attention(inputs | {"output": partial["partial"], "lse": partial["partial_lse"], "sinks": None})
            self.merge({**partial, "sinks": sinks, "output": output, "lse": lse})


_plans: dict[Any, Plan] = {}


def _plan_for(tensors: dict[str, Tensor | None], options: ScoreOptions) -> Plan:
    """The plan for all calls of this kind; it holds no tensor."""
    query = tensors["query"]
    assert query is not None
    precision = float32_precision() if query.dtype == torch.float32 else None
    kind = (query.device, options, configs.forced_now(), precision, *map(layout_in_memory, tensors.values()))
    plan = _plans.get(kind)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[kind] = _make_plan(tensors, options)
    return plan


def layout_in_memory(tensor: Tensor | None) -> Any:
    """All of a tensor that a launch depends on but its address."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0


def _make_plan(tensors: dict[str, Any], options: ScoreOptions) -> Plan:
    query, value, factor = tensors["query"], tensors["value"], tensors["factor"]
    batch, heads, rows, _ = query.shape
    _, kv_heads, keys, value_dim = value.shape
    per_head = factor is not None and factor.ndim == 3
    group = 1 if per_head else heads // kv_heads  # rows of a tile differ in their factors by variant only
    config = _config(tensors, options, group)
    tiles = -(-rows * group // config.block_m)
    programs = tiles * (heads // group) * batch
    splits = splits_for(query.device, programs, keys)
    grid = (programs * splits, 1, 1)
    arguments = _arguments(tensors, options, config, group, tiles, splits)
    plan = Plan(Step(forward.attention, grid, arguments))
    results = (splits, batch, heads, rows)
    if factor is not None:
        # Who looks at a row's flags before he reads its terms needs registers: only where there are enough of them.
        is_sparse = splits == 1 and not configs.holds_terms(True, True, options.mode, options.softcap, options.scale)
        plan.prepare, plan.prepared = _prepare(tensors, arguments["unit"], options.mode, is_sparse)
        arguments |= {name: plan.prepare.arguments[name] for name in ("pitch", "touched_shift", "SPARSE_TERMS")}
        arguments["TERM_HEADS"] = plan.prepare.arguments["HEADS"]
        if options.mode == "shifted":
            plan.minimum = {"minimum": (results, torch.float32)}
            plan.minimum_pass = Step(forward.attention, grid, arguments | {"MINIMUM_PASS": True})
    if splits > 1:
        plan.partial = {"partial": ((*results, value_dim), torch.float32), "partial_lse": (results, torch.float32)}
        plan.merge = _merge(tensors["sinks"], results, value_dim)
    return plan


def allocated(room: Room, like: Tensor) -> dict[str, Tensor]:
    """The room, with nothing in it yet, on the device of another tensor."""
    return {name: like.new_empty(shape, dtype=dtype) for name, (shape, dtype) in room.items()}


def score_units(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(unit, inner scale) such that exp(natural score) = exp2(unit * score), the kernel's score being

    - q·k if the scale is positive, so that scaling is part of the exponent's multiply-add
    - inner scale * q·k otherwise
    - tanh(inner scale * q·k) with a softcap

    Example:
        >>> score_units(0.125, None), score_units(-1.0, None)[1], score_units(0.125, 50.0)[1]
        ((0.18033688011112042, None), -1.0, 0.0025)
    """
    if softcap is not None:
        return softcap * LOG2_E, scale / softcap
    if scale < configs.LEAST_SCALE:
        return LOG2_E, scale
    return scale * LOG2_E, None


def float32_precision() -> str:
    """How float32 is multiplied: exactly, unless torch's own matrix products may use TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def named(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, extras: Extras) -> dict[str, Tensor | None]:
    """The tensors of a call under the kernels' names for them."""
    named = {"query": query, "key": key, "value": value, "own_key": None, "own_value": None}
    if layout is None:
        named |= dict.fromkeys(LAYOUT)
    else:
        named |= {"own_key": layout.own_key, "own_value": layout.own_value}
        named |= {name: getattr(layout, name).contiguous() for name in LAYOUT}
    mask = None if extras.key_mask is None else extras.key_mask.view(torch.uint8)
    return named | {"factor": extras.factor, "key_mask": mask, "sinks": extras.sinks, "bias": extras.bias}


def _arguments(
    tensors: dict[str, Any], options: ScoreOptions, config: KernelConfig, group: int, tiles: int, splits: int
) -> dict[str, Any]:
    """What the passes over one call have in common, but for tensors: those that are not there are None."""
    batch, heads, rows, dim = tensors["query"].shape
    _, kv_heads, keys, value_dim = tensors["value"].shape
    unit, inner_scale = score_units(options.scale, options.softcap)
    window, sinks = options.sliding_window, tensors["sinks"]
    strided = ("query", "key", "value", "own_key", "own_value", "bias")
    return {
        **{f"{name}_strides": strides_of(tensors[name], 4) for name in strided},
        "key_mask_strides": strides_of(tensors["key_mask"], 2),
        "sinks_stride": 0 if sinks is None else sinks.stride(0),
        **dict.fromkeys(("terms", "own_terms", "minimum", "output", "lse")),
        "touched_shift": 0,
        "pitch": 0,
        "rows": rows,
        "keys": keys,
        "num_tiles": tiles,
        "num_splits": splits,
        "window": None if window is None else min(window, WIDEST_WINDOW),
        "unit": unit,
        "inner_scale": inner_scale,
        "BATCH": batch,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "TERM_HEADS": 1,
        "MODE": options.mode,
        "MINIMUM_PASS": False,
        "SPARSE_TERMS": False,
        "IS_CAUSAL": options.is_causal,
        "SOFTCAP": options.softcap is not None,
        "PRECISION": float32_precision(),
        "D": dim,
        "DV": value_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": configs.padded(dim),
        "BLOCK_DV": configs.padded(value_dim),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": MOST_REGISTERS,
    }


def strides_of(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    """An axis of length 1 is broadcast."""
    if tensor is None:
        return (0,) * rank
    return tuple(s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _prepare(tensors: dict[str, Any], unit: float, mode: str, is_sparse: bool) -> tuple[Step, Room]:
    """Factors as the kernel wants them, with flags that tell which of them are 1: made anew in every call."""
    factor, row_variant = tensors["factor"], tensors["row_variant"]
    variants, heads, length = factor.shape if factor.ndim == 3 else (factor.shape[0], 1, factor.shape[1])
    strides = strides_of(factor, factor.ndim)
    words, pitch = variants * heads, HEADER + -(-length // ALIGNMENT) * ALIGNMENT
    # A block of keys may reach past the last position, and what it reads there is masked afterwards.
    room: Room = {"terms": ((words * pitch + MOST_KEYS,), torch.float32)}
    shift, programs, rows = touched_shift(length), words * CHUNKS, 0
    if row_variant is not None:
        rows = row_variant.shape[0]
        room["own_terms"] = ((heads * rows + MOST_KEYS,), torch.float32)
        programs += heads * -(-rows // OWN_BLOCK)
    arguments = {
        "factor_strides": strides if factor.ndim == 3 else (strides[0], 0, strides[1]),
        "own_terms": None,
        "length": length,
        "pitch": pitch,
        "words": words,
        "touched_shift": shift,
        "unit": unit,
        "rows": rows,
        "HEADS": heads,
        "MODE": mode,
        "SPARSE_TERMS": is_sparse,
        "BLOCK": min(1 << shift, PREPARED_BLOCK),
        "OWN_BLOCK": OWN_BLOCK,
    }
    return Step(forward.prepare_factors, (programs, 1, 1), arguments), room


def touched_shift(length: int) -> int:
    """log2 of the positions that one flag speaks for: 64 flags reach over all, and no block of keys spans three.

    Example:
        >>> touched_shift(500), touched_shift(8192), touched_shift(8193)
        (7, 7, 8)
    """
    return max(7, ((length - 1) >> 6).bit_length())


def _merge(sinks: Tensor | None, results: tuple[int, ...], value_dim: int) -> Step:
    splits, batch, heads, rows = results
    all_rows = batch * heads * rows
    arguments = {
        "sinks_stride": 0 if sinks is None else sinks.stride(0),
        "all_rows": all_rows,
        "rows": rows,
        "num_splits": splits,
        "HEADS": heads,
        "DV": value_dim,
        "BLOCK_SPLITS": 1 << (splits - 1).bit_length(),
        "BLOCK_DV": configs.padded(value_dim),
    }
    return Step(forward.merge, (all_rows, 1, 1), arguments)


def _config(tensors: dict[str, Any], options: ScoreOptions, group: int) -> KernelConfig:
    forced = configs.forced_now().config
    if forced is not None:
        return forced
    query, is_packed = tensors["query"], tensors["own_key"] is not None
    rows, (dim, value_dim) = query.shape[2] * group, (query.shape[3], tensors["value"].shape[3])
    return configs.choose(
        configs.load(architecture_of(query.device)),
        query.element_size(),
        configs.regime(rows, is_packed),
        dim,
        value_dim,
        rows,
        has_bias=tensors["bias"] is not None,
        holds_terms=configs.holds_terms(
            is_packed, tensors["factor"] is not None, options.mode, options.softcap, options.scale
        ),
    )


def architecture_of(device: torch.device) -> str:
    """Whose tables a call gets."""
    if INTERPRETED:
        return INTERPRETED_ARCHITECTURE
    return configs.architecture(torch.cuda.get_device_capability(device))


def splits_for(device: torch.device, programs: int, walked: int) -> int:
    """Among how many programs to share out what each of so many would walk over: keys, or rows."""
    forced = configs.forced_now().splits
    if forced is not None:
        return forced
    if INTERPRETED:
        processors = INTERPRETED_PROCESSORS
    else:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return configs.choose_splits(programs, walked, processors)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches inside go to this device; on the CPU, to the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
