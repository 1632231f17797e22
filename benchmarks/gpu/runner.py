"""One case after the other: build it, check every contender on it, time those that are right."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.agreement import Truth
from benchmarks.gpu.cases import Shape
from benchmarks.gpu.contenders import Contender, SdpaCall, Setting, Unsupported
from benchmarks.gpu.problems import Problem, build
from benchmarks.gpu.results import MEASURED, Results, Row
from benchmarks.gpu.timing import Rates, Stopwatch, poison

MEMORY_SHARE = 0.8  # of what is free that a contender may be expected to need


class DeviceLost(RuntimeError):
    """The device fails whatever it is asked: only a new process can go on."""


@dataclass(frozen=True)
class Runner:
    """What all cases of a run have in common."""

    device: torch.device
    dtype: torch.dtype
    stopwatch: Stopwatch
    rates: Rates
    results: Results
    deadline: float  # of time.monotonic()
    say: Callable[[Row], None]

    def run(self, shape: Shape, contenders: Sequence[Contender]) -> None:
        wanted = [
            (contender, setting)
            for contender in contenders
            if shape.group in contender.groups
            for setting in contender.settings(shape)
            if not self.results.done(case=shape.name, contender=contender.name, **vars(setting))
        ]
        if not wanted:
            return
        problem: Problem | None = None
        truth: Truth | None = None
        for contender, setting in wanted:
            row = self._empty_row(shape, contender, setting)
            try:
                if time.monotonic() > self.deadline:
                    row |= {"status": "skipped", "reason": "the time budget was used up"}
                elif lacking := self._lacking(shape, contender):
                    row |= {"status": "skipped", "reason": lacking}
                else:
                    if problem is None or truth is None:
                        problem = build(shape, self.dtype, self.device)
                        truth = Truth(problem)
                    row |= self._measured(problem, truth, contender, setting)
            except Exception as error:
                row |= _failed(error)
            self.results.add(row)
            self.say(row)
            self._tidy()

    @torch.inference_mode()
    def _measured(self, problem: Problem, truth: Truth, contender: Contender, setting: Setting) -> Row:
        """Status and figures of one contender: nothing is timed before it is right."""
        started = time.perf_counter()
        try:
            call = contender.prepare(problem, setting)
        except Unsupported as error:
            return {"status": "unsupported", "reason": str(error)}
        poison(problem.query.shape, self.dtype, self.device)
        output = call()
        agreement = truth.check(output, setting.factor, setting.mode, contender.covers)
        del output
        row: Row = {"first_call_seconds": time.perf_counter() - started, "agreement": agreement.record()}
        if isinstance(call, SdpaCall):
            row["kv_heads_repeated"] = call.repeated
        if not agreement.right:
            return row | {"status": "wrong", "reason": _difference(agreement.record())}
        timing = self.stopwatch.time(call)
        return (
            row | {"status": MEASURED, **timing.record()} | self._against_floor(problem, contender, setting, timing.ms)
        )

    def _against_floor(self, problem: Problem, contender: Contender, setting: Setting, ms: float) -> Row:
        element = problem.query.element_size()
        work = problem.shape.work(element, setting.factor, contender.covers)
        rates = self.rates.flops_per_second, self.rates.bytes_per_second
        floor = work.floor_seconds(*rates)
        return {
            "flops": work.flops,
            "bytes": work.bytes,
            "tflops_per_second": work.flops / ms / 1e9,
            "gigabytes_per_second": work.bytes / ms / 1e6,
            "floor_ms": floor * 1e3,
            "share_of_floor": floor * 1e3 / ms,
            "bound": work.bound(*rates),
        }

    def _empty_row(self, shape: Shape, contender: Contender, setting: Setting) -> Row:
        return {
            "case": shape.name,
            "group": shape.group,
            "contender": contender.name,
            "is_ours": contender.is_ours,
            "factor": setting.factor,
            "mode": setting.mode,
            "covers": contender.covers,
            "heads": str(shape.heads),
            "rows": shape.rows,
            "variants": shape.variants,
        }

    def _lacking(self, shape: Shape, contender: Contender) -> str | None:
        """Why there is not enough memory for a contender; None if there may be."""
        needed = contender.bytes_needed(shape, torch.finfo(self.dtype).bits // 8)
        free = self._free_bytes()
        if needed <= MEMORY_SHARE * free:
            return None
        return f"it would need about {needed / 1e9:.1f} GB beside the inputs, and {free / 1e9:.1f} GB are free"

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return 4 << 30  # a CPU runs the tiny preset alone

    def _tidy(self) -> None:
        """Give memory back; a device that cannot even do that is lost."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error


def _failed(error: Exception) -> Row:
    first = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "skipped", "reason": f"out of memory: {first}"}
    return {"status": "error", "reason": f"{type(error).__name__}: {first}"[:500]}


def _difference(agreement: dict[str, Any]) -> str:
    if not agreement["finite"]:
        return "the output holds NaN or inf"
    return (
        f"off by up to {agreement['largest_error']:.3g} where rounding explains {agreement['allowed_error']:.3g}; "
        f"relative {agreement['relative_error']:.3g}, explained {agreement['allowed_relative_error']:.3g}"
    )
