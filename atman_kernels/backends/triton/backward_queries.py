"""The gradients of queries: a tile of rows walks over the keys that they see.

Every score is made anew from the saved lse and none is kept; each number of a result is summed by one program, or by
as many as there are splits, in an order that does not change.
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
from atman_kernels.backends.triton.primitives import (
    ALIGNED,
    FAR,
    OWN,
    flags_of_block,
    keys_of_part,
    load_rows,
    next_part,
    reach,
    rows_of_program,
    sees,
    share_of,
    visible_positions,
)


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
    split,
    num_splits,
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
    """All rows of a tile against one array of keys, or against this split's share of it."""
    key, key_row_stride, key_stride, value, value_row_stride, value_stride = keys_and_values
    first, last, start, stop, full_start, full_stop = reach(first, last, origin)
    if num_splits != 1:  # 1 is known when compiling, as Triton specializes it
        start, stop = share_of(start, stop, split, num_splits, BLOCK_N)

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
            _, _, flagged = flags_of_block(touched, touched_shift, position, BLOCK_N)
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
    grad_query,  # (num_splits, B, Hq, rows, D) contiguous, float32 if there are several splits
    rows,
    keys,
    num_tiles,
    num_splits,  # among which the keys are shared out; 1 but for the pass "query"
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
    batch, split, row, head, kv_head, stored = rows_of_program(rows, num_tiles, BATCH, HEADS, KV_HEADS, GROUP, BLOCK_M)

    if places is None:
        variant = tl.zeros([BLOCK_M], tl.int32) + batch
        first, last = visible_positions(row + (keys - rows), 0, keys, window, IS_CAUSAL)
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
    b_query = load_rows(query, query_strides, batch, head, row, D, BLOCK_D)
    b_grad = load_rows(grad_output, grad_output_strides, batch, head, row, DV, BLOCK_DV)
    states = row_states(total, delta, minimum, lowest, share, offset, None, MODE, 1)

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
    base_keys = (p_key, key_strides[2], key_strides[3], p_value, value_strides[2], value_strides[3])
    if places is not None:
        p_key = own_key + kv_head * own_key_strides[1]
        p_value = own_value + kv_head * own_value_strides[1]
        own_keys = (
            p_key, own_key_strides[2], own_key_strides[3], p_value, own_value_strides[2], own_value_strides[3]
        )  # fmt: skip

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
        part_keys = base_keys
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
            part_keys = keys_of_part(own, own_keys, base_keys)
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
            split,
            num_splits,
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
        part = next_part(part, base_start, parts)

    if PASS == "minimum":
        tl.store(minimum + offset, tl.where(smallest == float("inf"), 0.0, smallest), mask=stored)
        tl.store(lowest + offset, tl.where(ties == 1, found_lowest, -1), mask=stored)
        tl.store(share + offset, ties, mask=stored)
    elif PASS == "owed":
        number = tl.load(share + offset)
        tl.store(share + offset, tl.where(number > 0, ties / number, 0.0), mask=stored)
    else:
        b_result = (by_query * scale).to(grad_query.dtype.element_ty)
        if num_splits != 1:
            offset += tl.cast(split, tl.int64) * BATCH * HEADS * rows
        o_d = tl.arange(0, BLOCK_D)
        tl.store(grad_query + offset[:, None] * D + o_d[None, :], b_result, mask=stored[:, None] & (o_d[None, :] < D))
