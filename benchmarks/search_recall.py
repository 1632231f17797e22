"""Does a search find the units that an exact explanation finds strongest, and for which part of the work?

    python -m benchmarks.search_recall collect --split test --lengths 100,250,500,1000 --seconds 3000
    python -m benchmarks.search_recall collect --split dev --depths 8,16,32,64,128      # what the search's constants are chosen on
    python -m benchmarks.search_recall choose       # recall and cost of many constants on dev
    python -m benchmarks.search_recall report       # recall of the search as it is, on test

Questions of a SQuAD-format file over passages filled up to a length, token units, the gold answer. `collect` appends
each passage's questions to a .jsonl file and goes on where it was interrupted; questions about one passage run
together. Lengths take turns, so that whatever was collected is balanced.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from atman_kernels.evaluation.squad import Item, drawn, read_items, split_of, usable
from benchmarks.machine import environment
from benchmarks.prompts import find_squad, passages_of_length

EXACT = 16
SHARES = {100: 4, 250: 4, 500: 2, 1000: 1}  # passages of each length in one turn


@click.group()
def main() -> None:
    """See the module's docstring."""


@main.command()
@click.option("--squad", metavar="FILE")
@click.option("--split", type=click.Choice(["dev", "test"]), default="test", show_default=True)
@click.option("--lengths", default="100,250,500,1000", show_default=True, help="Tokens of a prompt.")
@click.option("--depths", default="", help="Also all units at these depths, to a third.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seconds", type=int, default=10**6, help="Begin no passage after so long.")
@click.option("--per-passage", type=int, default=5, show_default=True, help="Questions about one passage.")
@click.option("--part", default="0/1", show_default=True, help="I/N: of N processes side by side, this is number I.")
@click.option("--results", type=Path, required=True, help="A .jsonl file.")
def collect(
    squad: str | None, split: str, lengths: str, depths: str, dtype: str, seconds: int, per_passage: int, part: str, results: Path
) -> None:
    """Explain questions exactly, by the search, and at given depths."""
    from atman_kernels import Explainer
    from atman_kernels.cli.model import load

    file = find_squad(squad)
    if file is None:
        raise click.UsageError("--squad names a file in SQuAD format")
    model, tokenizer = load("smollm2", device="cpu", dtype=dtype)
    explainer = Explainer(model, tokenizer, progress=False)
    items = drawn([item for item in usable(read_items(file))[0] if split_of(item) == split], None, seed=0)
    known = {(entry["length"], entry["item"]) for entry in _read(results)}
    number, of = map(int, part.split("/"))
    start = time.monotonic()
    wanted = {
        int(length): itertools.islice(passages_of_length(tokenizer, items, int(length), per_passage), number, None, of)
        for length in lengths.split(",")
    }
    for length, asked in _turns(wanted):
        if time.monotonic() - start > seconds:
            break
        if all((length, item.id) in known for item in asked):
            continue
        entries = _explained(explainer, asked, [int(k) for k in depths.split(",") if k and int(k) <= length // 3])
        with results.open("a", encoding="utf-8") as stream:
            for entry in entries:
                stream.write(json.dumps({"length": length, "split": split, "dtype": dtype, **entry}) + "\n")
        click.echo(f"{length} tokens: {len(asked)} questions, {time.monotonic() - start:.0f} s", err=True)


def _turns(wanted: dict[int, Iterator[list[Item]]]) -> Iterator[tuple[int, list[Item]]]:
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


def _explained(explainer: Any, asked: list[Item], depths: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per question, all of one passage."""
    prompts, targets = [item.prompt(chat=False) for item in asked], [item.target(chat=False) for item in asked]
    ways: dict[str, dict[str, Any]] = {"exact": {}}
    if depths:
        ways["linear"] = {"method": "linear", "whole_answer": True}
        ways |= {f"recompute {depth}": {"recompute": depth} for depth in depths}
    else:
        ways["search"] = {"exact": EXACT}
    entries: list[dict[str, Any]] = [{"item": item.id} for item in asked]
    for name, options in ways.items():
        started = time.process_time()
        explanations = explainer.explain_batch(prompts, targets, "token", **options)
        seconds = time.process_time() - started
        for entry, explanation in zip(entries, explanations, strict=True):
            entry["units"] = len(explanation.units)
            entry[name] = {
                "scores": [round(score, 4) for score in explanation.total.tolist()],
                "tokens": explanation.stats.get("tokens_through_model"),  # of all questions together
                "seconds": round(seconds, 3),  # likewise, of the processor
            }
            if name == "search":
                flags = explanation.exact
                entry[name]["exact"] = [i for i in range(len(explanation.units)) if flags is None or bool(flags[i])]
    return entries


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


if __name__ == "__main__":
    main()
