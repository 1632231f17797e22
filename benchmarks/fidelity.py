"""How much of an explanation survives bfloat16: rank correlation and top-5 overlap with the float32 explanation.

    python -m benchmarks.fidelity                    # goes on where it was interrupted
    python -m benchmarks.fidelity --items 60 --max-tokens 170

Items: the first question of every paragraph whose prompt (context, question) has at most --max-tokens tokens, in the
file's order; the target is its first gold answer; units are tokens. Both models are the same weights, loaded in the
two dtypes. Each item is appended to a .jsonl file as soon as it is done, and the summary is written beside it.
"""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from atman_kernels.evaluation.metrics import rank_correlation
from benchmarks.explain import write
from benchmarks.machine import RESULTS, cpu_slug, environment
from benchmarks.prompts import Case, Question, find_squad, questions

TOP = 5
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DTYPES = ("float32", "bfloat16")


def choose_items(tokenizer: Any, squad: Path, items: int, max_tokens: int) -> list[Question]:
    """The rule in this module's docstring.

    Raises:
        click.UsageError: the file has fewer such questions.
    """

    def fits(question: Question) -> bool:
        return Case.tokenize(tokenizer, question.prompt, question.target, squad.name).prompt_tokens <= max_tokens

    chosen = list(islice(filter(fits, questions(squad, per_paragraph=1)), items))
    if len(chosen) < items:
        raise click.UsageError(f"--items: {squad.name} has {len(chosen)} such questions, {items} were asked for")
    return chosen


def compare(question: Question, explainers: dict[str, Any]) -> dict[str, Any]:
    """Explain one question in both dtypes."""
    found = {
        dtype: explainer.explain(question.prompt, target=question.target, units="token")
        for dtype, explainer in explainers.items()
    }
    wide, low = (found[dtype] for dtype in DTYPES)
    best = {dtype: set(found[dtype].total.topk(min(TOP, len(found[dtype].units))).indices.tolist()) for dtype in DTYPES}
    return {
        "item": question.item,
        "units": len(wide.units),
        "target_tokens": len(wide.target_tokens),
        "spearman": rank_correlation(wide.total, low.total),
        "top5_overlap": len(best["float32"] & best["bfloat16"]) / len(best["float32"]),
        "top1_equal": int(wide.total.argmax() == low.total.argmax()),
        "max_difference": float((wide.total - low.total).abs().max()),
        "float32_range": float(wide.total.max() - wide.total.min()),
        "base_logprob": {dtype: float(found[dtype].base_logprobs.sum()) for dtype in DTYPES},
        "seconds": {dtype: found[dtype].stats["seconds"] for dtype in DTYPES},
        "path": {dtype: found[dtype].settings["path"] for dtype in DTYPES},
    }


def summary(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, extremes and quantiles over the items."""

    def over(values: list[float]) -> dict[str, float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        quantiles = tensor.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        return {
            "mean": float(tensor.mean()),
            "min": float(tensor.min()),
            "max": float(tensor.max()),
            **{f"q{round(100 * q):02d}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        }

    names = ("spearman", "top5_overlap", "top1_equal", "max_difference")
    result: dict[str, Any] = {name: over([entry[name] for entry in done]) for name in names}
    return result | {"seconds": {dtype: over([entry["seconds"][dtype] for entry in done]) for dtype in DTYPES}}


def read_done(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What earlier runs finished, by item.

    Raises:
        click.UsageError: they ran with other settings, so their results do not belong in the same summary.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if json.loads(lines[0])["settings"] != settings:
        raise click.UsageError(f"{path} was begun with other settings; name another --output, or delete it")
    if not lines[-1].endswith("\n"):  # the process was ended in the middle of a line
        path.write_text("".join(lines := lines[:-1]), encoding="utf-8")
    return {entry["item"]: entry for entry in map(json.loads, lines[1:])}


def report(result: dict[str, Any]) -> Table:
    table = Table(title=f"bfloat16 against float32, {len(result['items'])} items", title_justify="left")
    for column in ("", "mean", "min", "5 %", "25 %", "median", "75 %", "95 %"):
        table.add_column(column, justify="right" if column else "left")
    rows = {"rank correlation": "spearman", "top-5 overlap": "top5_overlap", "same top unit": "top1_equal"}
    for label, name in rows.items():
        entry = result["summary"][name]
        table.add_row(label, *(f"{entry[key]:.3f}" for key in ("mean", "min", "q05", "q25", "q50", "q75", "q95")))
    return table


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", default="smollm2", help="Hub id, local folder, GGUF file, or smollm2.")
@click.option("--items", type=click.IntRange(min=1), default=60)
@click.option("--max-tokens", type=click.IntRange(min=1), default=170)
@click.option("--mode", type=click.Choice(["log_additive", "multiplicative", "shifted"]), default="log_additive")
@click.option("--factor", type=click.FloatRange(min=0), default=0.1)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.  [default: torch's]")
@click.option("--squad", type=click.Path(), help="SQuAD-format file.  [default: $ATMAN_SQUAD]")
@click.option("--output", type=click.Path(path_type=Path), help="Result file.  [default: results/fidelity-<cpu>.json]")
def main(
    model: str,
    items: int,
    max_tokens: int,
    mode: str,
    factor: float,
    threads: int | None,
    squad: str | None,
    output: Path | None,
) -> None:
    from transformers.utils import logging

    import atman_kernels as ak
    from atman_kernels.hf.models.loading import load_model

    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    file = find_squad(squad)
    if file is None:
        raise click.UsageError("no SQuAD-format file; name one with --squad or ATMAN_SQUAD")
    path = output or RESULTS / f"fidelity-{cpu_slug()}.json"
    settings = {"model": model, "max_tokens": max_tokens, "mode": mode, "factor": factor, "text": file.name}
    explainers: dict[str, Any] = {}
    for dtype in DTYPES:
        loaded, tokenizer = load_model(model, dtype=dtype)
        explainers[dtype] = ak.Explainer(loaded, tokenizer, mode=mode, factor=factor, progress=False)
    chosen = choose_items(tokenizer, file, items, max_tokens)
    log = path.with_suffix(".jsonl")
    done = read_done(log, settings)
    for question in track([q for q in chosen if q.item not in done], description=f"{len(chosen)} items"):
        done[question.item] = compare(question, explainers)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(done[question.item]) + "\n")
    entries = [done[question.item] for question in chosen]
    result = {"environment": environment(), "settings": settings, "summary": summary(entries), "items": entries}
    write(path, result)
    Console().print(report(result), f"written to {path}")


if __name__ == "__main__":
    main()
