"""Blocked suppressed attention made of torch's matrix products and its fused CPU attention.

Both ops cut their work into tiles of query rows against one range of keys, small enough that a tile's scores stay
in cache, and hand every tile to `_attend`. Nothing of size variants x queries x keys is ever held.

- Packed: consecutive variants with few rows share a tile, so that the prefix costs one matrix product per key
  head; a variant with many rows is tiled alone, and its causal half is not computed.
- What is additive (log-additive suppression, masks, biases) runs through torch's fused attention. The other modes,
  softcap, and values of another dimension than the keys run as two matrix products around a softmax. In bfloat16
  those products are faster, but they round every score to 8 bits, which moves an answer's loss by tenths of a nat.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from atman_kernels.backends.call import DenseCall, PackedCall, Result
from atman_kernels.formula import ScoreOptions, suppress_scores, wide_dtype, window_visible

# Scores of one tile over all heads: about the 1 MB of L2 that a core has, in the 2 bytes of the unfused path.
TILE_SCORES = 1 << 20
# Short variants are gathered up to this many rows: enough to fill a matrix product once the heads of a group are
# folded in, few enough that the rows x rows part, of which only the diagonal blocks count, stays small.
GATHERED_ROWS = 64
MINIMUM_ROWS = 16
# Half of the causal square of a tile's rows is computed in vain, so tiles are not taller than products need.
MOST_ROWS = 128
ROW_STEP, KEY_STEP = 64, 64  # sizes of 16-bit tiles, see `_padded`


@dataclass(frozen=True)
class Tile:
    """Query rows against one range of keys.

    Attributes:
        batch: entry of the batch; 0 in a pack.
        rows: of the query.
        base: the keys, of the base in a pack.
        own: the pack's own keys after them; None in a dense call.
        visible: (M, N) bool by position, variant and key mask.
        factor: (1|Hq, 1|M, N); None where all are 1.
        bias: (1|Hq, M, N).
        variant: (M,) of each row, in a pack; None for a dense call.
        query_position, key_position: (M,) and (N,), absolute, in a pack.
    """

    batch: int
    rows: slice
    base: slice
    own: slice | None
    visible: Tensor
    factor: Tensor | None
    bias: Tensor | None
    variant: Tensor | None = None
    query_position: Tensor | None = None
    key_position: Tensor | None = None


def suppressed_attention(call: DenseCall) -> Result:
    output, lse = _outputs(call)
    for tile in dense_tiles(call):
        b = tile.batch
        k, v = (x[b if x.shape[0] > 1 else 0, :, tile.base] for x in (call.key, call.value))
        lses = lse[b] if call.options.return_lse else None
        _attend(call.query[b], k, v, tile, call.sinks, call.options, output[b], lses)
    return output, lse


def packed_suppressed_attention(call: PackedCall) -> Result:
    output, lse = _outputs(call)
    for tile in packed_tiles(call):
        k, v = (
            torch.cat([base[:, tile.base], own[:, tile.own]], dim=1)
            for base, own in ((call.base_key, call.key), (call.base_value, call.value))
        )
        lses = lse if call.options.return_lse else None
        _attend(call.query, k, v, tile, call.sinks, call.options, output, lses)
    return output, lse


def dense_tiles(call: DenseCall) -> Iterator[Tile]:
    """The tiles of a dense call, one batch entry after the other."""
    options, factor = call.options, call.factor
    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[2]
    for b in range(batch):
        for rows in _row_blocks(queries, heads * keys):
            position = torch.arange(rows.start, rows.stop, device="cpu") + (keys - queries)
            seen = _key_range(int(position[0]), int(position[-1]), keys, options)
            visible = window_visible(
                position, torch.arange(seen.start, seen.stop, device="cpu"), options.is_causal, options.sliding_window
            )
            bias = None
            if call.key_mask is not None:
                visible = visible & call.key_mask[b, seen]
            if call.position_bias is not None:
                bias = call.position_bias[b if call.position_bias.shape[0] > 1 else 0]  # [1|Hq, 1|Lq, 1|Lk]
                bias = bias.expand(-1, queries, keys)[:, rows, seen]
            row_factor = None
            if factor is not None:
                row_factor = factor[b, ..., seen].unsqueeze(-2)  # [1, N] or [Hq, 1, N]
                row_factor = row_factor if factor.ndim == 3 else row_factor[None]
            yield Tile(b, rows, seen, None, visible, row_factor, bias)


def packed_tiles(call: PackedCall) -> Iterator[Tile]:
    """The tiles of a packed call, in the order of its rows."""
    options, row_variant, row_position = call.options, call.row_variant, call.row_position
    starts, prefixes, bases = (x.tolist() for x in (call.suffix_starts, call.prefix_lengths, call.base_starts))
    for group in _groups(starts, prefixes, bases):
        # the keys of the group: the part of the base that any of its rows can see, then its own rows
        low = _first_visible(group.first_position, options)
        base = slice(group.base_start + low, group.base_start + max(low, group.prefix))
        own = slice(group.first_row, group.last_row)
        prefix_position = torch.arange(low, max(low, group.prefix), device="cpu")
        key_position = torch.cat([prefix_position, row_position[own]])
        in_prefix = len(prefix_position)
        for block in _row_blocks(group.last_row - group.first_row, call.query.shape[0] * len(key_position)):
            rows = slice(own.start + block.start, own.start + block.stop)
            seen = in_prefix + (block.stop if options.is_causal else own.stop - own.start)
            variant = row_variant[rows].long()
            visible = window_visible(row_position[rows], key_position[:seen], options.is_causal, options.sliding_window)
            if group.variants > 1:
                own_variant = row_variant[own][: seen - in_prefix]
                visible[:, :in_prefix] &= prefix_position < call.prefix_lengths[variant][:, None]
                visible[:, in_prefix:] &= own_variant == variant[:, None]
            yield Tile(
                0,
                rows,
                base,
                slice(own.start, own.start + seen - in_prefix),
                visible,
                _row_factors(call.factor, variant, key_position[:seen], group.variants),
                _bias_at(call.position_bias, row_position[rows], key_position[:seen]),
                variant,
                row_position[rows],
                key_position[:seen],
            )


def _row_factors(factor: Tensor | None, variant: Tensor, position: Tensor, variants: int) -> Tensor | None:
    """Factors of a tile's rows at its keys, (1|Hq, 1|M, N); None where they are all 1."""
    if factor is None:
        return None
    per_variant = factor[variant[:1] if variants == 1 else variant.unique_consecutive()][..., position]
    if bool((per_variant == 1).all()):
        return None
    if variants > 1:
        per_variant = factor[variant][..., position]
    if factor.ndim == 2:
        return per_variant[None]
    return per_variant.transpose(0, 1)


def _bias_at(bias: Tensor | None, query_position: Tensor, key_position: Tensor) -> Tensor | None:
    """A bias over absolute positions at a tile's rows and keys, (1|Hq, M, N)."""
    if bias is None:
        return None
    bias = bias[:, query_position] if bias.shape[1] > 1 else bias.expand(-1, len(query_position), -1)
    return bias[..., key_position] if bias.shape[2] > 1 else bias.expand(-1, -1, len(key_position))


def _attend(
    query: Tensor,  # (Hq, T, D), all rows
    key: Tensor,  # (Hkv, N, D), the tile's
    value: Tensor,  # (Hkv, N, Dv)
    tile: Tile,
    sinks: Tensor | None,
    options: ScoreOptions,
    outputs: Tensor,  # (Hq, T, Dv), the tile's rows are written
    lses: Tensor | None,  # (Hq, T)
) -> None:
    """One tile."""
    query, output, lse_output = query[:, tile.rows], outputs[:, tile.rows], None if lses is None else lses[:, tile.rows]
    visible, factor, bias = tile.visible, tile.factor, tile.bias
    if key.shape[1] == 0:  # torch's fused attention divides by the number of keys: the process would die
        output.zero_()
        if lse_output is not None:
            lse_output.copy_(lse_output.new_full((), -torch.inf) if sinks is None else sinks[:, None])
        return
    wide = wide_dtype(query.dtype)
    if factor is not None:
        factor = None if bool((factor == 1).all()) else factor.to(wide)
    additive = factor is None or options.mode == "log_additive"

    # what is added to the scores, -inf where a key is hidden: [1|Hq, M, N]
    offset = torch.zeros(1, 1, 1, dtype=wide, device="cpu") if bias is None else bias.to(wide)
    if factor is not None and additive:
        offset = offset + factor.log()
    added = torch.where(visible, offset, -torch.inf)
    seeing = visible if bias is None and (factor is None or not additive) else added > -torch.inf
    blind = ~seeing.any(dim=-1)  # [M] or [1|Hq, M], rows that see nothing
    with_lse = lse_output is not None or sinks is not None

    if additive and options.softcap is None and key.shape[-1] == value.shape[-1]:
        result, lse = _fused(query, key, value, added, options, with_lse)
    else:
        result, lse = _by_products(query, key, value, added, factor, options, with_lse)
    if blind.any():
        result, lse = result.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.to(wide)[:, None])
        result, lse = result * (lse - with_sink).exp().unsqueeze(-1), with_sink
    output.copy_(result)
    if lse_output is not None:
        lse_output.copy_(lse)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor, options: ScoreOptions, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """torch's fused CPU attention; key heads become the batch, so that a group's query heads share them."""
    heads, rows, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    # the fused kernel reads the last dimension as if it had stride 1
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    q = query.reshape(kv_heads, group, rows, dim)
    k, v = (x[:, None].expand(-1, group, -1, -1) for x in (key, value))
    mask = added[None] if added.shape[0] == 1 else added.reshape(kv_heads, group, *added.shape[1:])
    if not with_lse:
        result = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
        return result.reshape(heads, rows, -1), added.new_zeros(heads, rows)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what the line above calls, with its lse
    result, lse = fused(q, k, v, 0.0, False, attn_mask=mask, scale=options.scale)
    return result.reshape(heads, rows, -1), lse.reshape(heads, rows)


def _by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor,
    factor: Tensor | None,
    options: ScoreOptions,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Two matrix products around a softmax, in the dtype of the query."""
    heads, rows, _ = query.shape
    dtype, wide = query.dtype, added.dtype
    if dtype in (torch.bfloat16, torch.float16):
        query, key, value, added, factor = _padded(query, key, value, added, factor)
    scores = _scores(query, key, options)
    if factor is None or options.mode == "log_additive":
        scores = scores.add_(added.to(scores.dtype))
    else:
        scores = _suppressed(scores, factor, added, options)
    lse = scores[:, :rows].to(wide).logsumexp(dim=-1) if with_lse else added.new_zeros(heads, rows)
    return _weighted(scores.softmax(dim=-1).to(dtype), value)[:, :rows], lse


def _padded(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A tile grown to one of few sizes by rows and hidden keys; the result has those rows at its end.

    oneDNN, which multiplies 16-bit matrices, compiles and keeps a kernel for every shape that it meets. The suffixes
    of a pack come in all lengths: tens of megabytes within a few packs, and a millisecond per new shape.
    """
    rows, keys = -query.shape[1] % ROW_STEP, -key.shape[1] % KEY_STEP
    if factor is not None:
        factor = pad(factor, (0, keys, 0, rows if factor.shape[1] > 1 else 0), value=1.0)
    return (
        pad(query, (0, 0, 0, rows)),
        pad(key, (0, 0, 0, keys)),
        pad(value, (0, 0, 0, keys)),
        pad(added, (0, keys, 0, rows), value=-torch.inf),
        factor,
    )


def _scores(query: Tensor, key: Tensor, options: ScoreOptions) -> Tensor:
    """(Hq, M, N) scaled and capped, in the query's dtype; a group's query heads are rows of one product."""
    heads, rows, dim = query.shape
    kv_heads, keys, _ = key.shape
    folded = (query * options.scale).reshape(kv_heads, heads // kv_heads * rows, dim)
    scores = torch.bmm(folded, key.transpose(1, 2)).reshape(heads, rows, keys)
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    return scores


def _suppressed(scores: Tensor, factor: Tensor, added: Tensor, options: ScoreOptions) -> Tensor:
    """Bias, suppression, mask; `added` holds bias and mask."""
    hidden = added == -torch.inf
    biased = scores.to(added.dtype) + added.masked_fill(hidden, 0.0)
    return suppress_scores(biased, factor, options.mode, ~hidden).masked_fill_(hidden, -torch.inf)


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """(Hq, M, Dv) from weights (Hq, M, N)."""
    heads, rows, keys = weights.shape
    return torch.bmm(weights.reshape(value.shape[0], -1, keys), value).reshape(heads, rows, -1)


@dataclass(frozen=True)
class _Group:
    """Consecutive variants that share tiles."""

    first_row: int
    last_row: int
    variants: int
    base_start: int
    prefix: int  # the longest
    first_position: int  # of any row


def _groups(starts: list[int], prefixes: list[int], bases: list[int]) -> Iterator[_Group]:
    v = 0
    while v < len(prefixes):
        first = v
        v += 1
        while v < len(prefixes) and bases[v] == bases[first] and starts[v + 1] - starts[first] <= GATHERED_ROWS:
            v += 1
        if starts[v] > starts[first]:
            yield _Group(
                starts[first],
                starts[v],
                v - first,
                bases[first],
                max(prefixes[first:v]),
                min(prefixes[first:v]),
            )


def _row_blocks(rows: int, scores_per_row: int) -> Iterator[slice]:
    """Equal blocks of at most the rows that keep a tile's scores within `TILE_SCORES`."""
    limit = min(MOST_ROWS, max(MINIMUM_ROWS, TILE_SCORES // max(1, scores_per_row)))
    blocks = -(-rows // limit)
    for i in range(blocks):
        yield slice(rows * i // blocks, rows * (i + 1) // blocks)


def _first_visible(position: int, options: ScoreOptions) -> int:
    """First key that a query at `position`, or any after it, can see."""
    if options.sliding_window is None:
        return 0
    return max(0, position - options.sliding_window + 1)


def _key_range(first_position: int, last_position: int, keys: int, options: ScoreOptions) -> slice:
    stop = keys if not options.is_causal else max(0, min(keys, last_position + 1))
    return slice(min(_first_visible(first_position, options), stop), stop)


def _outputs(call: DenseCall | PackedCall) -> Result:
    """Room for the results."""
    query = call.query
    output = query.new_empty((*query.shape[:-1], call.value.shape[-1]))
    lse_shape = query.shape[:-1] if call.options.return_lse else (0,)
    return output, query.new_empty(lse_shape, dtype=wide_dtype(query.dtype))
