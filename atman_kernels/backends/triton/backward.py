"""The backward kernels: gradients from the saved lse, with every score made anew and none kept.

`query_gradient` holds a tile of rows and walks over the keys that they see; `key_gradient` holds a block of keys and
walks over the tiles of rows that see them; `broadcast_gradient` holds a tile of what is one number for many pairs of
a row and a key, a position bias or a pack's factors, and walks over all of these. So each number of a result is
summed by one program, in an order that does not change: nothing is added atomically.
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
    score,
)
from atman_kernels.backends.triton.forward import ALIGNED, FAR, FLAGS, OWN
from atman_kernels.backends.triton.primitives import sees, visible_positions

# --- rows that walk over keys ---


@triton.jit
def _sweep(
    by_query,  # [BLOCK_M, BLOCK_D] gradient so far, before the scale
    smallest,  # [BLOCK_M] the smallest score so far,
    lowest,  # [BLOCK_M] the position of the first key that has it,
    ties,  # [BLOCK_M] and how many have it; in the pass "owed" the sum of (1 - c) g
    query,  # [BLOCK_M, BLOCK_D]
    grad_output,  # [BLOCK_M, BLOCK_DV]
    keys_and_values,  # (pointer to the keys of one head, its two strides, pointer to its values, its two strides)
    first,  # [BLOCK_M] each row sees the keys [first, last) of them
    last,
    origin,  # index of the key at position 0, where factors are read
    shift,  # what turns an index into a position; [BLOCK_M] in a pack
    factors,  # None, or pointer to the factors of the first row
    factor_rows,  # None if all rows have the same factors; else ([BLOCK_M] which each row has, first 0; their stride)
    flags,  # None without factors; else (flags of all rows, touched_shift)
    key_mask,  # None, or (pointer to one sequence's, stride)
    bias,  # None, or (pointer, [BLOCK_M] offset of key 0, stride)
    row,  # see `pair_gradients`, each [BLOCK_M, 1]
    unit,
    inner_scale,
    PASS: tl.constexpr,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """All rows of a tile against one array of keys."""
    key, key_row_stride, key_stride, value, value_row_stride, value_stride = keys_and_values
    seeing = first < last
    first = tl.where(seeing, first, FAR)
    last = tl.where(seeing, last, 0)
    stop = tl.max(last)
    start = origin + ((tl.minimum(tl.min(first), FAR - 1) - origin) & -ALIGNED)
    full_start, full_stop = tl.max(first), tl.min(last)

    if factor_rows is not None:
        row_word, positions = factor_rows
        one_row = tl.max(row_word) == 0
    if flags is not None:
        touched, touched_shift = flags
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    p_key = key + o_n.to(tl.int64)[:, None] * key_row_stride + o_d[None, :] * key_stride
    p_value = value + o_n.to(tl.int64)[:, None] * value_row_stride + o_dv[None, :] * value_stride

    for block in tl.range(start, stop, BLOCK_N):
        keys = block + o_n
        in_reach = keys < stop
        # what is read per row and key comes first, as in the forward
        b_factor = None
        flagged = False
        if factors is not None:
            position = tl.multiple_of(block - origin, ALIGNED)
            p_factor = factors + position + o_n
            first_flag = tl.cast(position >> touched_shift, tl.int64)
            last_flag = tl.cast(tl.minimum((position + BLOCK_N - 1) >> touched_shift, FLAGS - 1), tl.int64)
            flagged = (((touched >> first_flag) | (touched >> last_flag)) & 1) != 0
            if factor_rows is None:
                b_factor = tl.load(p_factor, mask=in_reach, other=1.0)[None, :]
                flagged = True  # to look costs less than not to
            else:
                b_factor = tl.full([query.shape[0], BLOCK_N], 1.0, tl.float32)
                if flagged & one_row:
                    b_factor *= tl.load(p_factor, mask=in_reach, other=1.0)[None, :]
                if flagged & (not one_row):
                    o_factor = row_word.to(tl.int64) * positions
                    b_factor = tl.load(o_factor[:, None] + p_factor[None, :], mask=in_reach[None, :], other=1.0)
        b_bias = None
        if bias is not None:
            o_bias = bias[1][:, None] + keys.to(tl.int64)[None, :] * bias[2]
            b_bias = tl.load(bias[0] + o_bias, mask=sees(keys, first, last), other=float("-inf")).to(tl.float32)

        b_key = tl.load(
            p_key + tl.cast(block, tl.int64) * key_row_stride, mask=in_reach[:, None] & (o_d[None, :] < D), other=0.0
        )
        scores, slope = score(
            tl.dot(query, tl.trans(b_key), input_precision=PRECISION), b_bias, unit, inner_scale, SOFTCAP
        )
        at = None
        visible = None
        if MODE == "shifted":
            at = (keys[None, :] + shift[:, None]) if factor_rows is not None else keys[None, :]
            visible = sees(keys, first, last)
            if key_mask is not None:
                b_mask = tl.load(key_mask[0] + keys.to(tl.int64) * key_mask[1], mask=in_reach, other=0)
                visible &= (b_mask != 0)[None, :]
            if bias is not None:
                visible &= b_bias > float("-inf")
        if PASS == "minimum":
            hidden = tl.where(visible, scores, float("inf"))
            found = tl.min(hidden, 1)
            has = visible & (hidden == found[:, None])
            where = tl.min(tl.where(has, at, FAR), 1)
            number = tl.sum(has.to(tl.float32), 1)
            lowest = tl.where(found < smallest, where, tl.where(found == smallest, tl.minimum(lowest, where), lowest))
            ties = tl.where(found < smallest, number, tl.where(found == smallest, ties + number, ties))
            smallest = tl.minimum(smallest, found)
        else:
            b_value = tl.load(
                p_value + tl.cast(block, tl.int64) * value_row_stride,
                mask=in_reach[:, None] & (o_dv[None, :] < DV),
                other=0.0,
            )
            by_weight = tl.dot(grad_output, tl.trans(b_value), input_precision=PRECISION) - row[1]
            exponentials = exponential(scores, b_factor, flagged, row, unit, MODE, False)
            if MODE == "shifted":
                exponentials = tl.where(visible, exponentials, 0.0)
            else:
                if (block < full_start) | (block + BLOCK_N > full_stop):
                    exponentials = tl.where(sees(keys, first, last), exponentials, 0.0)
                if key_mask is not None:
                    b_mask = tl.load(key_mask[0] + keys.to(tl.int64) * key_mask[1], mask=in_reach, other=0)
                    exponentials = tl.where((b_mask != 0)[None, :], exponentials, 0.0)
                if bias is not None:
                    exponentials = tl.where(b_bias > float("-inf"), exponentials, 0.0)
            if PASS == "owed":
                ties += tl.sum((1 - b_factor) * (exponentials * by_weight), 1)
            else:
                _, by_score, _ = pair_gradients(
                    exponentials, by_weight, scores, b_factor, flagged, at, visible, row, unit, MODE, False
                )
                by_query = tl.dot((by_score * slope).to(b_key.dtype), b_key, by_query, input_precision=PRECISION)
    return by_query, smallest, lowest, ties


@triton.jit(do_not_specialize=["rows", "keys", "num_tiles", "window", "touched_shift"])
def query_gradient(
    query,  # (B, Hq, rows, D)
    query_strides,
    key,  # (1|B, Hkv, keys, D), the base
    key_strides,
    value,  # (1|B, Hkv, keys, DV)
    value_strides,
    own_key,  # (1, Hkv, rows, D) of a pack; None for a dense batch, as the next two tensors
    own_key_strides,
    own_value,  # (1, Hkv, rows, DV)
    own_value_strides,
    row_variant,  # (rows,)
    places,  # (PLACES, rows) from `prepare_places`
    grad_output,  # (B, Hq, rows, DV)
    grad_output_strides,
    total,  # (B, Hq, rows) from `prepare_rows`, contiguous as all that follow of this shape
    delta,
    factors,  # (V|B, TERM_HEADS, positions) float32, or None; so are the next four
    touched,  # (V|B, TERM_HEADS) int64
    touched_shift,
    positions,
    own_factors,  # (TERM_HEADS, rows) float32; None for a dense batch
    key_mask,  # (B, keys) uint8, or None
    key_mask_strides,
    bias,  # (1|B, 1|Hq, 1|rows, 1|keys), of a pack (1, 1|Hq, 1|P, 1|P) over positions, or None
    bias_strides,
    minimum,  # (B, Hq, rows): the smallest visible score, 0 if there is none; "shifted" only, as the next two
    lowest,  # int32: the position of the only key that has it; -1 if several have it
    share,  # what each key that has it gets of the minimum's gradient; before the pass "owed" their number
    grad_query,  # (B, Hq, rows, D) contiguous
    rows,
    keys,
    num_tiles,
    window,
    unit,
    inner_scale,
    scale,
    PASS: tl.constexpr,  # "minimum" finds it, "owed" its gradient, "query" is the one that every mode has
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that are folded into a tile's rows: all that share a key head, or 1
    TERM_HEADS: tl.constexpr,  # 1, or HEADS; then GROUP is 1
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
    """The gradient by the queries: rows walk over the keys that they see. `PASS` says what the walk collects."""
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles  # later rows reach further: they start first
    first_head = program // num_tiles % (HEADS // GROUP) * GROUP
    batch = program // num_tiles // (HEADS // GROUP)

    lane = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = lane < rows * GROUP
    lane = tl.minimum(lane, rows * GROUP - 1)  # past the end the last row is computed again
    row = lane // GROUP
    head = (first_head + lane % GROUP).to(tl.int64)
    kv_head = tl.cast(first_head // (HEADS // KV_HEADS), tl.int64)

    if places is None:
        variant = tl.zeros([BLOCK_M], tl.int32) + batch
        first, last = visible_positions(
            row + (keys - rows), tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.int32) + keys, window, IS_CAUSAL
        )
        base_start = tl.zeros([BLOCK_M], tl.int32)
        bias_query = row
        shift = base_start
    else:
        variant = tl.load(row_variant + row)
        first = tl.load(places + BASE_FIRST * rows + row)
        last = tl.load(places + BASE_LAST * rows + row)
        own_first = tl.load(places + OWN_FIRST * rows + row)
        own_last = tl.load(places + OWN_LAST * rows + row)
        shift = tl.load(places + SHIFT * rows + row)
        base_start = tl.load(places + BASE_START * rows + row)
        bias_query = row + shift
    batch = tl.cast(batch, tl.int64)

    offset = (batch * HEADS + head) * rows + row
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    row = row.to(tl.int64)
    p_query = query + batch * query_strides[0] + head * query_strides[1] + row * query_strides[2]
    b_query = tl.load(p_query[:, None] + o_d[None, :] * query_strides[3], mask=o_d[None, :] < D, other=0.0)
    p_grad = grad_output + batch * grad_output_strides[0] + head * grad_output_strides[1] + row * grad_output_strides[2]
    b_grad = tl.load(p_grad[:, None] + o_dv[None, :] * grad_output_strides[3], mask=o_dv[None, :] < DV, other=0.0)
    if MODE == "shifted":
        if PASS == "minimum":
            states = (tl.load(total + offset)[:, None], None, None, None, None)
        else:
            states = (
                tl.load(total + offset)[:, None],
                tl.load(delta + offset)[:, None],
                tl.load(minimum + offset)[:, None],
                tl.load(lowest + offset)[:, None],
                tl.load(share + offset)[:, None],
            )
    else:
        states = (tl.load(total + offset)[:, None], tl.load(delta + offset)[:, None], None, None, None)

    mask_row = None
    if key_mask is not None:
        mask_row = (key_mask + batch * key_mask_strides[0], key_mask_strides[1])
    if bias is not None:
        bias_row = batch * bias_strides[0] + head * bias_strides[1] + bias_query.to(tl.int64) * bias_strides[2]
    if factors is not None:
        word = variant.to(tl.int64) * TERM_HEADS + head % TERM_HEADS
        first_word = tl.min(word)
        p_factors = factors + first_word * positions
        b_touched = tl.reduce_or(tl.load(touched + word), 0)
    p_key = key + batch * key_strides[0] + kv_head * key_strides[1]
    p_value = value + batch * value_strides[0] + kv_head * value_strides[1]
    if places is not None:
        p_own_key = own_key + kv_head * own_key_strides[1]
        p_own_value = own_value + kv_head * own_value_strides[1]

    by_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    smallest = tl.full([BLOCK_M], float("inf"), tl.float32)
    found_lowest = tl.full([BLOCK_M], FAR, tl.int32)
    ties = tl.zeros([BLOCK_M], tl.float32)

    # One base after the other, then the own rows, through one loop: see `forward.attention`.
    parts: tl.constexpr = FAR if places is None else OWN
    base_start = tl.where(first < last, base_start, parts)
    part = tl.min(base_start)
    while part < FAR:
        here = base_start == part
        part_first = tl.where(here, first, 0)
        part_last = tl.where(here, last, 0)
        part_keys = (p_key, key_strides[2], key_strides[3], p_value, value_strides[2], value_strides[3])
        origin = part
        part_shift = shift
        part_factors = None
        factor_rows = None
        flags = None
        part_bias = None
        if factors is not None:
            part_factors = p_factors
            flags = (b_touched, touched_shift)
        if bias is not None:
            part_bias = (bias, bias_row - tl.cast(part, tl.int64) * bias_strides[3], bias_strides[3])
        if places is not None:
            own = part == OWN
            part_first = tl.where(own, own_first, part_first)
            part_last = tl.where(own, own_last, part_last)
            part_keys = (
                tl.where(own, p_own_key, p_key),
                tl.where(own, own_key_strides[2], key_strides[2]),
                tl.where(own, own_key_strides[3], key_strides[3]),
                tl.where(own, p_own_value, p_value),
                tl.where(own, own_value_strides[2], value_strides[2]),
                tl.where(own, own_value_strides[3], value_strides[3]),
            )
            origin = tl.where(own, 0, part)
            part_shift = tl.where(own, shift, -part)
            if factors is not None:
                part_factors = tl.where(own, own_factors + tl.min(head) % TERM_HEADS * rows, p_factors)
                factor_rows = (tl.where(own, 0, (word - first_word).to(tl.int32)), positions)
                flags = (tl.where(own, -1, b_touched), tl.where(own, 31, touched_shift))  # one flag for all: read them
            if bias is not None:
                own_bias_row = bias_row + shift.to(tl.int64) * bias_strides[3]
                part_bias = (bias, tl.where(own, own_bias_row, part_bias[1]), bias_strides[3])
        by_query, smallest, found_lowest, ties = _sweep(
            by_query,
            smallest,
            found_lowest,
            ties,
            b_query,
            b_grad,
            part_keys,
            part_first,
            part_last,
            origin,
            part_shift,
            part_factors,
            factor_rows,
            flags,
            mask_row,
            part_bias,
            states,
            unit,
            inner_scale,
            PASS,
            MODE,
            SOFTCAP,
            PRECISION,
            D,
            DV,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
        )
        part = tl.min(tl.where(base_start > part, base_start, tl.where(part < parts, parts, FAR)))

    if PASS == "minimum":
        tl.store(minimum + offset, tl.where(smallest == float("inf"), 0.0, smallest), mask=stored)
        tl.store(lowest + offset, tl.where(ties == 1, found_lowest, -1), mask=stored)
        tl.store(share + offset, ties, mask=stored)
    elif PASS == "owed":
        number = tl.load(share + offset)
        tl.store(share + offset, tl.where(number > 0, ties / number, 0.0), mask=stored)
    else:
        b_result = (by_query * scale).to(grad_query.dtype.element_ty)
        tl.store(grad_query + offset[:, None] * D + o_d[None, :], b_result, mask=stored[:, None] & (o_d[None, :] < D))


# --- keys that walk over rows ---


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
    grad_key,  # (1|B, Hkv, keys, D) contiguous, or None
    grad_value,  # (1|B, Hkv, keys, DV) contiguous, or None
    grad_factor,  # (B, HEADS // GROUP, keys) float32, of a dense batch; or None
    rows,
    keys,
    num_tiles,
    num_blocks,
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
    key_batch = tl.cast(program // num_blocks // KV_HEADS, tl.int64)

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
    BY_FACTOR: tl.constexpr = grad_factor is not None
    for turn in range(BATCH // KEY_BATCH * heads_apart):
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

        for step in tl.range(0, count):
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
                first, last = visible_positions(
                    row + (keys - rows),
                    tl.zeros([BLOCK_M], tl.int32),
                    tl.zeros([BLOCK_M], tl.int32) + keys,
                    window,
                    IS_CAUSAL,
                )
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

            row = row.to(tl.int64)
            o_query = batch * query_strides[0] + head * query_strides[1] + row * query_strides[2]
            b_query = tl.load(
                query + o_query[:, None] + o_d[None, :] * query_strides[3], mask=o_d[None, :] < D, other=0.0
            )
            b_total = tl.load(total + offset, mask=row_exists, other=float("inf"))[None, :]
            b_delta = tl.load(delta + offset)[None, :]
            states = (b_total, b_delta, None, None, None)
            if MODE == "shifted":
                states = (
                    b_total,
                    b_delta,
                    tl.load(minimum + offset)[None, :],
                    tl.load(lowest + offset)[None, :],
                    tl.load(share + offset, mask=row_exists, other=0.0)[None, :],
                )
            scores, slope = score(
                tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION), b_bias, unit, inner_scale, SOFTCAP
            )
            exponentials = exponential(scores, b_factor, flagged, states, unit, MODE, BY_FACTOR)
            o_grad = batch * grad_output_strides[0] + head * grad_output_strides[1] + row * grad_output_strides[2]
            b_grad = tl.load(
                grad_output + o_grad[:, None] + o_dv[None, :] * grad_output_strides[3],
                mask=o_dv[None, :] < DV,
                other=0.0,
            )
            by_weight = tl.dot(b_value, tl.trans(b_grad), input_precision=PRECISION) - b_delta
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
            o_factor = (batch * (HEADS // GROUP) + first_head // GROUP) * keys + wide
            tl.store(grad_factor + o_factor, by_factor, mask=exists)

    o_result = (key_batch * KV_HEADS + kv_head) * keys + wide
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


# --- one number for many pairs ---


@triton.jit(do_not_specialize=["rows", "keys", "variants", "queries", "places_of_keys", "window"])
def broadcast_gradient(
    query,  # (B, Hq, rows, D)
    query_strides,
    key,  # (1|B, Hkv, keys, D), the base
    key_strides,
    value,  # (1|B, Hkv, keys, DV)
    value_strides,
    own_key,  # (1, Hkv, rows, D) of a pack; None for a dense batch, as the next four tensors
    own_key_strides,
    own_value,  # (1, Hkv, rows, DV)
    own_value_strides,
    suffix_starts,  # (V + 1,)
    prefix_lengths,  # (V,)
    base_starts,  # (V,)
    grad_output,  # (B, Hq, rows, DV)
    grad_output_strides,
    total,  # (B, Hq, rows) from `prepare_rows`
    delta,
    factors,  # (V|B, TERM_HEADS, positions) float32, or None
    positions,
    key_mask,  # (B, keys) uint8, or None
    key_mask_strides,
    bias,  # (1|B, 1|Hq, 1|rows, 1|keys), of a pack (1, 1|Hq, 1|P, 1|P) over positions, or None
    bias_strides,
    minimum,  # (B, Hq, rows) from `query_gradient`, "shifted" only; as the next two
    lowest,
    share,
    result,  # (1|V, 1|Hq, 1|queries, 1|places_of_keys) contiguous
    rows,
    keys,
    variants,  # V, or B
    queries,  # places that the result has for queries and for keys where it is not broadcast: rows and keys of a
    places_of_keys,  # dense batch, positions of a pack
    window,
    unit,
    inner_scale,
    OF: tl.constexpr,  # "bias" | "factor"
    OVER_VARIANTS: tl.constexpr,  # whether one number of the result stands for all variants,
    OVER_HEADS: tl.constexpr,  # all heads,
    OVER_QUERIES: tl.constexpr,  # all queries
    OVER_KEYS: tl.constexpr,  # and all keys
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
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
    """One tile of the result. Queries and keys go by row and key of a dense batch, by position in a pack."""
    program = tl.program_id(0)
    key_blocks = 1 if OVER_KEYS else tl.cdiv(places_of_keys, BLOCK_N)
    query_blocks = 1 if OVER_QUERIES else tl.cdiv(queries, BLOCK_M)
    result_heads: tl.constexpr = 1 if OVER_HEADS else HEADS
    key_begin = program % key_blocks * BLOCK_N
    query_begin = program // key_blocks % query_blocks * BLOCK_M
    result_head = program // key_blocks // query_blocks % result_heads
    result_variant = program // key_blocks // query_blocks // result_heads

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    summed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for turn in range(variants if OVER_VARIANTS else 1):
        variant = turn if OVER_VARIANTS else result_variant
        # where the variant's queries and keys stand
        if suffix_starts is None:
            prefix = keys
            base_start = 0
            row_origin = 0  # the row of query 0
            first_query, last_query = 0, rows
            ahead = keys - rows  # from a query to its position
            all_keys = keys
        else:
            prefix = tl.load(prefix_lengths + variant)
            base_start = tl.load(base_starts + variant)
            suffix_start = tl.load(suffix_starts + variant)
            suffix = tl.load(suffix_starts + variant + 1) - suffix_start
            row_origin = suffix_start - prefix
            first_query, last_query = prefix, prefix + suffix
            ahead = 0
            all_keys = prefix + suffix
        batch = tl.cast(variant if suffix_starts is None else 0, tl.int64)
        key_stop = all_keys
        if not OVER_QUERIES:
            first_query = tl.maximum(first_query - query_begin, 0) // BLOCK_M * BLOCK_M + query_begin
            last_query = tl.minimum(last_query, query_begin + BLOCK_M)
        elif not OVER_KEYS and IS_CAUSAL:
            first_query = tl.maximum(first_query, key_begin - ahead)
        if not OVER_KEYS:
            key_stop = tl.minimum(key_stop, key_begin + BLOCK_N)

        for head in range(0 if OVER_HEADS else result_head, HEADS if OVER_HEADS else result_head + 1):
            kv_head = tl.cast(head // (HEADS // KV_HEADS), tl.int64)
            wide_head = tl.cast(head, tl.int64)
            for query_start in range(first_query, last_query, BLOCK_M):
                at_query = query_start + tl.arange(0, BLOCK_M)
                row_exists = at_query < last_query
                if suffix_starts is not None:
                    row_exists = row_exists & (at_query >= prefix)
                row = tl.where(row_exists, at_query + row_origin, 0)
                offset = (batch * HEADS + wide_head) * rows + row
                row = row.to(tl.int64)
                o_query = batch * query_strides[0] + wide_head * query_strides[1] + row * query_strides[2]
                b_query = tl.load(
                    query + o_query[:, None] + o_d[None, :] * query_strides[3], mask=o_d[None, :] < D, other=0.0
                )
                o_grad = (
                    batch * grad_output_strides[0] + wide_head * grad_output_strides[1] + row * grad_output_strides[2]
                )
                b_grad = tl.load(
                    grad_output + o_grad[:, None] + o_dv[None, :] * grad_output_strides[3],
                    mask=o_dv[None, :] < DV,
                    other=0.0,
                )
                b_total = tl.load(total + offset, mask=row_exists, other=float("inf"))[:, None]
                b_delta = tl.load(delta + offset)[:, None]
                states = (b_total, b_delta, None, None, None)
                if MODE == "shifted":
                    states = (
                        b_total,
                        b_delta,
                        tl.load(minimum + offset)[:, None],
                        tl.load(lowest + offset)[:, None],
                        tl.load(share + offset)[:, None],
                    )
                first, last = visible_positions(
                    at_query + ahead,
                    tl.zeros([BLOCK_M], tl.int32),
                    tl.zeros([BLOCK_M], tl.int32) + all_keys,
                    window,
                    IS_CAUSAL,
                )
                last = tl.where(row_exists, last, 0)
                seen_stop = tl.minimum(key_stop, tl.max(last))
                for key_start in range(0 if OVER_KEYS else key_begin, seen_stop, BLOCK_N):
                    at_key = key_start + tl.arange(0, BLOCK_N)
                    key_exists = at_key < key_stop
                    visible = sees(at_key, first, last)
                    b_factor = None
                    if factors is not None:
                        word = tl.cast(variant, tl.int64) * TERM_HEADS + head % TERM_HEADS
                        b_factor = tl.load(factors + word * positions + at_key, mask=key_exists, other=1.0)[None, :]
                    b_bias = None
                    if bias is not None:
                        o_bias = (
                            batch * bias_strides[0]
                            + wide_head * bias_strides[1]
                            + at_query.to(tl.int64) * bias_strides[2]
                        )
                        p_bias = bias + o_bias[:, None] + at_key.to(tl.int64)[None, :] * bias_strides[3]
                        b_bias = tl.load(p_bias, mask=visible, other=float("-inf")).to(tl.float32)
                        visible &= b_bias > float("-inf")
                    if key_mask is not None:
                        p_mask = key_mask + batch * key_mask_strides[0] + at_key.to(tl.int64) * key_mask_strides[1]
                        visible &= (tl.load(p_mask, mask=key_exists, other=0) != 0)[None, :]

                    base_index = (base_start + at_key).to(tl.int64)
                    p_key = key + batch * key_strides[0] + kv_head * key_strides[1] + base_index * key_strides[2]
                    p_value = (
                        value + batch * value_strides[0] + kv_head * value_strides[1] + base_index * value_strides[2]
                    )
                    p_key = p_key[:, None] + o_d[None, :] * key_strides[3]
                    p_value = p_value[:, None] + o_dv[None, :] * value_strides[3]
                    if suffix_starts is not None:
                        own = (at_key >= prefix)[:, None]
                        own_index = (at_key + row_origin).to(tl.int64)
                        p_own = own_key + kv_head * own_key_strides[1] + own_index * own_key_strides[2]
                        p_key = tl.where(own, p_own[:, None] + o_d[None, :] * own_key_strides[3], p_key)
                        p_own = own_value + kv_head * own_value_strides[1] + own_index * own_value_strides[2]
                        p_value = tl.where(own, p_own[:, None] + o_dv[None, :] * own_value_strides[3], p_value)
                    b_key = tl.load(p_key, mask=key_exists[:, None] & (o_d[None, :] < D), other=0.0)
                    b_value = tl.load(p_value, mask=key_exists[:, None] & (o_dv[None, :] < DV), other=0.0)

                    product = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
                    scores, _ = score(product, b_bias, unit, inner_scale, SOFTCAP)
                    by_weight = tl.dot(b_grad, tl.trans(b_value), input_precision=PRECISION) - b_delta
                    exponentials = exponential(scores, b_factor, True, states, unit, MODE, OF == "factor")
                    exponentials = tl.where(visible, exponentials, 0.0)
                    by_weight = tl.where(visible, by_weight, 0.0)
                    scores = tl.where(visible, scores, 0.0)
                    _, by_score, by_factor = pair_gradients(
                        exponentials,
                        by_weight,
                        scores,
                        b_factor,
                        True,
                        at_key[None, :],
                        visible,
                        states,
                        unit,
                        MODE,
                        OF == "factor",
                    )
                    summed += by_factor if OF == "factor" else by_score

    at_query = query_begin + tl.arange(0, BLOCK_M)
    at_key = key_begin + tl.arange(0, BLOCK_N)
    if OVER_QUERIES:
        summed = tl.sum(summed, 0, keep_dims=True) + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if OVER_KEYS:
        summed = tl.sum(summed, 1, keep_dims=True) + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    result_queries = 1 if OVER_QUERIES else queries
    result_keys = 1 if OVER_KEYS else places_of_keys
    place = tl.cast(result_variant, tl.int64) * result_heads + result_head
    place = (place * result_queries + at_query.to(tl.int64))[:, None] * result_keys + at_key.to(tl.int64)[None, :]
    inside = (at_query < result_queries)[:, None] & (at_key < result_keys)[None, :]
    tl.store(result + place, summed.to(result.dtype.element_ty), mask=inside)
