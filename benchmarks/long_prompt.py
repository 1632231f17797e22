"""Long prompts: the search, the direct effect and nested units, against AttnLRP and against all units exactly.

python -m benchmarks.long_prompt --squad FILE                    # 12 minutes on two cores
python -m benchmarks.long_prompt --tokens 512 --dtype float32 --budget 60

Everything takes turns in one process on one model object. All units exactly takes long: it is stopped after its share
of the time that is left, and what it would have taken is told from the tokens that went through the model by then.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import atman_kernels as ak
from benchmarks.explain import write
from benchmarks.machine import RESULTS, cpu_slug, environment
from benchmarks.prompts import Case, find_squad, long_case

LEVELS = ("paragraph", "sentence", "word")
WAYS: dict[str, dict[str, Any]] = {
    "attnlrp": {"method": "attnlrp"},  # a forward and a backward
    "recompute=1": {"recompute": 1},
    "exact=16": {"exact": 16},
    "nested": {"units": LEVELS},
}
EXACT = "all exact"
LONGEST_EXACT = 1024  # tokens; beyond, a sample would be too small a part
LEAST = 5.0  # seconds of budget without which nothing is begun


class Watch:
    """Times an explanation, as its progress: how long it ran, and how far it came before its time was up."""

    def __init__(self, limit: float) -> None:
        self._limit, self._started = limit, time.perf_counter()
        self._first = self._last = 0.0
        self.done = self.total = 0

    def __call__(self, done: int, total: int) -> None:
        """Raises Cancelled when the time is up."""
        self._last = time.perf_counter() - self._started
        if done == 0:
            self._first = self._last
        self.done, self.total = done, total
        if 0 < done < total and self._last > self._limit:
            raise ak.Cancelled

    def record(self) -> dict[str, Any]:
        """Seconds of the whole, which are scaled up where it was stopped."""
        if self.done == self.total:
            return {"seconds": time.perf_counter() - self._started, "share_measured": 1.0}
        share = self.done / self.total
        scaled = self._first + (self._last - self._first) / share
        return {"seconds": scaled, "share_measured": share, "seconds_measured": self._last}


def timed(model: Any, tokenizer: Any, case: Case, options: dict[str, Any], limit: float) -> dict[str, Any]:
    """One explanation of the case, every token a unit unless the options say otherwise."""
    watch = Watch(limit)
    explainer = ak.Explainer(model, tokenizer, progress=watch)
    try:
        found = explainer.explain(case.prompt, case.target, **options)
    except ak.Cancelled:
        return watch.record()
    record = watch.record() | {"units": len(found.units)}
    if found.levels:
        record["units_of_levels"] = [len(found.of_level(level)) for level in range(len(found.levels))]
    if "tokens_through_model" in found.stats:
        record["tokens_through_model"] = found.stats["tokens_through_model"]
    return record


class Run:
    """What is measured, as long as the budget lasts.

    Attributes:
        records: per dtype and prompt length, what each way took.
    """

    def __init__(self, budget: float, rounds: int, say: Callable[[str], None]) -> None:
        self._end, self._rounds, self._say = time.perf_counter() + budget, rounds, say
        self.records: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._end - time.perf_counter()

    def ways(self, model: Any, tokenizer: Any, case: Case) -> None:
        """The four ways, in turns; a way that would go beyond the budget is left out, and the record says so."""
        record = self._record(model, case)
        for number in range(self._rounds):
            for name, options in WAYS.items():
                self._say(f"{record['dtype']}, {case.prompt_tokens} tokens: {name}")
                entry = record["ways"].setdefault(name, {"rounds": []})
                if self.left < max(LEAST, self._expected(record, name)):
                    entry["left_out"] = f"round {number}: beyond the budget"
                    continue
                entry["rounds"].append(timed(model, tokenizer, case, options, float("inf")))

    def _expected(self, record: dict[str, Any], name: str) -> float:
        """Seconds that a way may take, by what it took on the last prompt of this dtype."""
        for before in reversed(self.records):
            rounds = before["ways"].get(name, {}).get("rounds")
            if before["dtype"] == record["dtype"] and rounds:
                ratio = record["tokens"] / before["tokens"]
                return float(rounds[-1]["seconds"]) * ratio**1.5
        return 0.0

    def exact(self, model: Any, tokenizer: Any, case: Case, limit: float) -> None:
        """All units exactly, stopped when its time is up, into the record of this dtype and length."""
        record = self._record(model, case)
        self._say(f"{record['dtype']}, {case.prompt_tokens} tokens: {EXACT}")
        entry: dict[str, Any] = {"rounds": []}
        record["ways"][EXACT] = entry
        if self.left < LEAST:
            entry["left_out"] = "beyond the budget"
            return
        entry["rounds"].append(timed(model, tokenizer, case, {}, limit))

    def _record(self, model: Any, case: Case) -> dict[str, Any]:
        dtype = str(model.dtype).removeprefix("torch.")
        for record in self.records:
            if (record["dtype"], record["tokens"]) == (dtype, case.prompt_tokens):
                return record
        self.records.append(
            {
                "dtype": dtype,
                "tokens": case.prompt_tokens,
                "target_tokens": len(case.target_ids),
                "text": case.source,
                "ways": {},
            }
        )
        return self.records[-1]


def rows(records: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table's rows: of each way the median's seconds, and how many times as long all exact and AttnLRP took."""
    for record in records:
        seconds = {
            name: sorted(entry["rounds"], key=lambda each: each["seconds"])[len(entry["rounds"]) // 2]
            for name, entry in record["ways"].items()
            if entry["rounds"]
        }
        for name, entry in record["ways"].items():
            shown = [record["dtype"], str(record["tokens"]), name]
            if name not in seconds:
                yield (*shown, "left out", "", "", "")
                continue
            own = seconds[name]
            ratios = [
                f"{seconds[other]['seconds'] / own['seconds']:.2f}" if other in seconds and other != name else ""
                for other in (EXACT, "attnlrp")
            ]
            about = "" if own["share_measured"] == 1 else f"≈ (from {own['share_measured']:.0%}) "
            yield (
                *shown,
                f"{about}{own['seconds']:.2f}",
                *ratios,
                f"{own.get('tokens_through_model', ''):,}" if "tokens_through_model" in own else "",
            )
            entry["median_seconds"] = own["seconds"]


def table(records: list[dict[str, Any]]) -> Table:
    """Seconds and ratios of all that was measured."""
    shown = Table(title="Long prompts")
    for column in ("dtype", "tokens", "way", "seconds", "all exact / it", "AttnLRP / it", "tokens run"):
        shown.add_column(column, justify="left" if column in ("dtype", "way") else "right")
    for row in rows(records):
        shown.add_row(*row)
    return shown


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", default="smollm2", help="Hub id, local folder, or smollm2.")
@click.option("--tokens", type=int, multiple=True, default=(256, 512, 1024, 2048), help="Length of the prompt.")
@click.option("--exact-tokens", type=int, multiple=True, default=(256, 512, LONGEST_EXACT), help="For all exact.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), multiple=True, default=("float32", "bfloat16"))
@click.option("--rounds", type=click.IntRange(min=1), default=1)
@click.option("--budget", type=click.FloatRange(min=LEAST), default=720.0, help="Seconds for everything.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.  [default: torch's]")
@click.option("--squad", type=click.Path(), help="SQuAD-format file to take paragraphs from.  [default: $ATMAN_SQUAD]")
@click.option("--output", type=click.Path(path_type=Path), help="[default: results/long-prompt-<cpu>.json]")
def main(
    model: str,
    tokens: tuple[int, ...],
    exact_tokens: tuple[int, ...],
    dtype: tuple[str, ...],
    rounds: int,
    budget: float,
    threads: int | None,
    squad: str | None,
    output: Path | None,
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    console, path = Console(), output or RESULTS / f"long-prompt-{cpu_slug()}.json"
    text = find_squad(squad)
    result: dict[str, Any] = {"environment": environment(), "model": model, "budget_seconds": budget}
    with console.status("loading") as status:
        run = Run(budget, rounds, status.update)
        result["records"] = run.records
        loaded = {name: ak.load_model(model, dtype=name) for name in dtype}
        for name in dtype:
            for length in tokens:
                run.ways(*loaded[name], long_case(loaded[name][1], length, text))
                write(path, result)
        still = [(name, length) for name in dtype for length in exact_tokens]
        for number, (name, length) in enumerate(still):
            share = run.left / (len(still) - number)
            run.exact(*loaded[name], long_case(loaded[name][1], length, text), share)
            write(path, result)
    console.print(table(run.records))
    result["environment"]["seconds"] = budget - run.left
    write(path, result)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
