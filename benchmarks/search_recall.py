"""Does a search find the units that an exact explanation finds strongest, and for which part of the work?

    python -m benchmarks.search_recall collect --split test --results test.jsonl --seconds 3000
    python -m benchmarks.search_recall report test.jsonl         # recall and cost of the search as it is
    python -m benchmarks.search_recall collect --split dev --depths 1,4,8,16 --results dev.jsonl
    python -m benchmarks.search_recall choose dev.jsonl          # the same for other constants of the search
    python -m benchmarks.search_recall rounding bf16.jsonl f32.jsonl

Questions of a SQuAD-format file over passages filled up to a length, the gold answer. `collect` appends
each passage's questions to a .jsonl file and goes on where it was interrupted; questions about one passage run
together. Lengths take turns, so that whatever was collected is balanced. `choose` replays the search's own rule on
what rounds of each depth said about all units.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from atman_kernels.evaluation.metrics import confidence_interval
from atman_kernels.evaluation.squad import Item, drawn, read_items, split_of, usable
from atman_kernels.planning.halving import SCHEDULE, Halving, Schedule
from benchmarks.machine import RESULTS, environment
from benchmarks.prompts import find_squad, passages_of_length

EXACT = 16
TOPS = (1, 5, 10)
STRONGEST = TOPS[-1]
SHORT = 16  # tokens of a suffix that hints are held against
SHARES = {100: 4, 250: 4, 500: 2, 1000: 1}  # passages of each length in one turn


@click.group()
def main() -> None:
    """See the module's docstring."""


@main.command()
@click.option("--squad", metavar="FILE")
@click.option("--split", type=click.Choice(["dev", "test"]), default="test", show_default=True)
@click.option("--lengths", default="100,250,500,1000", show_default=True, help="Tokens of a prompt.")
@click.option(
    "--depths", default="", help="In place of the search, all at these depths, to first order and by AttnLRP."
)
@click.option("--units", type=click.Choice(["token", "word"]), default="token", show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seconds", type=int, default=10**6, help="Begin no passage after so long.")
@click.option("--per-passage", type=int, default=5, show_default=True, help="Questions about one passage.")
@click.option("--part", default="0/1", show_default=True, help="I/N: of N processes side by side, this is number I.")
@click.option("--results", type=Path, required=True, help="A .jsonl file.")
def collect(
    squad: str | None, split: str, lengths: str, depths: str, units: Any, dtype: str, results: Path, **how: Any
) -> None:
    """Explain questions exactly, and by the search or at given depths."""
    from atman_kernels import Explainer
    from atman_kernels.cli.model import load

    file = find_squad(squad)
    if file is None:
        raise click.UsageError("--squad names a file in SQuAD format")
    model, tokenizer = load("smollm2", device="cpu", dtype=dtype)
    explainer = Explainer(model, tokenizer, progress=False)
    items = drawn([item for item in usable(read_items(file))[0] if split_of(item) == split], None, seed=0)
    known = {(entry["length"], entry["item"]) for entry in (_read([results]) if results.exists() else [])}
    number, of = map(int, how["part"].split("/"))
    start = time.monotonic()
    wanted = {
        int(n): itertools.islice(passages_of_length(tokenizer, items, int(n), how["per_passage"]), number, None, of)
        for n in lengths.split(",")
    }
    for length, asked in _turns(wanted):
        if time.monotonic() - start > how["seconds"]:
            break
        if all((length, item.id) in known for item in asked):
            continue
        entries = _explained(explainer, asked, units, [int(depth) for depth in depths.split(",") if depth])
        with results.open("a", encoding="utf-8") as stream:
            for entry in entries:
                stream.write(json.dumps({"length": length, "split": split, "dtype": dtype, **entry}) + "\n")
        click.echo(f"{length} tokens: {len(asked)} questions, {time.monotonic() - start:.0f} s", err=True)


def _turns(wanted: Mapping[int, Iterator[list[Item]]]) -> Iterator[tuple[int, list[Item]]]:
    """Some passages of each length, again and again."""
    while True:
        turn = [
            (length, asked)
            for length, passages in wanted.items()
            for asked in itertools.islice(passages, SHARES.get(length, 1))
        ]
        if not turn:
            return
        yield from turn


def _explained(explainer: Any, asked: list[Item], units: str, depths: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per question, all of one passage."""
    prompts, targets = [item.prompt(chat=False) for item in asked], [item.target(chat=False) for item in asked]
    ways: dict[str, dict[str, Any]] = {"exact": {}}
    if depths:
        ways |= {"linear": {"method": "linear", "whole_answer": True}, "attnlrp": {"method": "attnlrp"}}
        ways |= {f"recompute {depth}": {"recompute": depth} for depth in depths}
    else:
        ways["search"] = {"exact": EXACT}
    entries: list[dict[str, Any]] = [{"item": item.id} for item in asked]
    for name, options in ways.items():
        started = time.process_time()
        explanations = explainer.explain_batch(prompts, targets, units, **options)
        seconds = time.process_time() - started
        for entry, explanation in zip(entries, explanations, strict=True):
            entry["units"] = len(explanation.units)
            entry["starts"] = [min(unit.token_indices) for unit in explanation.units]
            entry["tokens"] = 1 + max(max(unit.token_indices) for unit in explanation.units)
            entry[name] = {
                "scores": [round(score, 4) for score in explanation.total.tolist()],
                "tokens": explanation.stats.get("tokens_through_model"),  # of all questions of the passage together
                "seconds": round(seconds, 3),  # likewise, of the processor
            }
            if name == "search":
                entry[name]["exact"] = [i for i in range(len(explanation.units)) if explanation.is_exact(i)]
    return entries


def _read(files: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@main.command()
@click.argument("files", nargs=-1, type=Path, required=True)
@click.option("--output", type=Path, default=RESULTS / "search-recall-test.json", show_default=True)
def report(files: tuple[Path, ...], output: Path) -> None:
    """Recall and cost of the search, per length."""
    entries = _read(files)

    def of(length: int) -> dict[str, Any]:
        own = [entry for entry in entries if entry["length"] == length]
        passages = {json.dumps([entry["exact"]["tokens"], entry["exact"]["seconds"]]): entry for entry in own}.values()
        parts = {
            name: sum(e["search"][name] for e in passages) / sum(e["exact"][name] for e in passages)
            for name in ("tokens", "seconds")
        }
        # hints take two forwards, the first round one token for each unit
        alone = [_exact_tokens(e, e["search"]["exact"]) + 2 * _placed(e)[1] + e["units"] for e in own]
        whole = [_exact_tokens(e, range(e["units"])) for e in own]
        chosen = [sum(flag < e["units"] for flag in e["search"]["exact"]) / e["units"] for e in own]
        return (
            _recall(own, [e["search"]["exact"] for e in own])
            | {"part of the tokens, a question alone": round(sum(alone) / sum(whole), 4)}
            | {f"part of the {name}, together": round(part, 4) for name, part in parts.items()}
            | {"passages": len(passages), "part of the units that is exact": round(sum(chosen) / len(chosen), 4)}
        )

    _write(output, {"exact": EXACT, "schedule": asdict(SCHEDULE), "dtype": entries[0]["dtype"]}, entries, of)


@main.command()
@click.argument("files", nargs=-1, type=Path, required=True)
@click.option("--output", type=Path, default=RESULTS / "search-recall-dev.json", show_default=True)
def choose(files: tuple[Path, ...], output: Path) -> None:
    """Recall and cost of other constants and hints, and of more exact units."""
    collected = _read(files)
    entries = [entry for entry in collected if {"attnlrp", *(f"recompute {k}" for k in (1, 4, 8, 16))} <= set(entry)]
    first_order = ("linear",)
    kinds: dict[str, tuple[Schedule, Sequence[str], int]] = {
        "as it is": (SCHEDULE, first_order, EXACT),
        "without hints": (SCHEDULE, (), EXACT),
        "relevance of AttnLRP as a hint, too": (SCHEDULE, (*first_order, "attnlrp"), EXACT),
    }
    for exact in (24, 32, 48):
        kinds[f"exact = {exact}"] = (SCHEDULE, first_order, exact)
    changes: dict[str, list[Any]] = {
        "first_depth": [4, 8, 16],
        "tail": [0, 32, 64],
        "wake": [0, 5],
        "margin": [1.0, 2.0],
    }
    for name, values in changes.items():
        for value in values:
            kinds[f"{name} = {value:g}"] = (replace(SCHEDULE, **{name: value}), first_order, EXACT)
    kinds["one round"] = (replace(SCHEDULE, deepest=0.0), first_order, EXACT)

    def of(length: int) -> dict[str, Any]:
        own = [entry for entry in entries if entry["length"] == length]
        found = {}
        whole = sum(_exact_tokens(entry, range(entry["units"])) for entry in own)
        for name, way in kinds.items():
            replayed = [_replay(entry, *way) for entry in own]
            cost = sum(tokens for _, tokens in replayed) / whole
            found[name] = _recall(own, [chosen for chosen, _ in replayed]) | {"part of the tokens": round(cost, 4)}
        return found

    hinted = [entry for entry in collected if "linear" in entry and f"recompute {SHORT}" in entry]
    _write(output, {"exact": EXACT, "dtype": entries[0]["dtype"], "hints": _of_hints(hinted)}, entries, of)


@main.command()
@click.argument("files", nargs=2, type=Path)
def rounding(files: tuple[Path, Path]) -> None:
    """Which part of the strongest units is the same, by exact scores of one file and of another in a wider dtype."""
    rounded, wider = ({(entry["length"], entry["item"]): entry for entry in _read([file])} for file in files)
    own = [(entry, wider[key]) for key, entry in rounded.items() if key in wider]
    strongest = [_ranked(entry["exact"]["scores"])[:STRONGEST] for entry, _ in own]
    found = _recall([entry for _, entry in own], strongest)
    largest = [max(abs(a - b) for a, b in zip(*(e["exact"]["scores"] for e in both), strict=True)) for both in own]
    click.echo(json.dumps(found | {"largest difference": _summed_up(largest)}, indent=1))


def _of_hints(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the strongest ten a short suffix ranks too low, and what effects to first order make of these."""
    missed, found, recall = 0, 0, 0.0
    for entry in entries:
        strongest = _ranked(entry["exact"]["scores"])[:10]
        short, first_order = (_ranked(entry[name]["scores"]) for name in (f"recompute {SHORT}", "linear"))
        low = set(strongest) - set(short[:EXACT])
        missed += len(low)
        found += len(low & set(first_order[:12]))
        recall += len(set(strongest) & set(first_order[:EXACT])) / len(strongest) / len(entries)
    return {
        "questions": len(entries),
        f"of the strongest 10, not among the first {EXACT} by the last {SHORT} tokens": missed,
        "of these, among the first 12 to first order": found,
        f"of the strongest 10, among the first {EXACT} to first order": round(recall, 4),
    }


def _ranked(scores: Sequence[float]) -> list[int]:
    """Units, the strongest first."""
    return torch.tensor(scores).argsort(descending=True, stable=True).tolist()


def _replay(entry: dict[str, Any], schedule: Schedule, hints: Sequence[str], exact: int) -> tuple[list[int], int]:
    """The units that a search would have run exactly, and the tokens that it would have put through the model."""
    starts, prompt_tokens = _placed(entry)
    search = Halving(starts, prompt_tokens, exact, schedule)
    if hints:
        search.hint([max(each) for each in zip(*(_speaking(entry, name) for name in hints), strict=True)])
    tokens = 2 * prompt_tokens * len(hints)
    while search.depth is not None:
        scores = entry[f"recompute {search.depth}"]["scores"]
        tokens += len(search.candidates) * search.depth
        search.learn({unit: scores[unit] for unit in search.candidates})
    return search.chosen, tokens + _exact_tokens(entry, search.chosen)


def _speaking(entry: dict[str, Any], hint: str) -> list[float]:
    """What a hint says for each unit; relevance speaks for it by its size, whatever its sign."""
    scores: list[float] = entry[hint]["scores"]
    return [abs(score) for score in scores] if hint == "attnlrp" else scores


def _exact_tokens(entry: dict[str, Any], units: Iterable[int]) -> int:
    """Of exact runs, the answer's tokens aside."""
    starts, tokens = _placed(entry)
    return sum(tokens - starts[unit] for unit in units)


def _placed(entry: dict[str, Any]) -> tuple[Sequence[int], int]:
    """Where each unit begins, and how many tokens the prompt has; where nothing else is said, every token is a unit."""
    return entry.get("starts", range(entry["units"])), entry.get("tokens", entry["units"])


def _recall(entries: list[dict[str, Any]], chosen: list[list[int]]) -> dict[str, Any]:
    """Which part of the strongest units was among the chosen ones, and of their strength; 95 % bootstrap intervals."""
    found: dict[str, Any] = {"questions": len(entries)}
    scores = [entry["exact"]["scores"] for entry in entries]
    for top in TOPS:
        parts = [len({*_ranked(own)[:top]} & {*units}) / top for own, units in zip(scores, chosen, strict=True)]
        found[f"top {top}"] = _summed_up(parts)
    parts = [
        sum(sorted(own[unit] for unit in units)[-STRONGEST:]) / sum(sorted(own)[-STRONGEST:])
        for own, units in zip(scores, chosen, strict=True)
    ]
    return found | {f"strength of the {STRONGEST} strongest chosen over that of the {STRONGEST}": _summed_up(parts)}


def _summed_up(parts: Sequence[float]) -> dict[str, Any]:
    values = torch.tensor(parts, dtype=torch.float64)
    low, high = confidence_interval(values) if len(parts) > 1 else (float("nan"), float("nan"))
    return {"mean": round(float(values.mean()), 4), "interval": [round(low, 4), round(high, 4)]}


def _write(output: Path, facts: dict[str, Any], entries: list[dict[str, Any]], of: Callable[[int], Any]) -> None:
    lengths = sorted({entry["length"] for entry in entries})
    content = {**facts, "lengths": {str(length): of(length) for length in lengths}, "environment": environment()}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(content["lengths"], indent=1))


if __name__ == "__main__":
    main()
