"""The backward of `blocked`: the same tiles, each with its scores made again from the saved lse.

Sums go over the tiles in their order. A tile's scores, weights and their gradients are all that is held of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.backends.call import DenseCall, Gradients, PackedCall, Wanted
from atman_kernels.backends.cpu.blocked import Tile, dense_tiles, packed_tiles
from atman_kernels.formula import Saved, ScoreOptions, suppress_scores, suppression_gradient


def suppressed_attention_backward(call: DenseCall, saved: Saved, wanted: Wanted) -> Gradients:
    sums, delta = _sums(call, saved, wanted), saved.delta()
    for tile in dense_tiles(call):
        b = tile.batch
        kv = b if call.key.shape[0] > 1 else 0
        key, value = call.key[kv, :, tile.base], call.value[kv, :, tile.base]
        row = _Rows(call.query[b], saved.lse[b], delta[b], saved.grad_output[b])
        parts = _differentiate(row, key, value, tile, call.options, wanted)
        if "query" in sums:
            sums["query"][b, :, tile.rows] = parts.query
        for name, part in (("key", parts.key), ("value", parts.value)):
            if name in sums:
                sums[name][kv, :, tile.base] += part
        if "factor" in sums:
            total, per_key = sums["factor"], parts.factor.sum(1)  # [Hq, N]
            total[b, ..., tile.base] += per_key if total.ndim == 3 else per_key.sum(0)
        if "position_bias" in sums:
            total = sums["position_bias"]
            _add_broadcast(total[b if total.shape[0] > 1 else 0], tile.rows, tile.base, parts.bias)
    return _finished(call, saved, delta, sums)


def packed_suppressed_attention_backward(call: PackedCall, saved: Saved, wanted: Wanted) -> Gradients:
    sums, delta = _sums(call, saved, wanted), saved.delta()
    of_tiles = {name.removeprefix("base_") for name in wanted}
    rows = _Rows(call.query, saved.lse, delta, saved.grad_output)
    for tile in packed_tiles(call):
        assert tile.own is not None
        pairs = (call.base_key, call.key), (call.base_value, call.value)
        key, value = (torch.cat([base[:, tile.base], own[:, tile.own]], 1) for base, own in pairs)
        parts = _differentiate(rows, key, value, tile, call.options, of_tiles)
        if "query" in sums:
            sums["query"][:, tile.rows] = parts.query
        in_base = tile.base.stop - tile.base.start
        for name, part in (("key", parts.key), ("value", parts.value)):
            if f"base_{name}" in sums:
                sums[f"base_{name}"][:, tile.base] += part[:, :in_base]
            if name in sums:
                sums[name][:, tile.own] += part[:, in_base:]
        if "factor" in sums or "position_bias" in sums:
            _add_by_variant(sums, tile, parts, in_base)
    return _finished(call, saved, delta, sums)


def _sums(call: DenseCall | PackedCall, saved: Saved, wanted: Wanted) -> Gradients:
    """Zeros in the dtype of the lse, for what is wanted."""
    return {name: saved.lse.new_zeros(getattr(call, name).shape) for name in wanted}


def _finished(call: DenseCall | PackedCall, saved: Saved, delta: Tensor, sums: Gradients) -> Gradients:
    """The sums over all tiles in the dtypes of the call's tensors, with the sinks' gradient."""
    if "sinks" in sums and call.sinks is not None:
        sums["sinks"] = saved.sink_gradient(call.sinks, delta)
    return {name: total.to(getattr(call, name).dtype) for name, total in sums.items()}


def _add_by_variant(sums: Gradients, tile: Tile, parts: "_Parts", in_base: int) -> None:
    """The gradients of a pack's tile by factors and biases, which go by variant and position."""
    for variant, rows, columns in _variants_of(tile, in_base):
        positions = _span(tile.key_position, columns)
        if "factor" in sums:
            total, per_key = sums["factor"], parts.factor[:, rows, columns].sum(1)
            total[variant, ..., positions] += per_key if total.ndim == 3 else per_key.sum(0)
        if "position_bias" in sums:
            queries = _span(tile.query_position, rows)
            _add_broadcast(sums["position_bias"], queries, positions, parts.bias[:, rows, columns])


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
class _Rows:
    """All rows of a batch entry, or of a pack."""

    query: Tensor  # (Hq, T, D)
    lse: Tensor  # (Hq, T)
    delta: Tensor  # (Hq, T)
    grad_output: Tensor  # (Hq, T, Dv)


@dataclass(frozen=True)
class _Parts:
    """A tile's gradients; what is not wanted has no elements."""

    query: Tensor  # (Hq, M, D)
    key: Tensor  # (Hkv, N, D)
    value: Tensor  # (Hkv, N, Dv)
    factor: Tensor  # (Hq, M, N), by each score's factor
    bias: Tensor  # (Hq, M, N)


def _capped_and_biased(
    scores: Tensor, tile: Tile, lse: Tensor, options: ScoreOptions
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scores (Hq, M, N) before suppression, the softcap's slope at each, and which of them are visible."""
    slope = None
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square()
        scores = scores.mul_(options.softcap)
    visible = tile.visible[None] & (lse != -torch.inf)
    if tile.bias is not None:
        hidden = tile.bias == -torch.inf
        visible = visible & ~hidden
        scores = scores + tile.bias.to(scores.dtype).masked_fill(hidden, 0.0)
    return scores, slope, visible


def _differentiate(
    all_rows: _Rows,
    key: Tensor,  # (Hkv, N, D), the tile's
    value: Tensor,  # (Hkv, N, Dv)
    tile: Tile,
    options: ScoreOptions,
    wanted: Wanted,
) -> _Parts:
    wide, none = all_rows.lse.dtype, all_rows.lse.new_empty(0)
    query, d_output = all_rows.query[:, tile.rows].to(wide), all_rows.grad_output[:, tile.rows].to(wide)
    key, value = key.to(wide), value.to(wide)
    lse, delta = all_rows.lse[:, tile.rows, None], all_rows.delta[:, tile.rows, None]
    heads, rows, _ = query.shape
    kv_heads, keys, _ = key.shape

    def folded(x: Tensor) -> Tensor:  # (Hq, M, …) -> (Hkv, rows of its group, …)
        return x.reshape(kv_heads, heads // kv_heads * rows, -1)

    scores = torch.bmm(folded(query * options.scale), key.mT).reshape(heads, rows, keys)
    scores, capped_slope, visible = _capped_and_biased(scores, tile, lse, options)
    factor = tile.factor if tile.factor is None else tile.factor.to(wide)
    if factor is None and "factor" in wanted:
        factor = scores.new_ones(1, 1, 1)  # all are 1, and have a gradient
    suppressed = scores if factor is None else suppress_scores(scores, factor, options.mode, visible)
    weights = (suppressed - lse).exp_().masked_fill_(~visible, 0.0)
    d_value = torch.bmm(folded(weights).mT, folded(d_output)) if "value" in wanted else none
    if not wanted & {"query", "key", "factor", "position_bias"}:
        return _Parts(none, none, d_value, none, none)

    rise = torch.bmm(folded(d_output), value.mT).reshape(heads, rows, keys).sub_(delta)  # of the loss with a weight
    d_scores, d_factor = suppression_gradient(
        (weights * rise).masked_fill_(~visible, 0.0), scores, factor, options.mode, visible
    )
    if "factor" in wanted and factor is not None and d_factor is not None and options.mode == "log_additive":
        removed = (factor == 0) & visible
        if removed.any():
            d_factor = torch.where(removed, (scores - lse).exp() * rise, d_factor)
    d_bias = d_scores
    if capped_slope is not None:
        d_scores = d_scores * capped_slope
    d_query = (
        torch.bmm(folded(d_scores), key).mul_(options.scale).reshape(heads, rows, -1) if "query" in wanted else none
    )
    d_key = torch.bmm(folded(d_scores).mT, folded(query)).mul_(options.scale) if "key" in wanted else none
    return _Parts(d_query, d_key, d_value, none if d_factor is None else d_factor, d_bias)
