"""Tensors over token positions, as a user names them, seen from one call of an attention function."""

from collections.abc import Mapping

import torch
from torch import Tensor

from atman_kernels.arguments import integer, shown
from atman_kernels.errors import InputError
from atman_kernels.formula import widened

Factors = Tensor | Mapping[int, Tensor] | None  # for all layers alike, by layer, or none
MOST_POSITIONS = 1 << 24  # no sequence is longer
Queries = tuple[int, int | None] | Tensor | None


class Positional:
    """A tensor (rows, …, positions) that each call sees at its own batch and positions.

    Rows serve a batch of a multiple of their number, one after the other, as beams and returned sequences need it.
    """

    def __init__(self, name: str, tensor: Tensor, beyond: float | bool) -> None:
        self.name, self.tensor, self.beyond = name, tensor, beyond
        # nothing differs from what lies beyond; a tensor that is to be differentiated may, after the next step
        self.neutral = not tensor.requires_grad and bool((tensor == beyond).all())
        self._last: tuple[tuple[object, ...], Tensor] | None = None  # the same for all layers of a forward

    def at(self, batch: int, first: int, count: int, device: torch.device) -> Tensor:
        """(batch, …, count) at positions `first` and after; `beyond` where the tensor has ended."""
        wanted = (batch, first, count, device)
        last = self._last  # of whichever thread
        if last is None or last[0] != wanted:
            rows = self.tensor.shape[0]
            if batch % rows:
                raise InputError(f"{self.name} has {rows} rows, which does not divide the model's batch of {batch}")
            fitted = self.tensor[..., first : first + count].to(device).repeat_interleave(batch // rows, dim=0)
            padding = (0, count - fitted.shape[-1])
            last = (wanted, torch.nn.functional.pad(fitted, padding, value=self.beyond))
            if (
                not self.tensor.requires_grad
            ):  # a graph is gone after its backward, and the tensor changes between steps
                self._last = last
        return last[1]


class LayerFactors:
    """Factors over key positions: one tensor for every layer, or one for each layer that has its own."""

    def __init__(self, name: str, factors: Factors) -> None:
        if isinstance(factors, Mapping):
            self._by_layer = {
                layer: Positional(name, checked_factor(factor, f"{name}[{layer}]"), 1.0)
                for layer, factor in factors.items()
            }
            self._every = None
        else:
            self._by_layer = {}
            self._every = None if factors is None else Positional(name, checked_factor(factors, name), 1.0)

    def of(self, layer: int) -> Positional | None:
        """The factors of a layer; None for a layer that is left alone."""
        return self._by_layer.get(layer, self._every)


def checked_factor(factor: Tensor, name: str = "factor") -> Tensor:
    """The factor as float32 (float64 stays), with its graph if it requires a gradient.

    Raises:
        InputError: it is not a floating point tensor (B, L) or (B, Hq, L), or not finite and >= 0 everywhere.
    """
    if not isinstance(factor, Tensor) or not factor.is_floating_point() or factor.ndim not in (2, 3):
        came = f"{factor.dtype} {tuple(factor.shape)}" if isinstance(factor, Tensor) else type(factor).__name__
        raise InputError(f"{name} must be a floating point tensor (B, L) or (B, Hq, L), got {came}")
    if factor.is_meta or factor.layout != torch.strided:
        what = "on the meta device" if factor.is_meta else f"of layout {factor.layout}"
        raise InputError(f"{name} must be a dense tensor with values, got one {what}")
    if not factor.shape[0]:
        raise InputError(f"{name} must have at least one row, got shape {tuple(factor.shape)}")
    wide = factor.detach().float()
    if factor.numel() and not bool(((wide >= 0) & wide.isfinite()).all()):
        raise InputError(f"{name} must be finite and >= 0 everywhere; it holds negative, infinite or NaN entries")
    return widened(factor)


def checked_queries(queries: Queries) -> Positional | None:
    """The queries as a bool tensor (1|B, positions) on the CPU, where reading it holds nothing up.

    Raises:
        InputError: they are neither (start, end), with end None for all that follows, nor a bool tensor (L,) or (B, L).
    """
    if queries is None:
        return None
    if isinstance(queries, Tensor):
        if queries.dtype != torch.bool or queries.ndim not in (1, 2) or not queries.numel():
            raise InputError(f"queries must be bool (L,) or (B, L), got {queries.dtype} {tuple(queries.shape)}")
        return Positional("queries", queries.detach().cpu().reshape(-1, queries.shape[-1]), False)
    expected = "expected (start, end) with 0 <= start < end, or end None, or a bool tensor (L,) or (B, L)"
    try:
        start, end = queries if isinstance(queries, tuple | list) else ()
        start = integer(start, "queries", least=0, most=MOST_POSITIONS)
        end = None if end is None else integer(end, "queries", least=start + 1)
    except (ValueError, InputError):
        raise InputError(f"queries: got {shown(queries)}, {expected}") from None
    if end is not None and end > MOST_POSITIONS:
        end = None  # all that follows
    inside = torch.arange(start if end is None else end, device="cpu") >= start
    return Positional("queries", inside[None], end is None)
