"""One cell in a process of its own, so that its peak memory is its own: `python -m benchmarks.scaling.cell JSON`.

Prints one line of JSON. What would take longer than the time budget is done in part, spread evenly over the prompt,
and scaled up; `measured` of `total` units says so.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from atman_kernels.hf.models.memory import is_out_of_memory
from benchmarks.measure import can_measure_peak, peak_bytes
from benchmarks.scaling.models import build
from benchmarks.scaling.work import Work, case_of, prepare

ROUNDS = 3  # of work that is all or nothing, where the budget allows


@dataclass(frozen=True)
class Cell:
    """What is measured; two results of equal cells are results of the same thing."""

    method: str
    size: str
    tokens: int
    target_tokens: int
    dtype: str
    device: str
    budget: float  # seconds of measuring
    token_budget: int | None
    threads: int


def measure(cell: Cell) -> dict[str, Any]:
    """Time and memory; `status` is "ok" or "out of memory"."""
    torch.set_num_threads(cell.threads)
    record: dict[str, Any] = {"status": "ok"}
    try:
        model = build(cell.size, cell.device, cell.dtype, cell.tokens + cell.target_tokens)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        record |= {"parameters": model.num_parameters(), "weights_bytes": weights}
        work = prepare(cell.method, model, case_of(cell.tokens, cell.target_tokens, cell.device), cell.token_budget)
        over = _peak_over(cell.device, lambda: record.update(timed(work, cell.budget, _clock(cell.device))))
        record["peak_bytes"] = None if over is None else weights + over
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        record["status"] = "out of memory"
    return record


def timed(work: Work, budget: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds for all of the work, from as much of it as the budget allows, after one unit that does not count."""
    started = clock()
    work.run(1)
    if work.total == 1:
        rounds = [_seconds(work, 1, clock)[0]]
        while len(rounds) < ROUNDS and clock() - started + rounds[0] <= budget:
            rounds.append(_seconds(work, 1, clock)[0])
        return {"seconds": median(rounds), "measured": 1, "total": 1, "measured_seconds": median(rounds)}
    single, kept = _seconds(work, 1, clock)
    count, spent = 1, single
    while count < work.total:
        left = budget - (clock() - started)
        wanted = [k for k in (work.total, 8 * count, 4 * count, 2 * count) if count < k <= work.total]
        larger = [k for k in wanted if estimate(work, single, count, spent, k) <= left]
        if not larger and not (work.fixed and count == 1):  # from that alone nothing can be scaled
            break
        count = larger[0] if larger else min(wanted)
        spent, kept = _seconds(work, count, clock)
    seconds = estimate(work, single, count, spent, work.total)
    return {"seconds": seconds, "measured": count, "total": work.total, "measured_seconds": spent} | kept


def estimate(work: Work, single: float, count: int, spent: float, wanted: int) -> float:
    """Seconds for `wanted` units where `count` took `spent`, and one took `single`."""
    if not work.fixed:
        return spent * work.cost(wanted) / work.cost(count)
    if count == 1:
        return single * wanted  # at most: a unit costs less than the fixed part
    grown = (work.cost(wanted) - work.cost(1)) / (work.cost(count) - work.cost(1))
    return single + (spent - single) * grown


def _seconds(work: Work, count: int, clock: Callable[[], float]) -> tuple[float, dict[str, Any]]:
    started = clock()
    kept = work.run(count)
    return clock() - started, kept


def _clock(device: str) -> Callable[[], float]:
    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def _peak_over(device: str, run: Callable[[], Any]) -> int | None:
    """Bytes over what was there before, at most; None where the machine cannot tell."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    if can_measure_peak():
        return peak_bytes(run)
    run()
    return None


if __name__ == "__main__":
    print(json.dumps(measure(Cell(**json.loads(sys.argv[1])))))
