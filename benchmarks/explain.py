"""Token explanations of real prompts: ours against the other ways to get them.

python -m benchmarks.explain                     # the whole table, SmolLM2, sampled units
python -m benchmarks.explain --sample 0          # every unit of every prompt: hours
python -m benchmarks.explain --tokens 128 --dtype float32 --rounds 1 --no-memory
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table
from torch import Tensor

from benchmarks.machine import RESULTS, cpu_slug, environment
from benchmarks.measure import (
    Meter,
    can_measure_peak,
    explanation_flops,
    linear_rate,
    metered,
)
from benchmarks.memory import memory_record
from benchmarks.peers import BiasedSdpa, CaptumAblation, Contender, DenseEager, Ours, OursWithoutModule
from benchmarks.prompts import Case, find_squad, long_case, sample_positions

CONTENDERS = ("eager", "eager_full_logits", "sdpa", "captum", "ours_torch", "ours")
FLOAT32_TOLERANCE = 1e-4
SAMPLED_TOKENS = 8192  # how many tokens of whole variants each contender gets per round unless --sample says it
BATCH_TOKENS = (1, 1024, 2048, 4096)  # batches of about so many tokens are tried, and the fastest is taken


@dataclass(frozen=True)
class Plan:
    """What the options ask for."""

    mode: str
    factor: float
    sample: int | None
    rounds: int
    batch: int
    token_budget: int | None
    contenders: tuple[str, ...]

    def positions(self, case: Case) -> list[int]:
        # one fewer than fills whole batches: the base run is a row as well
        count = max(8, SAMPLED_TOKENS // case.prompt_tokens) - 1 if self.sample is None else self.sample
        return sample_positions(case, count)


def make_contenders(model: Any, tokenizer: Any, plan: Plan) -> list[Contender]:
    make: dict[str, Callable[[], Contender]] = {
        "eager": lambda: DenseEager(model, plan.factor, plan.mode),
        "eager_full_logits": lambda: DenseEager(model, plan.factor, plan.mode, full_logits=True),
        "sdpa": lambda: BiasedSdpa(model, plan.factor, plan.mode),
        "captum": lambda: CaptumAblation(model, tokenizer),
        "ours_torch": lambda: OursWithoutModule(model, tokenizer, plan.factor, plan.mode, plan.token_budget),
        "ours": lambda: Ours(model, tokenizer, plan.factor, plan.mode, plan.token_budget),
    }
    return [make[name]() for name in CONTENDERS if name in plan.contenders]


# Correctness first ----------------------------------------------------------------------------------------------


def agreement(contenders: Sequence[Contender], model: Any, case: Case, positions: Sequence[int]) -> dict[str, Any]:
    """Whether the contenders compute the same scores, on a few units, against full recomputation in float32.

    float32: within 1e-4. Lower precision: within three times what the plain recomputation in that dtype is off by,
    whose scores are no more than rounded either. Captum answers another question, so it is held against forwards
    with the token replaced, in its own dtype.
    """
    exact = _exact_scores(contenders, model, case, positions)
    errors, noise = {}, 0.0
    for contender in contenders:
        scores = contender.scores(case, positions)
        expected = contender.expected_scores(case, positions) if isinstance(contender, CaptumAblation) else exact
        errors[contender.name] = float((scores - expected).abs().max())
        if isinstance(contender, BiasedSdpa | DenseEager):
            noise = max(noise, errors[contender.name])
    low = model.dtype != torch.float32
    tolerance = 3 * noise + 0.01 if low else FLOAT32_TOLERANCE
    return {
        "units": list(positions),
        "max_difference": errors,
        "tolerance": tolerance,
        "agree": all(error <= tolerance for error in errors.values()),
    }


def _exact_scores(contenders: Sequence[Contender], model: Any, case: Case, positions: Sequence[int]) -> Tensor:
    """Scores by full eager recomputation with the same weights in float32."""
    wide = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    plain = next((c for c in contenders if isinstance(c, DenseEager | BiasedSdpa)), None)
    if plain is None:
        raise click.UsageError("--contenders: needs eager or sdpa, which the others' scores are checked against")
    mode = plain.mode if isinstance(plain, DenseEager) else "log_additive"
    return DenseEager(wide, plain.factor, mode, batch=1).scores(case, positions)


# Timing ---------------------------------------------------------------------------------------------------------


def choose_batch(contender: Contender, model: Any, case: Case) -> int:
    """The batch size with which a contender spends the least time per sequence."""
    length = len(case.inputs)
    sizes = sorted({max(1, tokens // length) for tokens in BATCH_TOKENS})
    costs = {}
    for size in sizes:
        contender.batch = size
        with metered() as meter:
            contender.scores(case, sample_positions(case, max(1, size - 1)))
        costs[size] = meter.seconds * length / meter.tokens
    return min(costs, key=costs.__getitem__)


def run_round(contenders: Sequence[Contender], model: Any, case: Case, positions: list[int]) -> dict[str, Any]:
    """Every contender once over the same units, one after the other, then the products that ours consists of."""
    meters: dict[str, Meter] = {}
    for contender in contenders:
        with metered() as meters[contender.name]:
            contender.scores(case, positions)
    single = None
    ours = next((c for c in contenders if c.name == "ours"), None)
    if ours is not None and len(positions) < case.prompt_tokens:
        with metered() as single:  # base run, probe and one tiny pack: what does not grow with the units
            ours.scores(case, [case.prompt_tokens - 1])
    rate = linear_rate(model, meters["ours"].largest_forward) if ours is not None else None
    return {"meters": meters, "single": single, "linear_rate": rate}


def scale_up(
    name: str, case: Case, positions: list[int], entry: dict[str, Any], quantity: Callable[[Meter], float]
) -> float:
    """Seconds or tokens for all units of the prompt, from those of the sampled ones in one round.

    A peer's forwards all cost the same, so their number decides. Ours has a part that does not grow with the units,
    measured by itself, and one in proportion to the sum of the suffixes.
    """
    total, measured = case.prompt_tokens, quantity(entry["meters"][name])
    if len(positions) == total:
        return measured
    if not name.startswith("ours"):
        return measured * (total + 1) / (len(positions) + 1)
    length, fixed = len(case.inputs), quantity(entry["single"])
    share = sum(length - position for position in range(total)) / sum(length - position for position in positions)
    return fixed + (measured - fixed) * share


def seconds_of(meter: Meter) -> float:
    return meter.seconds


def tokens_of(meter: Meter) -> int:
    return meter.tokens


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def case_record(
    model: Any, case: Case, contenders: Sequence[Contender], plan: Plan, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check, choose batches, measure rounds: one entry of the result file."""
    positions = plan.positions(case)
    say("checking that all agree")
    checked = agreement(contenders, model, case, sample_positions(case, 4))
    for contender in contenders:
        if isinstance(contender, DenseEager | BiasedSdpa):
            say(f"choosing the batch size of {contender.name}")
            contender.batch = plan.batch or choose_batch(contender, model, case)
    rounds = []
    for index in range(plan.rounds):
        say(f"round {index + 1} of {plan.rounds}, {len(positions)} units")
        rounds.append(run_round(contenders, model, case, positions))
    record: dict[str, Any] = {
        "tokens": case.prompt_tokens,
        "target_tokens": len(case.target_ids),
        "text": case.source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "units": case.prompt_tokens,
        "measured_units": len(positions),
        "extrapolated": len(positions) < case.prompt_tokens,
        "agreement": checked,
        "contenders": {c.name: contender_record(c, case, positions, rounds, checked["agree"]) for c in contenders},
    }
    ours = next((c for c in contenders if c.name == "ours"), None)
    if isinstance(ours, Ours):
        record["efficiency"] = efficiency_record(model, case, positions, rounds)
        record["path"], record["token_budget"] = ours.path, ours.stats.get("token_budget")
    return record


def contender_record(
    contender: Contender, case: Case, positions: list[int], rounds: list[dict[str, Any]], agree: bool
) -> dict[str, Any]:
    """Times of one contender, and, if the scores agree, how many times as long as ours it took round by round."""
    name = contender.name
    meters = [entry["meters"][name] for entry in rounds]
    full = [scale_up(name, case, positions, entry, seconds_of) for entry in rounds]
    record = {
        "batch": contender.batch,
        "measured_seconds": [meter.seconds for meter in meters],
        "measured_tokens": meters[-1].tokens,
        "full_seconds": full,
        "full_tokens": round(scale_up(name, case, positions, rounds[-1], tokens_of)),
        "attention_share": spread([meter.attention_seconds / meter.seconds for meter in meters]),
    }
    if agree and "ours" in rounds[0]["meters"]:
        ours = [scale_up("ours", case, positions, entry, seconds_of) for entry in rounds]
        record["ratio"] = spread([mine / theirs for mine, theirs in zip(full, ours, strict=True)])
        record["measured_ratio"] = spread([e["meters"][name].seconds / e["meters"]["ours"].seconds for e in rounds])
    return record


def efficiency_record(model: Any, case: Case, positions: list[int], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours, for the whole prompt, against the rate of the model's own matrix products at its largest forward."""
    flops = explanation_flops(model, case, round(scale_up("ours", case, positions, rounds[-1], tokens_of)))
    achieved = [flops / scale_up("ours", case, positions, entry, seconds_of) for entry in rounds]
    rates = [entry["linear_rate"] for entry in rounds]
    return {
        "flops": flops,
        "flops_per_second": spread(achieved),
        "rows_per_forward": rounds[-1]["meters"]["ours"].largest_forward,
        "linear_flops_per_second": spread(rates),
        "share_of_linear_rate": spread([mine / rate for mine, rate in zip(achieved, rates, strict=True)]),
    }


# Report ---------------------------------------------------------------------------------------------------------


def time_table(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Scores for every token of a prompt", title_justify="left")
    for column in ("dtype", "tokens", "contender", "seconds", "ours is faster", "tokens run", "attention"):
        table.add_column(column, justify="left" if column in ("dtype", "contender") else "right")
    for record in records:
        for name, entry in record["contenders"].items():
            ratio = entry.get("ratio")
            faster = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else "scores disagree"
            table.add_row(
                record["dtype"],
                str(record["tokens"]),
                name if entry["batch"] == 1 else f"{name} × {entry['batch']}",
                f"{'≈ ' if record['extrapolated'] else ''}{median(entry['full_seconds']):.1f}",
                "" if name == "ours" and ratio else faster,
                f"{entry['full_tokens']:,}",
                f"{entry['attention_share']['median']:.0%}",
                end_section=name == list(record["contenders"])[-1],
            )
    return table


def rate_table(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Ours against the rate of its matrix products", title_justify="left")
    for column in ("dtype", "tokens", "rows per forward", "GFLOP/s", "products alone", "share"):
        table.add_column(column, justify="right")
    for record in records:
        entry = record.get("efficiency")
        if entry:
            share = entry["share_of_linear_rate"]
            table.add_row(
                record["dtype"],
                str(record["tokens"]),
                str(entry["rows_per_forward"]),
                f"{entry['flops_per_second']['median'] / 1e9:.0f}",
                f"{entry['linear_flops_per_second']['median'] / 1e9:.0f}",
                f"{share['median']:.0%} ({share['min']:.0%}–{share['max']:.0%})",
            )
    return table


def memory_table(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Peak memory over the loaded model", title_justify="left")
    for column in ("dtype", "tokens", "what", "MB", "of a plain forward"):
        table.add_column(column, justify="left" if column in ("dtype", "what") else "right")
    for record in records:
        for name, size in record["peak_bytes"].items():
            share = size / record["peak_bytes"]["plain"]
            label = record["labels"][name]
            table.add_row(record["dtype"], str(record["tokens"]), label, f"{size / 1e6:.0f}", f"{share:.2f}")
    return table


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _say(status: Status, where: str, what: str) -> None:
    status.update(f"{where}: {what}")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", default="smollm2", help="Hub id, local folder, GGUF file, or smollm2.")
@click.option("--tokens", type=int, multiple=True, default=(128, 512, 1024), help="Length of the prompt.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), multiple=True, default=("float32", "bfloat16"))
@click.option("--sample", type=click.IntRange(min=0), help="Units measured; 0: all.  [default: by length]")
@click.option("--rounds", type=click.IntRange(min=1), default=3)
@click.option("--contenders", type=click.Choice(CONTENDERS), multiple=True, default=CONTENDERS)
@click.option("--mode", type=click.Choice(["log_additive", "multiplicative", "shifted"]), default="log_additive")
@click.option("--factor", type=click.FloatRange(min=0, min_open=True), default=0.1)
@click.option("--batch", type=click.IntRange(min=0), default=0, help="Batch size of eager and sdpa; 0: the fastest.")
@click.option("--token-budget", type=click.IntRange(min=1), help="Tokens per pack.  [default: ours chooses]")
@click.option("--memory/--no-memory", default=True, help="Measure peak memory too, each in a fresh process.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.  [default: torch's]")
@click.option("--squad", type=click.Path(), help="SQuAD-format file to take paragraphs from.  [default: $ATMAN_SQUAD]")
@click.option("--output", type=click.Path(path_type=Path), help="Result file.  [default: results/explain-<cpu>.json]")
def main(
    model: str,
    tokens: tuple[int, ...],
    dtype: tuple[str, ...],
    memory: bool,
    threads: int | None,
    squad: str | None,
    output: Path | None,
    **choices: Any,
) -> None:
    from transformers.utils import logging

    from atman_kernels.hf.models.loading import load_model

    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(**choices)
    if plan.mode != "log_additive":  # a bias cannot scale a score
        plan = Plan(**choices | {"contenders": tuple(name for name in plan.contenders if name != "sdpa")})
    console, path = Console(), output or RESULTS / f"explain-{cpu_slug()}.json"
    result: dict[str, Any] = {"environment": environment(), "model": model, "plan": vars(plan)}
    result |= {"time": [], "memory": []}
    started = time.perf_counter()
    for name in dtype:
        loaded, tokenizer = load_model(model, dtype=name)
        contenders = make_contenders(loaded, tokenizer, plan)
        for length in tokens:
            case = long_case(tokenizer, length, find_squad(squad))
            with console.status(where := f"{name}, {length} tokens") as status:
                say = partial(_say, status, where)
                result["time"].append(case_record(loaded, case, contenders, plan, say))
            write(path, result)
        del loaded, contenders
    if memory and "ours" in plan.contenders and can_measure_peak():
        for name in dtype:
            with console.status(f"peak memory, {name}"):
                result["memory"].append(memory_record(model, name, plan, result["time"], squad))
            write(path, result)
    result["environment"] |= {"seconds": time.perf_counter() - started, "load_average_at_end": os.getloadavg()[0]}
    write(path, result)
    console.print(time_table(result["time"]), rate_table(result["time"]))
    if result["memory"]:
        console.print(memory_table(result["memory"]))
    console.print(f"written to {path}")
    if not all(record["agreement"]["agree"] for record in result["time"]):
        console.print("Scores disagree, so no speed-up is reported: see 'agreement' in the file.")
        sys.exit(1)


if __name__ == "__main__":
    main()
