"""Assertions on tensors that say where, and by how much, two results differ. They compare on the CPU, whatever device
each of the two is on."""

import torch
from torch import Tensor

WORST_SHOWN = 5


def assert_same_pattern(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    """Shapes agree, and NaN, +inf and -inf stand in the same places."""
    actual, expected = _on_cpu(actual, expected)
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(actual) != test(expected)
        if bool(differs.any()):
            where = [tuple(index) for index in differs.nonzero()[:WORST_SHOWN].tolist()]
            shown = [f"{index}: got {actual[index].item()}, expected {expected[index].item()}" for index in where]
            raise AssertionError(f"{what}: {name} differs at {int(differs.sum())} places: " + "; ".join(shown))


def assert_within(actual: Tensor, expected: Tensor, limit: float, what: str = "output") -> None:
    """No element is further than `limit` from `expected`; the message lists the worst coordinates."""
    actual, expected = _on_cpu(actual, expected)
    assert_same_pattern(actual, expected, what)
    error = absolute_error(actual, expected)
    if error.numel() == 0 or error.max().item() <= limit:
        return
    worst = error.flatten().topk(min(WORST_SHOWN, error.numel())).indices
    lines = []
    for flat in worst.tolist():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
        lines.append(
            f"  {index}: got {actual[index].item():.9g}, expected {expected[index].item():.9g}, "
            f"error {error[index].item():.3g}"
        )
    beyond = int((error > limit).sum())
    raise AssertionError(
        f"{what}: {beyond} of {error.numel()} elements are off by more than {limit:.3g}; the worst:\n"
        + "\n".join(lines)
    )


def assert_within_rounding(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str = "output", *, largest_score: float = 1.0
) -> None:
    """`actual` is about as close to `exact` as the plain PyTorch formula is in the same dtype.

    FlashAttention's rule: max|actual - exact| <= 2 * max|plain - exact| + atol. Here atol is a few roundings of the
    largest value, and what one float32 rounding of the largest score (float64 for float64) does to it: in a tensor
    of three elements the plain formula may be exact by chance.

    Args:
        actual: what is tested.
        exact: the same in float64.
        plain: the plain formula, run in the dtype of the inputs.
        largest_score: bound on what is rounded before the softmax.
    """
    assert_same_pattern(plain, exact, f"{what} of the plain formula")
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    stored = max(torch.finfo(dtype).eps for dtype in (actual.dtype, plain.dtype))
    computed = min(stored, torch.finfo(torch.float32).eps)
    atol = (2 * stored + largest_score * computed) * max(largest, 1.0)
    plain_error = absolute_error(plain, exact).max().item() if exact.numel() else 0.0
    assert_within(actual, exact, 2 * plain_error + atol, what)


def few_roundings(dtype: torch.dtype) -> float:
    """By how much two orders of the same sums may differ, for values around 1."""
    return torch.finfo(dtype).eps * (4 if torch.finfo(dtype).bits == 16 else 40)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    """Equal element for element, with no tolerance."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert_within(actual, expected, 0.0, what)


def assert_unchanged_by_ones(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], backend: str, factor: str
) -> None:
    """Output and lse with factors of 1 are those without factors, to the last bit.

    Triton's tiles are of one head where factors are per head: blocks of keys begin elsewhere, sums have another order.
    """
    if backend == "triton" and factor == "heads":
        assert_within(actual[0], expected[0], few_roundings(actual[0].dtype))
        assert_within(actual[1], expected[1], few_roundings(torch.float32), "lse")
        return
    assert_same_bits(actual[0], expected[0])
    assert_same_bits(actual[1], expected[1], "lse")


def absolute_error(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected| in float64; equal infinities and two NaN count as 0."""
    actual, expected = (tensor.double() for tensor in _on_cpu(actual, expected))
    error = (actual - expected).abs()
    return error.masked_fill(actual.eq(expected) | (actual.isnan() & expected.isnan()), 0.0)


def _on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cpu() for tensor in tensors)
