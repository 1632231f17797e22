"""Explanations of look-ups whose right explanation is one token.

    python -m benchmarks.planted_lookup

A small Llama is trained on the task first (ten seconds). Questions come from a seed that training did not use; those
that it answers wrongly have no right explanation and are left out. Intervals are 95 % bootstrap intervals.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track

from atman_kernels import Explainer
from atman_kernels.cli.bench_quality import show
from atman_kernels.evaluation.metrics import faithfulness
from atman_kernels.evaluation.quality import Setting, summarize
from atman_kernels.explain.methods import names
from benchmarks.machine import RESULTS, environment
from benchmarks.planted_lookup.task import LookUp, look_ups, tokenizer, train

SEED = 20_000
FACTOR = 0.0
STEPS = 6  # of the faithfulness curves
MODES = ("log_additive", "multiplicative", "shifted")
PEERS = tuple(name for name in names() if name not in ("atman", "shapley", "lasso", "at2"))
SETTINGS = (
    *(Setting(f"AtMan {mode}", explainer={"mode": mode, "factor": FACTOR}) for mode in MODES),
    *(Setting(name, name) for name in PEERS),
)


def answered(model: Any, count: int, seed: int) -> tuple[list[LookUp], int]:
    """Questions that the model gets right, and how many it got wrong on the way."""
    words, asked = tokenizer(), look_ups(2 * count, seed)
    ids = torch.tensor([words(question.prompt)["input_ids"] for question in asked])
    with torch.no_grad():
        answers = words.batch_decode(model(ids).logits[:, -1:].argmax(-1))
    right = [question.answer == answer for question, answer in zip(asked, answers, strict=True)]
    chosen = [question for question, good in zip(asked, right, strict=True) if good][:count]
    return chosen, right[: asked.index(chosen[-1])].count(False)


def entry(explainers: dict[str, Explainer], removing: Explainer, setting: Setting, question: LookUp) -> dict[str, Any]:
    """One explanation, in the form that `summarize` takes."""
    started = time.perf_counter()
    explanation = explainers[setting.name].explain(question.prompt, question.answer, method=setting.method)
    seconds = time.perf_counter() - started

    def logprobs(suppressed: torch.Tensor) -> torch.Tensor:
        return removing.ablate(question.prompt, question.answer, masks=suppressed).logprobs.sum(1)

    return {
        "item": question.prompt,
        "setting": setting.name,
        "seconds": seconds,
        "relevance": explanation.total.tolist(),
        "context": [0, len(explanation.units)],
        "truth": [question.value_position],
        "faithfulness": faithfulness(explanation.total, logprobs, STEPS).area,
    }


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--questions", type=click.IntRange(min=2), default=400)
@click.option("--seed", default=SEED)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "planted-lookup.json")
def main(questions: int, seed: int, output: Path) -> None:
    torch.set_num_threads(1)  # products this small gain nothing from more, and sum in one order only
    model, words = train(seed=0), tokenizer()
    chosen, wrong = answered(model, questions, seed)
    explainers = {s.name: Explainer(model, words, progress=False, **s.explainer) for s in SETTINGS}
    removing = Explainer(model, words, factor=0.0, progress=False)
    entries = [
        entry(explainers, removing, setting, question)
        for setting in SETTINGS
        for question in track(chosen, description=setting.name)
    ]
    found = summarize(entries)
    show(found)
    result = {
        "environment": environment(),
        "settings": {"questions": questions, "seed": seed, "factor": FACTOR, "steps": STEPS},
        "left_out_as_answered_wrongly": wrong,
        "methods": {s.setting: {"values": s.values, "intervals": s.intervals} for s in found},
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(f"written to {output}")


if __name__ == "__main__":
    main()
