"""The steps of the algorithm, each written once; the kernels are made of these.

First how a tile of rows walks over the keys that it sees, then what is made of their scores.

Scores are held in units of their own, such that ``exp2(unit * score)`` is the softmax's numerator (unit > 0). For
plain attention a score is then the raw product q·k, and scaling it costs nothing: it is part of the exponent's
multiply-add. What is not linear in the score (a logarithm, a bias) is divided by the unit instead.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
FAR: tl.constexpr = tl.constexpr(2**31 - 1)  # beyond every index
OWN: tl.constexpr = tl.constexpr(2**31 - 2)  # in place of where a base starts: a variant's own rows
ALIGNED: tl.constexpr = tl.constexpr(4)  # factors or terms that are read at once
FLAGS: tl.constexpr = tl.constexpr(64)  # of one row of factors


# --- rows, and the keys that they see ---


@triton.jit
def rows_of_program(
    rows,
    num_tiles,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Which rows are a program's: (batch, split, row [M], head [M], key head, [M] whether there is such a row).

    Later rows reach further, in causal batches as in packs that begin with their longest suffixes: they start first.
    """
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    first_head = program // num_tiles % (HEADS // GROUP) * GROUP
    batch = program // num_tiles // (HEADS // GROUP) % BATCH
    split = program // num_tiles // (HEADS // GROUP) // BATCH
    lane = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = lane < rows * GROUP
    lane = tl.minimum(lane, rows * GROUP - 1)  # past the end the last row is computed again
    head = (first_head + lane % GROUP).to(tl.int64)
    kv_head = tl.cast(first_head // (HEADS // KV_HEADS), tl.int64)
    return batch, split, lane // GROUP, head, kv_head, exists


@triton.jit
def load_rows(tensor, strides, batch, head, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[M, BLOCK]: rows of a (B, H, rows, WIDTH) tensor, all of which it has; zeros beside them."""
    column = tl.arange(0, BLOCK)
    offset = batch * strides[0] + head * strides[1] + row.to(tl.int64) * strides[2]
    return tl.load(tensor + offset[:, None] + column[None, :] * strides[3], mask=column[None, :] < WIDTH, other=0.0)


@triton.jit
def visible_positions(position, first, last, window, IS_CAUSAL: tl.constexpr):
    """The part of the positions [first, last) that a query sees; `formula.window_visible` as an interval per row."""
    first += tl.zeros_like(position)
    last += tl.zeros_like(position)
    if window is not None:
        first = tl.maximum(first, position - window + 1)
        if not IS_CAUSAL:
            last = tl.minimum(last, position + window)
    if IS_CAUSAL:
        last = tl.minimum(last, position + 1)
    return first, last


@triton.jit
def sees(keys, first, last):
    """[M, N]: whether a row sees a key, from the interval [first, last) of each row."""
    return (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])


@triton.jit
def reach(first, last, origin):
    """What a tile sees, from the interval [first, last) of each row: (first, last, start, stop, full start, full stop).

    Intervals of rows that see nothing end at 0. Blocks of keys begin at `start`, where terms are aligned, and end at
    `stop`; keys [full start, full stop) are seen by every row and need no mask.
    """
    seeing = first < last
    first = tl.where(seeing, first, FAR)
    last = tl.where(seeing, last, 0)
    # FAR - 1 is no key, but a start that has no blocks after it
    start = origin + ((tl.minimum(tl.min(first), FAR - 1) - origin) & -ALIGNED)
    return first, last, start, tl.max(last), tl.max(first), tl.min(last)


@triton.jit
def share_of(start, stop, split, num_splits, BLOCK_N: tl.constexpr):
    """One split's part of the blocks of keys in [start, stop)."""
    share = tl.cdiv(tl.maximum(stop - start, 0), num_splits * BLOCK_N) * BLOCK_N
    start += split * share
    return start, tl.minimum(stop, start + share)


@triton.jit
def flags_of_block(touched, touched_shift, position, BLOCK_N: tl.constexpr):
    """The flags that keys from a position on have, the first and the last of at most two, and whether one is set."""
    first_flag = tl.cast(position >> touched_shift, tl.int64)
    last_flag = tl.cast(tl.minimum((position + BLOCK_N - 1) >> touched_shift, FLAGS - 1), tl.int64)
    return first_flag, last_flag, (((touched >> first_flag) | (touched >> last_flag)) & 1) != 0


@triton.jit
def keys_of_part(own, own_keys, base_keys):
    """Those of own rows or of a base: (pointer to keys, their two strides, pointer to values, their two strides)."""
    key, key_row_stride, key_stride, value, value_row_stride, value_stride = base_keys
    return (
        tl.where(own, own_keys[0], key),
        tl.where(own, own_keys[1], key_row_stride),
        tl.where(own, own_keys[2], key_stride),
        tl.where(own, own_keys[3], value),
        tl.where(own, own_keys[4], value_row_stride),
        tl.where(own, own_keys[5], value_stride),
    )


@triton.jit
def next_part(part, base_start, parts):
    """Where the next base starts of those that a tile's rows have; after the last one `parts`, after that FAR."""
    return tl.min(tl.where(base_start > part, base_start, tl.where(part < parts, parts, FAR)))


# --- scores ---


@triton.jit
def tanh(x):
    """To a few roundings of float32, near zero too, where the quotient cancels."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    quotient = (1 - decay) / (1 + decay)
    return tl.where(square < 0.04, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def suppression_term(factor, unit, MODE: tl.constexpr):
    """All of `formula.suppress_scores` that does not depend on a score; computed once per factor."""
    if MODE == "log_additive":
        return tl.log2(factor) / unit
    elif MODE == "multiplicative":
        return factor
    else:
        return factor - 1


@triton.constexpr_function
def untouched_term(mode):
    """The term of a factor of 1."""
    return 1.0 if mode == "multiplicative" else 0.0


@triton.jit
def suppress(scores, term, row_minimum, MODE: tl.constexpr):
    """`formula.suppress_scores`: [M, N] scores, [1|M, N] terms. The term of a factor of 1 changes no bit."""
    if MODE == "log_additive":
        return scores + term
    elif MODE == "multiplicative":
        return scores * term
    else:
        return scores + term * (scores - row_minimum[:, None])


@triton.jit
def online_softmax(scores, maximum, total, unit):
    """One more block of scores [M, N], hidden ones -inf, for rows with a running maximum and total of weights [M].

    Returns:
        weights [M, N] relative to the new maximum, new maximum, new total, and what to rescale earlier sums by.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * unit)
    origin = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # -inf - -inf is NaN
    rescale = tl.exp2(maximum - origin)
    weights = tl.exp2(scores * unit - origin[:, None])
    return weights, new_maximum, total * rescale + tl.sum(weights, 1), rescale


@triton.jit
def add_sink(sink, maximum, total):
    """A sink's score (natural, [M]) joins the rows' totals; its value is zero. Returns as `online_softmax`."""
    new_maximum = tl.maximum(maximum, sink * LOG2_E)
    origin = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    rescale = tl.exp2(maximum - origin)
    return new_maximum, total * rescale + tl.exp2(sink * LOG2_E - origin), rescale


@triton.jit
def reciprocal(total):
    """What turns sums into means; 0 for rows that saw nothing. NaN stays NaN."""
    return tl.where(total == 0, 0.0, 1 / total)
