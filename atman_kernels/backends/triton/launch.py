"""From validated tensors to launches: strides, units, splits and grids. Nothing here waits for the device."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atman_kernels.backends.triton import configs, forward
from atman_kernels.backends.triton.configs import KernelConfig
from atman_kernels.formula import ScoreOptions

LOG2_E = math.log2(math.e)
INTERPRETED = type(forward.attention).__name__ == "InterpretedFunction"
# What the interpreter stands for: a device of few processors, so that small calls are split there too.
INTERPRETED_ARCHITECTURE, INTERPRETED_PROCESSORS = "sm_90", 4
MOST_REGISTERS = 255  # of a thread: told so, the assembler does not spill to fit more blocks on a processor
LEAST_SCALE = 1e-6
LARGEST_WINDOW = 1 << 30  # positions plus a window stay within 32 bits
POSITIONS_STEP = 16  # the alignment that Triton recognizes in an argument
MOST_KEYS = 128  # of a block
OWN_BLOCK = 256
PREPARED_BLOCK = 64  # times 64 flags: factors that are read at once


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
    _, kv_heads, keys, value_dim = value.shape
    output = query.new_empty(batch, heads, rows, value_dim)
    lse = query.new_empty((batch, heads, rows) if options.return_lse else (0,), dtype=torch.float32)
    if rows == 0 or batch == 0 or heads == 0:
        return output, lse
    if INTERPRETED and query.dtype == torch.bfloat16:  # it gets products of bfloat16 wrong
        query, key, value = query.float(), key.float(), value.float()
        if layout is not None:
            layout = Layout(layout.own_key.float(), layout.own_value.float(), *_indices(layout))

    per_head = extras.factor is not None and extras.factor.ndim == 3
    group = 1 if per_head else heads // kv_heads  # rows of a tile differ in their factors by variant only
    config = _config(query, value_dim, group, layout is not None, extras.bias is not None)
    tiles = -(-rows * group // config.block_m)
    programs = tiles * (heads // group) * batch
    splits = _splits(query.device, programs, keys)
    arguments = _arguments(query, key, value, layout, extras, options, config, group, tiles, splits)
    grid = (programs * splits,)
    with _on(query.device):
        if extras.factor is not None:
            arguments |= _prepared(extras.factor, layout, arguments["unit"], options.mode)
        if options.mode == "shifted" and extras.factor is not None:
            minimum = query.new_empty((splits, batch, heads, rows), dtype=torch.float32)
            arguments["minimum"] = minimum
            without = {"terms": None, "sinks": None}
            run(forward.attention, grid, arguments | without | {"MINIMUM_PASS": True})
        if splits == 1:
            arguments |= {"output": output, "lse": lse if options.return_lse else None}
            run(forward.attention, grid, arguments)
        else:
            partial = query.new_empty((splits, batch, heads, rows, value_dim), dtype=torch.float32)
            partial_lse = query.new_empty((splits, batch, heads, rows), dtype=torch.float32)
            run(forward.attention, grid, arguments | {"output": partial, "lse": partial_lse, "sinks": None})
            _merge(partial, partial_lse, extras.sinks, output, lse if options.return_lse else None)
    return output, lse


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    kernel[grid](**arguments)


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
    if scale < LEAST_SCALE:
        return LOG2_E, scale
    return scale * LOG2_E, None


def float32_precision() -> str:
    """How float32 is multiplied: exactly, unless torch's own matrix products may use TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | None,
    extras: Extras,
    options: ScoreOptions,
    config: KernelConfig,
    group: int,
    tiles: int,
    splits: int,
) -> dict[str, Any]:
    """What the passes over one call have in common."""
    batch, heads, rows, dim = query.shape
    _, kv_heads, keys, value_dim = value.shape
    unit, inner_scale = score_units(options.scale, options.softcap)
    window = options.sliding_window
    own_key, own_value = (layout.own_key, layout.own_value) if layout else (None, None)
    indices = _indices(layout) if layout else (None,) * 4
    names = ("suffix_starts", "prefix_lengths", "base_starts", "row_variant")
    return {
        **_with_strides("query", query, 4),
        **_with_strides("key", key, 4),
        **_with_strides("value", value, 4),
        **_with_strides("own_key", own_key, 4),
        **_with_strides("own_value", own_value, 4),
        **dict(zip(names, indices, strict=True)),
        "terms": None,
        "touched": None,
        "touched_shift": 0,
        "positions": 0,
        "own_terms": None,
        "TERM_HEADS": 1,
        **_with_strides("key_mask", None if extras.key_mask is None else extras.key_mask.view(torch.uint8), 2),
        **_with_strides("bias", extras.bias, 4),
        "sinks": extras.sinks,
        "sinks_stride": 0 if extras.sinks is None else extras.sinks.stride(0),
        "minimum": None,
        "output": None,
        "lse": None,
        "rows": rows,
        "keys": keys,
        "num_tiles": tiles,
        "num_splits": splits,
        "window": None if window is None else min(window, LARGEST_WINDOW),
        "unit": unit,
        "inner_scale": inner_scale,
        "BATCH": batch,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "MODE": options.mode,
        "MINIMUM_PASS": False,
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


def _indices(layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return layout.suffix_starts, layout.prefix_lengths, layout.base_starts, layout.row_variant


def _with_strides(name: str, tensor: Tensor | None, rank: int) -> dict[str, Any]:
    """A tensor and its strides as arguments; an axis of length 1 is broadcast."""
    if tensor is None:
        return {name: None, f"{name}_strides": (0,) * rank}
    strides = tuple(s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return {name: tensor, f"{name}_strides": strides}


def _prepared(factor: Tensor, layout: Layout | None, unit: float, mode: str) -> dict[str, Any]:
    """Factors as the kernel wants them, with flags that tell which of them are 1: made anew in every call."""
    factor = factor if factor.ndim == 3 else factor.unsqueeze(1)
    variants, heads, length = factor.shape
    positions = -(-length // POSITIONS_STEP) * POSITIONS_STEP
    # A block of keys may reach past the last position, and what it reads there is masked afterwards.
    terms = factor.new_empty(variants * heads * positions + MOST_KEYS, dtype=torch.float32)
    touched = factor.new_empty((variants, heads), dtype=torch.int64)
    shift = touched_shift(length)
    common = {**_with_strides("factor", factor, 3), "unit": unit, "HEADS": heads, "MODE": mode}
    run(
        forward.prepare_factors,
        (variants * heads,),
        common
        | {
            "terms": terms,
            "touched": touched,
            "length": length,
            "positions": positions,
            "touched_shift": shift,
            "BLOCK": PREPARED_BLOCK,
        },
    )
    prepared = {"terms": terms, "touched": touched, "touched_shift": shift, "positions": positions, "TERM_HEADS": heads}
    if layout is None:
        return prepared
    rows = layout.row_variant.shape[0]
    own_terms = factor.new_empty(heads * rows + MOST_KEYS, dtype=torch.float32)
    run(
        forward.prepare_own_factors,
        (heads * -(-rows // OWN_BLOCK),),
        common
        | {
            "own_terms": own_terms,
            "suffix_starts": layout.suffix_starts,
            "prefix_lengths": layout.prefix_lengths,
            "row_variant": layout.row_variant,
            "rows": rows,
            "BLOCK": OWN_BLOCK,
        },
    )
    return prepared | {"own_terms": own_terms}


def touched_shift(length: int) -> int:
    """log2 of the positions that one flag speaks for: 64 flags reach over all, and no block of keys spans three.

    Example:
        >>> touched_shift(500), touched_shift(8192), touched_shift(8193)
        (7, 7, 8)
    """
    return max(7, ((length - 1) >> 6).bit_length())


def _merge(partial: Tensor, partial_lse: Tensor, sinks: Tensor | None, output: Tensor, lse: Tensor | None) -> None:
    splits, batch, heads, rows, value_dim = partial.shape
    all_rows = batch * heads * rows
    run(
        forward.merge,
        (all_rows,),
        {
            "partial": partial,
            "partial_lse": partial_lse,
            "sinks": sinks,
            "sinks_stride": 0 if sinks is None else sinks.stride(0),
            "output": output,
            "lse": lse,
            "all_rows": all_rows,
            "rows": rows,
            "num_splits": splits,
            "HEADS": heads,
            "DV": value_dim,
            "BLOCK_SPLITS": 1 << (splits - 1).bit_length(),
            "BLOCK_DV": configs.padded(value_dim),
        },
    )


def _config(query: Tensor, value_dim: int, group: int, is_packed: bool, has_bias: bool) -> KernelConfig:
    forced = configs.forced_now().config
    if forced is not None:
        return forced
    _, _, rows, dim = query.shape
    if INTERPRETED:
        name = INTERPRETED_ARCHITECTURE
    else:
        name = configs.architecture(torch.cuda.get_device_capability(query.device))
    regime = configs.regime(rows * group, is_packed)
    return configs.choose(
        configs.load(name), query.element_size(), regime, dim, value_dim, rows * group, has_bias=has_bias
    )


def _splits(device: torch.device, programs: int, keys: int) -> int:
    forced = configs.forced_now().splits
    if forced is not None:
        return forced
    if INTERPRETED:
        processors = INTERPRETED_PROCESSORS
    else:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return configs.choose_splits(programs, keys, processors)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
