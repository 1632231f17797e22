"""The gradients of keys and values, and of a dense call's factors: a block of keys walks over the rows that see them.

Nothing is added atomically, see `backward_queries`.
"""

import triton
import triton.language as tl

from atman_kernels.backends.triton.backward_steps import (
    BASE_FIRST,
    BASE_LAST,
    BASE_START,
    OWN_FIRST,
    OWN_LAST,
    SHIFT,
    exponential,
    pair_gradients,
    row_states,
    score,
)
from atman_kernels.backends.triton.primitives import load_rows, visible_positions


@triton.jit(do_not_specialize=["rows", "keys", "num_tiles", "num_blocks", "window"])
def key_gradient(
    query,  # (B, Hq, rows, D)
    query_strides,
    key,  # (1|B, Hkv, keys, D): those whose gradients are made, of a pack its base or its own rows
    key_strides,
    value,  # (1|B, Hkv, keys, DV)
    value_strides,
    row_variant,  # (rows,) of a pack; None for a dense batch, as the next four
    suffix_starts,  # (V + 1,)
    places,  # (PLACES, rows) from `prepare_places`
    tiles,  # (num_blocks, num_tiles) from `list_tiles`, of a base only
    counts,  # (num_blocks,)
    grad_output,  # (B, Hq, rows, DV)
    grad_output_strides,
    total,  # (B, Hq, rows) from `prepare_rows`
    delta,
    factors,  # (V|B, TERM_HEADS, positions) float32, of own rows (TERM_HEADS, positions); or None
    positions,
    key_mask,  # (B, keys) uint8, or None
    key_mask_strides,
    bias,  # (1|B, 1|Hq, 1|rows, 1|keys), of a pack (1, 1|Hq, 1|P, 1|P) over positions, or None
    bias_strides,
    minimum,  # (B, Hq, rows) from `query_gradient`, "shifted" only; as the next two
    lowest,
    share,
    grad_key,  # (num_splits, 1|B, Hkv, keys, D) contiguous, float32 if there are several splits; or None
    grad_value,  # (num_splits, 1|B, Hkv, keys, DV) likewise, or None
    grad_factor,  # (num_splits, B, HEADS // GROUP, keys) float32, of a dense batch; or None
    rows,
    keys,
    num_tiles,
    num_blocks,
    num_splits,  # among which the tiles of rows are shared out
    window,
    unit,
    inner_scale,
    scale,
    KIND: tl.constexpr,  # "dense" | "base" | "own"
    BATCH: tl.constexpr,
    KEY_BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TERM_HEADS: tl.constexpr,
    MODE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One block of keys of one key head; everything here is held as [keys, rows]."""
    program = tl.program_id(0)
    block = program % num_blocks
    kv_head = tl.cast(program // num_blocks % KV_HEADS, tl.int64)
    key_batch = tl.cast(program // num_blocks // KV_HEADS % KEY_BATCH, tl.int64)
    split = 0
    if num_splits != 1:  # 1 is known when compiling, as Triton specializes it
        split = program // num_blocks // KV_HEADS // KEY_BATCH

    start = block * BLOCK_N
    stop = tl.minimum(start + BLOCK_N, keys)
    index = start + tl.arange(0, BLOCK_N)
    exists = index < keys
    wide = index.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    p_key = key + key_batch * key_strides[0] + kv_head * key_strides[1] + wide[:, None] * key_strides[2]
    b_key = tl.load(p_key + o_d[None, :] * key_strides[3], mask=exists[:, None] & (o_d[None, :] < D), other=0.0)
    p_value = value + key_batch * value_strides[0] + kv_head * value_strides[1] + wide[:, None] * value_strides[2]
    b_value = tl.load(
        p_value + o_dv[None, :] * value_strides[3], mask=exists[:, None] & (o_dv[None, :] < DV), other=0.0
    )

    # the rows [row_start, row_stop) see some of these keys
    row_start = 0
    row_stop = rows
    if KIND == "dense":
        if IS_CAUSAL:
            row_start = tl.maximum(start - (keys - rows), 0)
        if window is not None:
            row_stop = tl.minimum(tl.maximum(stop - 1 + window - (keys - rows), 0), rows)
            if not IS_CAUSAL:
                row_start = tl.maximum(start + 1 - window - (keys - rows), 0)
    if KIND == "own":
        row_stop = tl.load(suffix_starts + tl.load(row_variant + stop - 1) + 1)
        row_start = start if IS_CAUSAL else tl.load(suffix_starts + tl.load(row_variant + start))
        if window is not None:
            row_stop = tl.minimum(row_stop, stop - 1 + window)
            if not IS_CAUSAL:
                row_start = tl.maximum(row_start, start + 1 - window)
    first_tile = row_start * GROUP // BLOCK_M
    count = tl.maximum(tl.cdiv(row_stop * GROUP, BLOCK_M) - first_tile, 0)
    if KIND == "base":
        count = tl.load(counts + block)
        p_tiles = tiles + tl.cast(block, tl.int64) * num_tiles
    at = index[:, None]
    if KIND == "own":
        at += tl.load(places + SHIFT * rows + index, mask=exists, other=0)[:, None]

    by_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    by_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Batch entries that share the keys, and heads that are not folded into the rows, come one after the other.
    heads_apart: tl.constexpr = HEADS // KV_HEADS // GROUP
    turns: tl.constexpr = BATCH // KEY_BATCH * heads_apart
    BY_FACTOR: tl.constexpr = grad_factor is not None
    for turn in range(turns):
        batch = key_batch + turn // heads_apart
        first_head = kv_head * (HEADS // KV_HEADS) + turn % heads_apart * GROUP
        key_exists = exists
        if key_mask is not None:
            p_mask = key_mask + batch * key_mask_strides[0] + wide * key_mask_strides[1]
            key_exists = exists & (tl.load(p_mask, mask=exists, other=0) != 0)
        key_factor = None
        key_flagged = False
        if factors is not None and KIND != "base":
            word = first_head % TERM_HEADS
            if KIND == "dense":
                word += batch * TERM_HEADS
            one_factor = tl.load(factors + word * positions + index, mask=exists, other=1.0)
            key_flagged = tl.max((one_factor != 1).to(tl.int32)) != 0
            key_factor = one_factor[:, None]
        by_factor = tl.zeros([BLOCK_N], tl.float32)

        begin, end = 0, count
        if num_splits != 1:
            portion = tl.cdiv(turns * count, num_splits)
            begin = tl.maximum(split * portion - turn * count, 0)
            end = tl.minimum((split + 1) * portion - turn * count, count)
        for step in tl.range(begin, end):
            full = False
            tile = first_tile + step
            if KIND == "base":
                entry = tl.load(p_tiles + step)
                tile = entry >> 2
                full = (entry & 2) != 0
            lane = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row_exists = lane < rows * GROUP
            lane = tl.minimum(lane, rows * GROUP - 1)
            row = lane // GROUP
            head = first_head + lane % GROUP
            offset = (batch * HEADS + head) * rows + row
            if KIND == "dense":
                last_lane = tl.minimum(tile * BLOCK_M + BLOCK_M, rows * GROUP) - 1
                nearest, farthest = tile * BLOCK_M // GROUP + (keys - rows), last_lane // GROUP + (keys - rows)
                full = stop - start == BLOCK_N
                if IS_CAUSAL:
                    full = full & (nearest >= stop - 1)
                if window is not None:
                    full = full & (farthest < start + window)
                    if not IS_CAUSAL:
                        full = full & (nearest > stop - 1 - window)
                first, last = visible_positions(row + (keys - rows), 0, keys, window, IS_CAUSAL)
                bias_query = row
            else:
                first = tl.load(places + (BASE_FIRST if KIND == "base" else OWN_FIRST) * rows + row)
                last = tl.load(places + (BASE_LAST if KIND == "base" else OWN_LAST) * rows + row)
                bias_query = row
                if bias is not None:
                    bias_query = row + tl.load(places + SHIFT * rows + row)
            tile_at = at
            if KIND == "base" and (bias is not None or factors is not None):
                tile_at = at - tl.load(places + BASE_START * rows + row)[None, :]
            # [BLOCK_N, BLOCK_M] which pairs count; rows past the end have weights of 0 by their lse
            visible = (index[:, None] >= first[None, :]) & (index[:, None] < last[None, :]) & exists[:, None]
            b_factor = key_factor
            flagged = key_flagged
            if KIND == "base" and factors is not None:
                b_factor = tl.full([BLOCK_N, BLOCK_M], 1.0, tl.float32)
                flagged = (entry & 1) != 0
                if flagged:
                    word = tl.load(row_variant + row).to(tl.int64) * TERM_HEADS + first_head % TERM_HEADS
                    b_factor = tl.load(factors + word[None, :] * positions + tile_at, mask=visible, other=1.0)
            b_bias = None
            if bias is not None:
                o_bias = batch * bias_strides[0] + head * bias_strides[1] + bias_query.to(tl.int64) * bias_strides[2]
                p_bias = bias + o_bias[None, :] + tile_at.to(tl.int64) * bias_strides[3]
                b_bias = tl.load(p_bias, mask=visible, other=float("-inf")).to(tl.float32)

            b_query = load_rows(query, query_strides, batch, head, row, D, BLOCK_D)
            states = row_states(total, delta, minimum, lowest, share, offset, row_exists, MODE, 0)
            scores, slope = score(
                tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION), b_bias, unit, inner_scale, SOFTCAP
            )
            exponentials = exponential(scores, b_factor, flagged, states, unit, MODE, BY_FACTOR)
            b_grad = load_rows(grad_output, grad_output_strides, batch, head, row, DV, BLOCK_DV)
            by_weight = tl.dot(b_value, tl.trans(b_grad), input_precision=PRECISION) - states[1]
            if key_mask is not None:
                visible &= key_exists[:, None]
            if bias is not None:
                visible &= b_bias > float("-inf")
            if (key_mask is not None) | (bias is not None):
                full = False
            if not full:  # keys that nobody sees may hold anything
                exponentials = tl.where(visible, exponentials, 0.0)
                by_weight = tl.where(visible, by_weight, 0.0)
                scores = tl.where(visible, scores, 0.0)
            weights, by_score, pair_by_factor = pair_gradients(
                exponentials, by_weight, scores, b_factor, flagged, tile_at, visible, states, unit, MODE, BY_FACTOR
            )
            if grad_value is not None:
                by_value = tl.dot(weights.to(b_grad.dtype), b_grad, by_value, input_precision=PRECISION)
            if grad_key is not None:
                by_key = tl.dot((by_score * slope).to(b_query.dtype), b_query, by_key, input_precision=PRECISION)
            if grad_factor is not None:
                by_factor += tl.sum(pair_by_factor, 1)
        if grad_factor is not None:
            o_factor = ((split * BATCH + batch) * (HEADS // GROUP) + first_head // GROUP) * keys + wide
            tl.store(grad_factor + o_factor, by_factor, mask=exists)

    o_result = ((split * KEY_BATCH + key_batch) * KV_HEADS + kv_head) * keys + wide
    if grad_key is not None:
        tl.store(
            grad_key + o_result[:, None] * D + o_d[None, :],
            (by_key * scale).to(grad_key.dtype.element_ty),
            mask=exists[:, None] & (o_d[None, :] < D),
        )
    if grad_value is not None:
        tl.store(
            grad_value + o_result[:, None] * DV + o_dv[None, :],
            by_value.to(grad_value.dtype.element_ty),
            mask=exists[:, None] & (o_dv[None, :] < DV),
        )
