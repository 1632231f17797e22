"""Each op held against the plain formula: one call of one backend, and how far its result may lie from float64."""

from collections.abc import Callable
from typing import Any

import torch
from attention_cases import DenseCase, PackCase, device_for, factor_dtype, truth_of
from comparison import assert_within_rounding
from torch import Tensor

from atman_kernels.ops import packed_suppressed_attention, suppressed_attention


def run_dense(backend: str | None, call: dict[str, Any], mode: str = "log_additive") -> tuple[Tensor, Tensor]:
    output, lse = suppressed_attention(**call, mode=mode, return_lse=True, backend=backend)
    return output, lse


def run_packed(backend: str | None, call: dict[str, Any], mode: str = "log_additive") -> tuple[Tensor, Tensor]:
    output, lse = packed_suppressed_attention(**call, mode=mode, return_lse=True, backend=backend)
    return output, lse


def check_dense(backend: str, case: DenseCase, mode: str, factor: str, dtype: torch.dtype) -> None:
    """The dense op agrees with the formula; factor is none, keys or heads."""
    _check(run_dense, backend, case, mode, factor, dtype)


def check_packed(backend: str, case: PackCase, mode: str, factor: str, dtype: torch.dtype) -> None:
    """The packed op agrees with dense attention of each variant alone; factor is none, keys or heads."""
    _check(run_packed, backend, case, mode, factor, dtype)


def _check(
    run: Callable[..., tuple[Tensor, Tensor]],
    backend: str,
    case: DenseCase | PackCase,
    mode: str,
    factor: str,
    dtype: torch.dtype,
) -> None:
    call, exact, plain, bound = truth_of(case, mode, factor, dtype, device_for(backend, dtype))
    output, lse = run(backend, call, mode)
    assert output.dtype == dtype
    assert lse.dtype == factor_dtype(dtype)
    assert_within_rounding(output, exact[0], plain[0], largest_score=bound)
    assert_within_rounding(lse, exact[1], plain[1], "lse", largest_score=bound)
