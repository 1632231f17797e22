"""Explanations of answers about pictures, measured against the object that was asked about.

    python -m benchmarks.planted_pictures.evaluate

Pictures come from a seed that training did not use; those that the model answers wrongly have no right explanation
and are left out. The truth is the tiles that the object reaches into. Intervals are 95 % bootstrap intervals.
"""

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.evaluation import metrics
from benchmarks.machine import RESULTS, environment
from benchmarks.planted_pictures.explanations import FACTOR, METHODS, THRESHOLD, Asked, ask
from benchmarks.planted_pictures.model import colour_ids, in_order, load
from benchmarks.planted_pictures.pictures import draw

SEED = 20_000
STEPS = 16  # of the faithfulness curves
COLUMNS = ("mAP", "mAP_IQ", "mAR", "mAR_IQ", "hit@1", "hit@5", "faithfulness")


def answered(model: PreTrainedModel, seed: int) -> Iterator[tuple[Asked, Tensor] | None]:
    """Questions with the (64,) bool tiles of their object, without end; None for each wrong answer."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        pictures = draw(1, generator)
        asked = ask(model, pictures.pixels[0], int(pictures.shapes[0, 0]))
        right = asked.answer == int(colour_ids(pictures.colours[0, 0]))
        yield (asked, in_order(pictures.tiles()[0, 0])) if right else None


def measured(found: list[Tensor], questions: list[tuple[Asked, Tensor]]) -> dict[str, Any]:
    """All measures of one method's explanations, (64,) each."""
    truths = [tiles for _, tiles in questions]
    pointing = metrics.localisation(found, truths)
    areas = [
        metrics.faithfulness(relevance, asked.without, STEPS).area
        for relevance, (asked, _) in zip(found, questions, strict=True)
    ]
    hits = {k: [float(metrics.hit(*pair, k)) for pair in zip(found, truths, strict=True)] for k in (1, 5)}
    items = {
        "precision": pointing.precision,
        "recall": pointing.recall,
        "faithfulness": torch.tensor(areas, dtype=torch.float64),
        **{f"hit@{k}": torch.tensor(values, dtype=torch.float64) for k, values in hits.items()},
    }
    summary = pointing.summary() | {name: float(items[name].mean()) for name in ("hit@1", "hit@5", "faithfulness")}
    intervals = {name: metrics.confidence_interval(values) for name, values in items.items()}
    intervals["precision_IQ"] = metrics.confidence_interval(pointing.precision, interquartile=True)
    return {"summary": summary, "intervals": intervals}


def agreement(found: dict[str, list[Tensor]]) -> dict[str, float]:
    """Mean rank correlation over the pictures, for every two methods."""
    result = {}
    for first, second in combinations(found, 2):
        pairs = zip(found[first], found[second], strict=True)
        values = [metrics.rank_correlation(a, b) for a, b in pairs]
        result[f"{first} / {second}"] = sum(values) / len(values)
    return result


def report(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['settings']['pictures']} pictures with planted truth", title_justify="left")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for method, entry in result["methods"].items():
        low, high = entry["intervals"]["precision"]
        cells = [f"{entry['summary'][column]:.3f}" for column in COLUMNS]
        table.add_row(method, f"{cells[0]} ({low:.2f} – {high:.2f})", *cells[1:])
    return table


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--pictures", type=click.IntRange(min=2), default=200)
@click.option("--seed", default=SEED)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "planted-pictures.json")
def main(pictures: int, seed: int, output: Path) -> None:
    torch.set_num_threads(1)
    model, questions, wrong = load(), [], 0
    for question in answered(model, seed):
        if question is None:
            wrong += 1
        else:
            questions.append(question)
        if len(questions) == pictures:
            break
    found = {
        name: [method(asked).double() for asked, _ in track(questions, description=name)]
        for name, method in METHODS.items()
    }
    result = {
        "environment": environment(),
        "settings": {"pictures": pictures, "seed": seed, "factor": FACTOR, "threshold": THRESHOLD, "steps": STEPS},
        "left_out_as_answered_wrongly": wrong,
        "tiles_of_truth": sum(float(tiles.sum()) for _, tiles in questions) / pictures,
        "methods": {name: measured(found[name], questions) for name in track(found, description="measures")},
        "rank_correlation": agreement(found),
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Console(width=150).print(report(result), f"written to {output}")


if __name__ == "__main__":
    main()
