"""Attention weights of one layer, some rows at a time: fused attention keeps none, so q and k make them again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.formula import wide_dtype, window_visible
from atman_kernels.hf.attention.calls import AttentionCall

ROWS = 128  # of one layer whose weights are there at once


@dataclass(frozen=True)
class RowBlock:
    """Some rows of an attention, and the keys that they may see; no other key has a weight.

    Attributes:
        rows, keys: which.
        scores: (Hq, M, N) before the mask, in float32 (float64 for float64 models).
        visible: (1|Hq, M, N) bool.
        weights: (Hq, M, N); a row that sees nothing has none, and what a sink takes is missing from their sum.
    """

    rows: slice
    keys: slice
    scores: Tensor
    visible: Tensor
    weights: Tensor


def row_blocks(call: AttentionCall, first: int = 0, last: int | None = None) -> Iterator[RowBlock]:
    """The rows [first, last) of an attention with one batch entry, last by default all, `ROWS` at a time."""
    wide = wide_dtype(call.query.dtype)
    query, key = grouped(call.query[0].to(wide), call), call.key[0].to(wide)
    length, scale = call.query.shape[2], call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    last = length if last is None else last
    for start in range(first, last, ROWS):
        rows = slice(start, min(start + ROWS, last))
        keys = _keys_of(call, rows)
        scores = by_group(query[:, :, rows], key[:, keys].mT).mul_(scale)
        if call.softcap is not None:
            scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
        visible, bias = _mask_of(call, rows, keys, length)
        if bias is not None:
            visible = visible & (bias > -torch.inf)
            scores = scores + bias.to(wide).masked_fill(bias == -torch.inf, 0.0)
        yield RowBlock(rows, keys, scores, visible, _weights(scores, visible, call.sinks))


def grouped(states: Tensor, call: AttentionCall) -> Tensor:
    """(Hq, …) of query heads -> (Hkv, heads of a group, …)."""
    return states.reshape(call.key.shape[1], -1, *states.shape[1:])


def by_group(states: Tensor, of_keys: Tensor) -> Tensor:
    """(Hkv, group, M, K) times (Hkv, K, N), which a group shares -> (Hq, M, N)."""
    heads, group, rows, _ = states.shape
    return (states.reshape(heads, group * rows, -1) @ of_keys).reshape(heads * group, rows, -1)


def noted(output: Tensor, call: AttentionCall, tell: Callable[[AttentionCall, Tensor, Tensor], None]) -> Tensor:
    """The output of an attention as it is. On the way back `tell` gets the call, the output and the gradient by it.

    What the output is made of is kept by autograd, which checkpointing knows how to drop.
    """
    return _Noted.apply(output, call.query, call.key, call.value, call, tell)  # type: ignore[no-untyped-call, no-any-return]


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, tell: Any
    ) -> Tensor:
        ctx.save_for_backward(output, query, key, value)
        none = query.new_empty(0)
        ctx.call, ctx.tell = replace(call, query=none, key=none, value=none), tell
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        output, query, key, value = ctx.saved_tensors
        ctx.tell(replace(ctx.call, query=query, key=key, value=value), output, gradient)
        return (gradient, *(None,) * 5)


def _weights(scores: Tensor, visible: Tensor, sinks: Tensor | None) -> Tensor:
    logits = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*logits.shape[:2], 1)
        logits = torch.cat([logits, column], dim=-1)
    return logits.softmax(-1).nan_to_num_()[..., : scores.shape[-1]]


def _keys_of(call: AttentionCall, rows: slice) -> slice:
    """What rows can see by their positions, where these say so."""
    keys = call.key.shape[2]
    if not call.is_causal or (call.mask is not None and call.mask.shape[2] != 1):
        return slice(0, keys)
    first = 0 if call.sliding_window is None else max(0, rows.start - call.sliding_window + 1)
    return slice(first, min(rows.stop, keys))


def _mask_of(call: AttentionCall, rows: slice, keys: slice, length: int) -> tuple[Tensor, Tensor | None]:
    """What some rows see, (1, M, N) bool, and what is added to their scores, (1|Hq, M, N) or None."""
    device, mask, bias = call.query.device, call.mask, call.position_bias
    positions = torch.arange(call.key.shape[2], device=device)
    by_position = window_visible(positions[rows], positions[keys], call.is_causal, call.sliding_window)[None]
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))[0]
        bias = bias.expand(-1, length, len(positions))[:, rows, keys]
    if mask is None:
        return by_position, bias
    for_all_queries, mask = mask.shape[2] == 1, mask[0].expand(-1, length, -1)[:, rows, keys]
    if mask.dtype == torch.bool:  # one row of it is padding, else it says all
        return (by_position & mask if for_all_queries else mask), bias
    hidden = mask <= torch.finfo(mask.dtype).min
    added = mask.float().masked_fill(hidden, -torch.inf)
    return torch.ones_like(by_position), added if bias is None else bias + added
