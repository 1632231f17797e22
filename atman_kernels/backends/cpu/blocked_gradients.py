"""The backward of `blocked`: the same tiles, each with its scores made again from the saved lse.

Sums go over the tiles in their order. A tile's scores, weights and their gradients are all that is held of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.backends.cpu.blocked import Tile, dense_tiles, packed_tiles
from atman_kernels.formula import Saved, ScoreOptions, suppress_scores, suppression_gradient


def suppressed_attention_backward(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (1|B, Hkv, Lk, D)
    value: Tensor,  # (1|B, Hkv, Lk, Dv)
    factor: Tensor | None,  # (B, Lk) or (B, Hq, Lk)
    key_mask: Tensor | None,  # (B, Lk) bool
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|B, 1|Hq, 1|Lq, 1|Lk)
    *,
    options: ScoreOptions,
    saved: Saved,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    tensors = (query, key, value, factor, key_mask, sinks, position_bias)
    found = _sums(tensors, wanted, saved)
    d_query, d_key, d_value, d_factor, _, d_sinks, d_bias = found
    delta = saved.delta()
    for tile in dense_tiles(query, key, factor, key_mask, position_bias, options):
        b = tile.batch
        kv = b if key.shape[0] > 1 else 0
        parts = _differentiate(
            query[b], key[kv, :, tile.base], value[kv, :, tile.base], tile, options, saved.lse[b], delta[b],
            saved.grad_output[b], d_query is not None, d_key is not None, d_value is not None, d_factor is not None,
            d_bias is not None,
        )  # fmt: skip
        if d_query is not None:
            d_query[b, :, tile.rows] = parts.query
        for total, part in ((d_key, parts.key), (d_value, parts.value)):
            if total is not None:
                total[kv, :, tile.base] += part
        if d_factor is not None:
            per_key = parts.factor.sum(1)  # [Hq, N]
            d_factor[b, ..., tile.base] += per_key if d_factor.ndim == 3 else per_key.sum(0)
        if d_bias is not None:
            entry = d_bias[b if d_bias.shape[0] > 1 else 0]
            _add_broadcast(entry, tile.rows, tile.base, parts.bias)
    if d_sinks is not None and sinks is not None:
        d_sinks += saved.sink_gradient(sinks, delta)
    return [None if x is None or t is None else x.to(t.dtype) for x, t in zip(found, tensors, strict=True)]


def packed_suppressed_attention_backward(
    query: Tensor,  # (Hq, T, D)
    key: Tensor,  # (Hkv, T, D)
    value: Tensor,  # (Hkv, T, Dv)
    base_key: Tensor,  # (Hkv, S, D)
    base_value: Tensor,  # (Hkv, S, Dv)
    suffix_starts: Tensor,  # (V + 1,)
    prefix_lengths: Tensor,  # (V,)
    base_starts: Tensor,  # (V,)
    row_variant: Tensor,  # (T,)
    row_position: Tensor,  # (T,)
    factor: Tensor | None,  # (V, K) or (V, Hq, K)
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|Hq, 1|P, 1|P)
    *,
    options: ScoreOptions,
    saved: Saved,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    layout = (suffix_starts, prefix_lengths, base_starts, row_variant, row_position)
    tensors = (query, key, value, base_key, base_value, *layout, factor, sinks, position_bias)
    found = _sums(tensors, wanted, saved)
    d_query, d_key, d_value, d_base_key, d_base_value, *_, d_factor, d_sinks, d_bias = found
    delta = saved.delta()
    for tile in packed_tiles(query, *layout, factor, position_bias, options):
        assert tile.own is not None
        k, v = (torch.cat([b[:, tile.base], o[:, tile.own]], 1) for b, o in ((base_key, key), (base_value, value)))
        of_key, of_value = d_key is not None or d_base_key is not None, d_value is not None or d_base_value is not None
        parts = _differentiate(
            query, k, v, tile, options, saved.lse, delta, saved.grad_output,
            d_query is not None, of_key, of_value, d_factor is not None, d_bias is not None,
        )  # fmt: skip
        if d_query is not None:
            d_query[:, tile.rows] = parts.query
        in_base = tile.base.stop - tile.base.start
        for own, base, part in ((d_key, d_base_key, parts.key), (d_value, d_base_value, parts.value)):
            if base is not None:
                base[:, tile.base] += part[:, :in_base]
            if own is not None:
                own[:, tile.own] += part[:, in_base:]
        if d_factor is not None or d_bias is not None:
            for variant, rows, columns in _variants_of(tile, in_base):
                positions = _span(tile.key_position, columns)
                if d_factor is not None:
                    per_key = parts.factor[:, rows, columns].sum(1)
                    d_factor[variant, ..., positions] += per_key if d_factor.ndim == 3 else per_key.sum(0)
                if d_bias is not None:
                    _add_broadcast(d_bias, _span(tile.query_position, rows), positions, parts.bias[:, rows, columns])
    if d_sinks is not None and sinks is not None:
        d_sinks += saved.sink_gradient(sinks, delta)
    return [None if x is None or t is None else x.to(t.dtype) for x, t in zip(found, tensors, strict=True)]


def _sums(tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...], saved: Saved) -> list[Tensor | None]:
    """Zeros in the dtype of the lse, for what is wanted."""
    return [
        saved.lse.new_zeros(x.shape) if need and x is not None else None
        for x, need in zip(tensors, wanted, strict=True)
    ]


def _add_broadcast(total: Tensor, rows: slice, columns: slice, part: Tensor) -> None:
    """Adds part (Hq, M, N) to its place in (1|Hq, 1|queries, 1|keys), summed where that has 1."""
    for axis, size in enumerate(total.shape):
        part = part.sum(axis, keepdim=True) if size == 1 else part
    total[:, slice(None) if total.shape[1] == 1 else rows, slice(None) if total.shape[2] == 1 else columns] += part


def _variants_of(tile: Tile, in_base: int) -> Iterator[tuple[int, slice, slice]]:
    """Each variant of a pack's tile with its rows, and with columns in stretches of adjacent positions."""
    assert tile.variant is not None
    first = 0
    for variant, count in zip(*(x.tolist() for x in tile.variant.unique_consecutive(return_counts=True)), strict=True):
        rows = slice(first, first + count)
        first += count
        seen = tile.visible[rows].any(0).nonzero().flatten()  # columns
        for columns in (seen[seen < in_base], seen[seen >= in_base]):
            if len(columns):
                yield variant, rows, slice(int(columns[0]), int(columns[-1]) + 1)


def _span(positions: Tensor | None, at: slice) -> slice:
    """Adjacent positions as a slice."""
    assert positions is not None
    return slice(int(positions[at.start]), int(positions[at.stop - 1]) + 1)


@dataclass(frozen=True)
class _Parts:
    """A tile's gradients; what is not wanted has no elements."""

    query: Tensor  # (Hq, M, D)
    key: Tensor  # (Hkv, N, D)
    value: Tensor  # (Hkv, N, Dv)
    factor: Tensor  # (Hq, M, N), by each score's factor
    bias: Tensor  # (Hq, M, N)


def _differentiate(
    queries: Tensor,  # (Hq, T, D), all rows
    key: Tensor,  # (Hkv, N, D), the tile's
    value: Tensor,  # (Hkv, N, Dv)
    tile: Tile,
    options: ScoreOptions,
    lses: Tensor,  # (Hq, T)
    deltas: Tensor,  # (Hq, T)
    grad_outputs: Tensor,  # (Hq, T, Dv)
    of_query: bool,
    of_key: bool,
    of_value: bool,
    of_factor: bool,
    of_bias: bool,
) -> _Parts:
    wide, none = lses.dtype, lses.new_empty(0)
    query, d_output = queries[:, tile.rows].to(wide), grad_outputs[:, tile.rows].to(wide)
    key, value = key.to(wide), value.to(wide)
    lse, delta = lses[:, tile.rows, None], deltas[:, tile.rows, None]
    heads, rows, _ = query.shape
    kv_heads, keys, _ = key.shape

    def folded(x: Tensor) -> Tensor:  # (Hq, M, …) -> (Hkv, rows of its group, …)
        return x.reshape(kv_heads, heads // kv_heads * rows, -1)

    scores = torch.bmm(folded(query * options.scale), key.mT).reshape(heads, rows, keys)
    capped_slope = None
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_()
        capped_slope = 1 - scores.square()
        scores = scores.mul_(options.softcap)
    visible = tile.visible[None]
    if tile.bias is not None:
        hidden = tile.bias == -torch.inf
        visible = visible & ~hidden
        scores = scores + tile.bias.to(wide).masked_fill(hidden, 0.0)
    visible = visible & (lse != -torch.inf)
    factor = tile.factor if tile.factor is None else tile.factor.to(wide)
    if factor is None and of_factor:
        factor = scores.new_ones(1, 1, 1)  # all are 1, and have a gradient
    suppressed = scores if factor is None else suppress_scores(scores, factor, options.mode, visible)
    weights = (suppressed - lse).exp_().masked_fill_(~visible, 0.0)
    d_value = torch.bmm(folded(weights).mT, folded(d_output)) if of_value else none
    if not (of_query or of_key or of_factor or of_bias):
        return _Parts(none, none, d_value, none, none)

    rise = torch.bmm(folded(d_output), value.mT).reshape(heads, rows, keys).sub_(delta)  # of the loss with a weight
    d_scores, d_factor = suppression_gradient(
        (weights * rise).masked_fill_(~visible, 0.0), scores, factor, options.mode, visible
    )
    if of_factor and factor is not None and d_factor is not None and options.mode == "log_additive":
        removed = (factor == 0) & visible
        if removed.any():
            d_factor = torch.where(removed, (scores - lse).exp() * rise, d_factor)
    d_bias = d_scores
    if capped_slope is not None:
        d_scores = d_scores * capped_slope
    d_query = torch.bmm(folded(d_scores), key).mul_(options.scale).reshape(heads, rows, -1) if of_query else none
    d_key = torch.bmm(folded(d_scores).mT, folded(query)).mul_(options.scale) if of_key else none
    return _Parts(d_query, d_key, d_value, none if d_factor is None else d_factor, d_bias)
