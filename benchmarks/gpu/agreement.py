"""Whether an output is right: against the formula in float64, on samples of rows, by what the dtype explains."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Covers
from benchmarks.gpu.problems import Problem, plain_attention


@dataclass(frozen=True)
class Agreement:
    """Errors over all sampled outputs; the formula in the problem's own dtype says what rounding explains."""

    largest_error: float
    allowed_error: float
    relative_error: float  # norm of the error over norm of the truth
    allowed_relative_error: float
    sampled_rows: int
    finite: bool  # the whole output

    @property
    def right(self) -> bool:  # written so that NaN is wrong
        within = self.largest_error <= self.allowed_error and self.relative_error <= self.allowed_relative_error
        return self.finite and within

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"right": self.right}


class Truth:
    """The right results for one problem, each computed when it is first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._expected: dict[tuple[str, str, Covers], list[tuple[Tensor, Tensor]]] = {}

    def check(self, output: Tensor, factor: str, mode: str, covers: Covers) -> Agreement:
        """`output` (B, Hq, rows, D) against the problem with factors "none", "sparse" or "dense"."""
        errors, limits, truths, rows = [], [], [], 0
        pieces = self.problem.pieces(covers)
        for piece, (exact, plain) in zip(pieces, self._for(factor, mode, covers), strict=True):
            errors.append((piece.of(output).double() - exact).flatten())
            limits.append((plain.double() - exact).flatten())
            truths.append(exact.flatten())
            rows += len(piece.rows)
        error, limit, truth = (torch.cat(parts) for parts in (errors, limits, truths))
        rounding = torch.finfo(output.dtype).eps
        return Agreement(
            largest_error=float(error.abs().max()),
            allowed_error=float(2 * limit.abs().max() + 2 * rounding * truth.abs().max()),
            relative_error=float(error.norm() / truth.norm()),
            allowed_relative_error=float(2 * limit.norm() / truth.norm() + rounding),
            sampled_rows=rows,
            finite=bool(output.isfinite().all()),
        )

    def _for(self, factor: str, mode: str, covers: Covers) -> list[tuple[Tensor, Tensor]]:
        kind = factor, mode, covers
        if kind not in self._expected:
            factors, dtype = self.problem.factors[factor], self.problem.query.dtype
            self._expected[kind] = [
                (
                    plain_attention(piece, factors, mode, torch.float64),
                    plain_attention(piece, factors, mode, dtype),
                )
                for piece in self.problem.pieces(covers)
            ]
        return self._expected[kind]
