"""Gradients of both ops held against autograd through the plain formula in float64."""

import math
from collections.abc import Callable
from typing import Any

import torch
from attention_cases import DenseCase, PackCase, largest_score, plain_attention, to_float64, variant_by_variant
from comparison import assert_within_rounding
from torch import Tensor

from atman_kernels.ops import packed_suppressed_attention, suppressed_attention

Case = DenseCase | PackCase
MOST_KNOWN = 64
NEARLY_REMOVED = 1e-30  # where ln c still has a slope, which is that at 0 from the right


def op_of(case: Case) -> Callable[..., Any]:
    return suppressed_attention if isinstance(case, DenseCase) else packed_suppressed_attention


def leaves_of(call: dict[str, Any]) -> dict[str, Tensor]:
    return {n: x for n, x in call.items() if isinstance(x, Tensor) and x.is_floating_point()}


def loss(output: Tensor, lse: Tensor, live: Tensor) -> Tensor:
    """Of rows that are alive; it looks at outputs and lse."""
    wide = output.to(lse.dtype)
    wide, lse = wide.masked_fill(~live[..., None], 0.0), lse.masked_fill(~live, 0.0)
    return wide.sin().sum() + (0.3 * lse).cos().sum()


def gradients(run: Callable[..., tuple[Tensor, Tensor]], call: dict[str, Any], live: Tensor) -> dict[str, Tensor]:
    """Of the loss by every floating-point tensor of a call."""
    leaves = {n: x.detach().requires_grad_() for n, x in leaves_of(call).items()}
    found = torch.autograd.grad(loss(*run(**call | leaves), live), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def plainly(case: Case, mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if isinstance(case, DenseCase):
        return lambda **call: plain_attention(**call, mode=mode)
    return lambda **call: variant_by_variant(case, call, mode)


_known: dict[tuple[Any, ...], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}


def _truths(case: Case, call: dict[str, Any], mode: str, live: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the plain formula, in float64 and in the call's dtype: once for backends that take turns at the same call."""
    same = {n: x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for n, x in leaves_of(call).items()}
    key = (
        case,
        mode,
        call["query"].dtype,
        call["query"].device,
        hash(tuple(same.items())),
        bytes(live.cpu().flatten()),
    )
    if key not in _known:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        exact = gradients(plainly(case, mode), with_slope(to_float64(call), mode), live.cpu())
        _known[key] = exact, gradients(plainly(case, mode), with_slope(call, mode), live)
    exact, plain = _known[key]
    return dict(exact), dict(plain)


def with_slope(call: dict[str, Any], mode: str) -> dict[str, Any]:
    if "factor" not in call or mode != "log_additive":
        return call
    return call | {"factor": call["factor"].clamp_min(NEARLY_REMOVED)}


def check_gradients(case: Case, call: dict[str, Any], mode: str, backend: str) -> None:
    def run(**arguments: Any) -> tuple[Tensor, Tensor]:
        return op_of(case)(**arguments, mode=mode, return_lse=True, backend=backend)

    live = run(**call)[1] > -math.inf
    found = gradients(run, call, torch.ones_like(live) if bool(live.all()) else live)
    exact, plain = _truths(case, call, mode, live)
    values = torch.cat([call[n].double().norm(dim=-1).flatten() for n in ("value", "base_value") if n in call])
    bound = largest_score(call) * max(1.0, values.max().item())  # dO · v of one key cancels with that of the others
    output_dtype = call["query"].dtype
    for name, got in found.items():
        assert got.dtype == call[name].dtype
        if name == "factor":
            got, plain[name] = (
                got.to(output_dtype),
                plain[name].to(output_dtype),
            )  # no surer than the output that was kept
            if mode == "log_additive" and call["factor"].any():  # the slope of ln c
                bound *= 1.0 / call["factor"][call["factor"] > 0].min().item()
        assert_within_rounding(got, exact[name], plain[name].nan_to_num(), f"gradient by {name}", largest_score=bound)
