"""The steps of the algorithm, each written once; the kernels are made of these.

Scores are held in units of their own, such that ``exp2(unit * score)`` is the softmax's numerator (unit > 0). For
plain attention a score is then the raw product q·k, and scaling it costs nothing: it is part of the exponent's
multiply-add. What is not linear in the score (a logarithm, a bias) is divided by the unit instead.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_positions(position, first, last, window, IS_CAUSAL: tl.constexpr):
    """The part of the positions [first, last) that a query sees; `formula.window_visible` as an interval per row."""
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
