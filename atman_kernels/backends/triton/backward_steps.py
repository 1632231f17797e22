"""What the backward kernels are made of: the gradients of one pair, and what is prepared before they start.

With s a score before suppression, s' after it, p = exp(s' - lse), e = exp(s - lse), dp = dO·v and g = p (dp - delta),
the gradients of a pair of a row and a key are

- "log_additive": g by s, e (dp - delta) by the factor, which a factor of 0 has, too
- "multiplicative": c g by s, g s by the factor
- "shifted": c g by s, g (s - m) by the factor; what m is owed, sum of (1 - c) g over the row, goes to the keys that
  have the score m, in equal shares
"""

import triton
import triton.language as tl

from atman_kernels.backends.triton.primitives import (
    FAR,
    FLAGS,
    LN_2,
    LOG2_E,
    suppression_term,
    tanh,
    visible_positions,
)

# Rows of `places`, one entry per row of a pack: the base keys [first, last) and the own rows [first, last) that it
# sees as indices, what turns an own row's index into its position, and where its base starts.
BASE_FIRST: tl.constexpr = tl.constexpr(0)
BASE_LAST: tl.constexpr = tl.constexpr(1)
OWN_FIRST: tl.constexpr = tl.constexpr(2)
OWN_LAST: tl.constexpr = tl.constexpr(3)
SHIFT: tl.constexpr = tl.constexpr(4)
BASE_START: tl.constexpr = tl.constexpr(5)
PLACES: tl.constexpr = tl.constexpr(6)
# Rows of `reach`, one entry per tile of a pack: hull and intersection of what its rows see of the base; their base's
# start, or FAR if they have several.
FIRST: tl.constexpr = tl.constexpr(0)
LAST: tl.constexpr = tl.constexpr(1)
FULL_FIRST: tl.constexpr = tl.constexpr(2)
FULL_LAST: tl.constexpr = tl.constexpr(3)
TILE_BASE: tl.constexpr = tl.constexpr(4)
REACH: tl.constexpr = tl.constexpr(5)


# --- one pair of a row and a key, in either orientation ---


@triton.jit
def row_states(
    total,  # (B, Hq, rows), as the next four
    delta,
    minimum,
    lowest,
    share,
    offset,  # [M], of each row in them
    exists,  # [M]: the other rows have weights of 0; None: all count
    MODE: tl.constexpr,
    AXIS: tl.constexpr,  # along which the keys lie
):
    """(lse, delta, minimum, lowest, share) of rows, as `query_gradient` has them; the last three in "shifted" only."""
    gone, nothing = (None, None) if exists is None else (float("inf"), 0.0)
    b_total = tl.expand_dims(tl.load(total + offset, mask=exists, other=gone), AXIS)
    b_delta = tl.expand_dims(tl.load(delta + offset), AXIS)
    states = (b_total, b_delta, None, None, None)
    if MODE == "shifted":
        states = (
            b_total,
            b_delta,
            tl.expand_dims(tl.load(minimum + offset), AXIS),
            tl.expand_dims(tl.load(lowest + offset), AXIS),
            tl.expand_dims(tl.load(share + offset, mask=exists, other=nothing), AXIS),
        )
    return states


@triton.jit
def score(product, bias, unit, inner_scale, SOFTCAP: tl.constexpr):
    """Scores before suppression in the kernel's units, and what the softcap makes of a gradient on its way back."""
    scores = product
    slope = 1.0
    if inner_scale is not None:
        scores *= inner_scale
    if SOFTCAP:
        scores = tanh(scores)
        slope = 1 - scores * scores
    if bias is not None:
        scores += tl.where(bias > float("-inf"), bias, 0.0) * (1 / (unit * LN_2))
    return scores, slope


@triton.jit
def exponential(scores, factor, flagged, row, unit, MODE: tl.constexpr, BY_FACTOR: tl.constexpr):
    """exp(s' - lse); in "log_additive" exp(s - lse) if there will be a gradient by the factor.

    Args:
        factor: None, or one that broadcasts; all of them are 1 where `flagged` is not set.
        row: from `row_states`.
    """
    if factor is not None:
        if MODE == "log_additive":
            if not BY_FACTOR:  # noqa: SIM102, the first is decided when compiling
                if flagged:
                    scores += suppression_term(factor, unit, MODE)
        elif MODE == "multiplicative":
            if flagged:
                scores *= factor
        else:
            if flagged:
                scores += (factor - 1) * (scores - row[2])
    return tl.exp2(scores * unit - row[0])


@triton.jit
def pair_gradients(
    exponentials,
    by_weight,
    scores,
    factor,
    flagged,
    at,
    visible,
    row,
    unit,
    MODE: tl.constexpr,
    BY_FACTOR: tl.constexpr,
):
    """What a pair adds to each gradient.

    Args:
        exponentials: from `exponential`, 0 where hidden.
        by_weight: dp - delta.
        factor, flagged, row: as there.
        at: position of each key, and `visible`, whether the pair counts: only "shifted" looks at them.

    Returns:
        p, and the gradients by the score before suppression and, if BY_FACTOR, by the factor.
    """
    weights = exponentials
    by_score = exponentials * by_weight
    by_factor = by_score
    if factor is not None:
        if MODE == "log_additive":
            if BY_FACTOR:  # noqa: SIM102
                if flagged:
                    weights = tl.where(factor > 0, exponentials * factor, 0.0)
                    by_score = weights * by_weight
        else:
            if MODE == "shifted":
                by_factor = by_score * (scores - row[2]) * (unit * LN_2)
            else:
                by_factor = by_score * scores * (unit * LN_2)
            if flagged:
                by_score *= factor
            if MODE == "shifted":
                is_lowest = (row[3] == at) | ((row[3] < 0) & (scores <= row[2]))
                by_score += tl.where(is_lowest & visible, row[4], 0.0)
    return weights, by_score, by_factor


# --- preparation ---


@triton.jit(do_not_specialize=["rows"])
def prepare_rows(
    output,  # (B, Hq, rows, DV)
    output_strides,
    grad_output,
    grad_output_strides,
    lse,  # (B, Hq, rows) natural log
    lse_strides,
    grad_lse,  # as lse, or None
    grad_lse_strides,
    total,  # (B, Hq, rows) float32, contiguous: lse as a power of 2; inf for rows that saw nothing: no weight is left
    delta,  # (B, Hq, rows) float32, contiguous
    rows,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Each row's lse as a power of 2, and its delta."""
    tiles = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.cast(tl.program_id(0) // tiles % HEADS, tl.int64)
    batch = tl.cast(tl.program_id(0) // tiles // HEADS, tl.int64)
    exists = row < rows
    row = row.to(tl.int64)
    o_dv = tl.arange(0, BLOCK_DV)
    inside = exists[:, None] & (o_dv[None, :] < DV)
    o_output = batch * output_strides[0] + head * output_strides[1] + row * output_strides[2]
    o_grad = batch * grad_output_strides[0] + head * grad_output_strides[1] + row * grad_output_strides[2]
    b_output = tl.load(output + o_output[:, None] + o_dv[None, :] * output_strides[3], mask=inside, other=0.0)
    b_grad = tl.load(grad_output + o_grad[:, None] + o_dv[None, :] * grad_output_strides[3], mask=inside, other=0.0)
    b_delta = tl.sum(b_output.to(tl.float32) * b_grad.to(tl.float32), 1)
    if grad_lse is not None:
        o_lse = batch * grad_lse_strides[0] + head * grad_lse_strides[1] + row * grad_lse_strides[2]
        b_delta -= tl.load(grad_lse + o_lse, mask=exists, other=0.0)
    b_lse = tl.load(lse + batch * lse_strides[0] + head * lse_strides[1] + row * lse_strides[2], mask=exists, other=0.0)
    offset = (batch * HEADS + head) * rows + row
    tl.store(total + offset, tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E), mask=exists)
    tl.store(delta + offset, b_delta, mask=exists)


@triton.jit(do_not_specialize=["length", "touched_shift"])
def flag_factors(
    factors,  # (V|B, TERM_HEADS, length) float32, contiguous
    touched,  # (V|B, TERM_HEADS) int64
    length,
    touched_shift,
    BLOCK: tl.constexpr,
):
    """Bit i of a row of factors: is one of [i << touched_shift, (i + 1) << touched_shift) not 1?"""
    word = tl.program_id(0).to(tl.int64)
    flag = tl.arange(0, FLAGS)
    found = tl.zeros([FLAGS], tl.int32)
    for begin in range(0, 1 << touched_shift, BLOCK):
        position = (flag << touched_shift)[:, None] + begin + tl.arange(0, BLOCK)[None, :]
        b_factor = tl.load(factors + word * length + position, mask=position < length, other=1.0)
        found |= tl.max((b_factor != 1).to(tl.int32), 1)
    tl.store(touched + word, tl.sum(found.to(tl.int64) << flag.to(tl.int64)))


@triton.jit(do_not_specialize=["rows", "num_tiles", "window"])
def prepare_places(
    suffix_starts,  # (V + 1,)
    prefix_lengths,  # (V,)
    base_starts,  # (V,)
    row_variant,  # (rows,)
    factors,  # (V, TERM_HEADS, positions) float32, contiguous, or None; so are the next three
    touched,  # (V, TERM_HEADS) int64
    own_factors,  # (TERM_HEADS, rows) float32: those of the rows as keys, which their own variant alone sees
    tile_touched,  # (num_tiles,) int64: the flags of all its rows
    places,  # (PLACES, rows) int32
    reach,  # (REACH, num_tiles) int32, of the tiles of `key_gradient`
    positions,
    rows,
    num_tiles,
    window,
    GROUP: tl.constexpr,
    TERM_HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Where the rows of one tile stand and what they see, written down once for all heads."""
    tile = tl.program_id(0)
    lane = tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M), rows * GROUP - 1)
    row = lane // GROUP
    variant = tl.load(row_variant + row)
    prefix = tl.load(prefix_lengths + variant)
    base_start = tl.load(base_starts + variant)
    suffix_start = tl.load(suffix_starts + variant)
    suffix = tl.load(suffix_starts + variant + 1) - suffix_start
    shift = prefix - suffix_start
    first, last = visible_positions(row + shift, 0, prefix, window, IS_CAUSAL)
    seeing = first < last
    own_first, own_last = visible_positions(row + shift, prefix, prefix + suffix, window, IS_CAUSAL)
    first = tl.where(seeing, base_start + first, FAR)
    last = tl.where(seeing, base_start + last, 0)
    tl.store(places + BASE_FIRST * rows + row, first)
    tl.store(places + BASE_LAST * rows + row, last)
    tl.store(places + OWN_FIRST * rows + row, own_first - shift)
    tl.store(places + OWN_LAST * rows + row, own_last - shift)
    tl.store(places + SHIFT * rows + row, shift)
    tl.store(places + BASE_START * rows + row, base_start)

    lowest_base = tl.min(tl.where(seeing, base_start, FAR))
    highest_base = tl.max(tl.where(seeing, base_start, 0))
    tl.store(reach + FIRST * num_tiles + tile, tl.min(first))
    tl.store(reach + LAST * num_tiles + tile, tl.max(last))
    tl.store(reach + FULL_FIRST * num_tiles + tile, tl.max(first))
    tl.store(reach + FULL_LAST * num_tiles + tile, tl.min(last))
    tl.store(reach + TILE_BASE * num_tiles + tile, tl.where(lowest_base == highest_base, lowest_base, FAR))
    if factors is not None:
        flags = tl.zeros([BLOCK_M], tl.int64)
        for head in range(TERM_HEADS):
            word = variant.to(tl.int64) * TERM_HEADS + head
            flags |= tl.load(touched + word)
            tl.store(own_factors + head * rows + row, tl.load(factors + word * positions + row + shift))
        tl.store(tile_touched + tile, tl.reduce_or(flags, 0))


@triton.jit(do_not_specialize=["num_tiles", "touched_shift"])
def list_tiles(
    reach,  # (REACH, num_tiles)
    tile_touched,  # (num_tiles,) int64, or None
    tiles,  # (num_blocks, num_tiles) int32: those that see a block of base keys, as 4 * tile + 2 * in full + flagged
    counts,  # (num_blocks,) int32
    num_tiles,
    touched_shift,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which tiles of rows see one block of base keys."""
    block = tl.program_id(0)
    start, stop = block * BLOCK_N, (block + 1) * BLOCK_N
    p_tiles = tiles + tl.cast(block, tl.int64) * num_tiles
    count = tl.zeros([], tl.int32)
    for begin in range(0, num_tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        exists = tile < num_tiles
        first = tl.load(reach + FIRST * num_tiles + tile, mask=exists, other=FAR)
        last = tl.load(reach + LAST * num_tiles + tile, mask=exists, other=0)
        full_first = tl.load(reach + FULL_FIRST * num_tiles + tile, mask=exists, other=FAR)
        full_last = tl.load(reach + FULL_LAST * num_tiles + tile, mask=exists, other=0)
        meets = (first < stop) & (last > start)
        entry = tile * 4 + ((full_first <= start) & (full_last >= stop)).to(tl.int32) * 2
        if tile_touched is not None:
            touched = tl.load(tile_touched + tile, mask=exists, other=0)
            base = tl.load(reach + TILE_BASE * num_tiles + tile, mask=exists, other=0)
            lowest = tl.maximum(tl.maximum(start, first) - base, 0) >> touched_shift
            highest = tl.maximum(tl.minimum(stop, last) - 1 - base, 0) >> touched_shift
            near = (touched >> tl.minimum(lowest, FLAGS - 1)) | (touched >> tl.minimum(highest, FLAGS - 1))
            entry += tl.where(base < FAR, (near & 1) != 0, touched != 0).to(tl.int32)
        met = meets.to(tl.int32)
        tl.store(p_tiles + count + tl.cumsum(met, 0) - 1, entry, mask=meets)
        count += tl.sum(met)
    tl.store(counts + block, count)


# --- after the kernels ---


@triton.jit(do_not_specialize=["num_splits"])
def add_splits(
    partial,  # (num_splits, size) float32
    result,  # (size,)
    size,
    num_splits,
    BLOCK: tl.constexpr,
):
    """What several programs found of one result: added in their order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * size + index, mask=inside, other=0.0)
    tl.store(result + index, total.to(result.dtype.element_ty), mask=inside)
