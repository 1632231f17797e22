"""captum and inseq as they come, against the same calls on our adapters.

python -m benchmarks.adapters                    # SmolLM2, 256 features; some 45 minutes on two cores
python -m benchmarks.adapters --quick            # a few features, one round: whether it runs
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.explain import spread, write
from benchmarks.machine import RESULTS, cpu_slug, environment
from benchmarks.peers import CaptumAblation, DenseEager, _attention, _no_cache
from benchmarks.prompts import (
    OWN,
    OWN_PARAGRAPH,
    Case,
    find_squad,
    long_case,
    questions,
    sample_positions,
)

FACTOR = 0.1
TOLERANCE = 1e-4  # float32
TARGET_WORDS = 3  # of a sentence: what comes before them is the prompt
OCCLUSION_BATCHES = (1, 8, 32)  # perturbations per forward that are tried for inseq's occlusion
WORKS = ("ablation", "shapley-tokens", "shapley-sentences", "inseq")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds_of(rounds: int, peer: Callable[[], Any], ours: Callable[[], Any], scale: float) -> dict[str, Any]:
    """Both once per round, one after the other; `scale` is how much more the peer's whole work is than its sample."""
    measured = [{"peer": seconds(peer), "ours": seconds(ours)} for _ in range(rounds)]
    return {
        "peer_measured_seconds": [entry["peer"] for entry in measured],
        "peer_seconds": [entry["peer"] * scale for entry in measured],
        "ours_seconds": [entry["ours"] for entry in measured],
        "peer_scaled_by": scale,
        "peer_extrapolated": scale != 1,
        "ratio": spread([entry["peer"] * scale / entry["ours"] for entry in measured]),
    }


def checked(found: Tensor, expected: Tensor, what: str) -> float:
    """The largest difference.

    Raises:
        click.ClickException: it is too large: no time is worth reporting then.
    """
    error = float((found - expected).abs().max())
    if not error <= TOLERANCE:
        raise click.ClickException(f"{what} is off by {error:.2g}, more than {TOLERANCE:g}: nothing was timed")
    return error


# captum: FeatureAblation -------------------------------------------------------------------------------------------


def ablation_record(model: Any, tokenizer: Any, case: Case, sample: int, rounds: int) -> dict[str, Any]:
    """Scores of every token of a prompt: captum replaces one token per forward, ours suppresses it in packs."""
    from captum.attr import TextTokenInput  # type: ignore[import-untyped, unused-ignore]

    from atman_kernels.adapters.captum import AtManAttribution

    attribution, peer = (
        AtManAttribution(model, tokenizer, factor=FACTOR, progress=False),
        CaptumAblation(model, tokenizer),
    )
    positions, few = sample_positions(case, sample), sample_positions(case, 4)
    inp = TextTokenInput(case.prompt, tokenizer)
    ours = attribution.attribute(inp, case.target_ids).token_attr.T
    exact = DenseEager(model, FACTOR, "log_additive", batch=1).scores(case, few)
    errors = {
        "ours": checked(ours[few], exact, "AtManAttribution"),
        "peer": checked(peer.scores(case, few), peer.expected_scores(case, few), "captum"),
    }
    scale = (case.prompt_tokens + 1) / (len(positions) + 1)  # its forwards all cost the same
    times = rounds_of(
        rounds, lambda: peer.scores(case, positions), lambda: attribution.attribute(inp, case.target_ids), scale
    )
    return {
        "what": "captum FeatureAblation → AtManAttribution",
        "peer": "LLMAttribution(FeatureAblation), forward_in_tokens=False, SDPA, no cache; it replaces the token",
        "features": case.prompt_tokens,
        "peer_measured_features": len(positions),
        "target_tokens": len(case.target_ids),
        "errors": errors,
        **times,
    }


# captum: ShapleyValueSampling ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A captum input that its own library can take as well as ours, and an answer."""

    inp: Any
    target: str


def sentences(squad: Path | None, words: range) -> Iterator[str]:
    """Those of so many words, without their full stop; the own paragraph's again and again where there is no file."""
    texts = [OWN_PARAGRAPH] if squad is None else dict.fromkeys(q.context for q in questions(squad))
    parts = (part.strip() for text in texts for part in text.replace("\n", " ").split(". "))
    found = (part for part in parts if len(part.split()) in words)
    return cycle(found) if squad is None else found


def cut_sentences(tokenizer: Any, squad: Path | None, count: int) -> list[Asked]:
    """Sentences that the model goes on with, each token a feature."""
    from captum.attr import TextTokenInput

    found = []
    for sentence in islice(sentences(squad, range(8, 31)), count):
        words = sentence.split()
        prompt, target = " ".join(words[:-TARGET_WORDS]), " " + " ".join(words[-TARGET_WORDS:])
        found.append(Asked(TextTokenInput(prompt, tokenizer), target))
    return found


def text_of_sentences(squad: Path | None, count: int) -> Asked:
    """A question about a text of short sentences, each a feature."""
    from captum.attr import TextTemplateInput

    question = OWN if squad is None else next(questions(squad))
    short = range(6, 31) if squad is None else range(6, 15)  # of words; the own paragraph has no shorter ones
    values = [sentence + "." for sentence in islice(sentences(squad, short), count)]
    template = " ".join(["{}"] * len(values)) + question.tail.replace("{", "{{").replace("}", "}}")
    return Asked(TextTemplateInput(template, values), question.target)


def shapley_record(
    model: Any, tokenizer: Any, asked: Sequence[Asked], permutations: int, sample: int, rounds: int
) -> dict[str, Any]:
    """Shapley values of every feature: captum puts something else in its place, ours removes it in packs."""
    from captum.attr import LLMAttribution, ShapleyValueSampling

    from atman_kernels.adapters.captum import AtManAttribution, SuppressedLLMAttribution, SuppressedTextInput

    # absent is absent, as what was replaced is for captum
    explainer = AtManAttribution(model, tokenizer, factor=0.0, progress=False).explainer
    ours = SuppressedLLMAttribution(ShapleyValueSampling(model), tokenizer)
    stock = LLMAttribution(ShapleyValueSampling(model), tokenizer)

    def of_ours(one: Asked, samples: int) -> Tensor:
        torch.manual_seed(0)
        return ours.attribute(SuppressedTextInput(one.inp, explainer), one.target, n_samples=samples).token_attr

    def of_stock(inp: Any, target: str, samples: int) -> Tensor:
        torch.manual_seed(0)
        with _attention(model, "sdpa"), _no_cache(model):
            return stock.attribute(inp, target, n_samples=samples, forward_in_tokens=False).token_attr

    slow = of_stock(SuppressedTextInput(asked[0].inp, explainer), asked[0].target, 1)
    error = checked(of_ours(asked[0], 1), slow, "SuppressedLLMAttribution")
    features = [one.inp.n_itp_features for one in asked]
    measured = min(sample, permutations)
    # captum's forwards: one of the whole, one of the empty input, one per feature and permutation
    scale = sum(permutations * n + 2 for n in features) / sum(measured * n + 2 for n in features)
    times = rounds_of(
        rounds,
        lambda: [of_stock(one.inp, one.target, measured) for one in asked],
        lambda: [of_ours(one, permutations) for one in asked],
        scale,
    )
    kind = type(asked[0].inp).__name__
    return {
        "what": f"captum ShapleyValueSampling of a {kind} → SuppressedLLMAttribution",
        "peer": "LLMAttribution(ShapleyValueSampling), forward_in_tokens=False, SDPA, no cache, captum's baselines",
        "texts": len(asked),
        "features": features,
        "permutations": permutations,
        "peer_measured_permutations": measured,
        "errors": {"ours": error},
        **times,
    }


# inseq --------------------------------------------------------------------------------------------------------------


def inseq_record(model: Any, tokenizer: Any, case: Case, rounds: int) -> dict[str, Any]:
    """Scores of every token for every later one of the answer: inseq's occlusion against its method "atman"."""
    import inseq  # type: ignore[import-untyped, unused-ignore]

    import atman_kernels as ak
    import atman_kernels.adapters.inseq

    loaded = inseq.load_model(model, "atman", tokenizer=tokenizer)
    whole = case.prompt + case.target

    def attribute(method: str, **options: Any) -> Tensor:
        output = loaded.attribute(case.prompt, whole, method=method, show_progress=False, **options)
        return output[0].target_attributions

    explainer = ak.Explainer(model, tokenizer, factor=FACTOR, progress=False)
    expected = explainer.explain(case.prompt, case.target, include_target=True).scores
    errors = {"ours": checked(attribute("atman", factor=FACTOR)[:-1].nan_to_num(0.0), expected, "inseq's atman")}
    one_by_one, costs = attribute("occlusion").nan_to_num(0.0), {}
    for size in OCCLUSION_BATCHES:
        start = time.perf_counter()
        try:
            found = attribute("occlusion", perturbations_per_eval=size).nan_to_num(0.0)
        except (RuntimeError, AssertionError, IndexError, TypeError, ValueError):
            continue  # inseq does not take that many at once
        if float((found - one_by_one).abs().max()) <= TOLERANCE:
            costs[size] = time.perf_counter() - start
    fastest = min(costs, key=costs.__getitem__)
    times = rounds_of(
        rounds,
        lambda: attribute("occlusion", perturbations_per_eval=fastest),
        lambda: attribute("atman", factor=FACTOR),
        1,
    )
    return {
        "what": 'inseq "occlusion" → "atman"',
        "peer": f"occlusion, perturbations_per_eval={fastest}, the fastest right one of {list(OCCLUSION_BATCHES)}",
        "peer_batches_that_are_right": sorted(costs),
        "features": case.prompt_tokens + len(case.target_ids) - 1,
        "target_tokens": len(case.target_ids),
        "errors": errors,
        **times,
    }


# Report -------------------------------------------------------------------------------------------------------------


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="The same calls on our adapters", title_justify="left")
    for column in ("what", "features", "peer s", "ours s", "ours is faster"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for record in records:
        ratio, features = record["ratio"], record["features"]
        table.add_row(
            record["what"],
            str(features if isinstance(features, int) else sum(features)),
            f"{'≈ ' if record['peer_extrapolated'] else ''}{min(record['peer_seconds']):.1f}",
            f"{min(record['ours_seconds']):.2f}",
            f"{ratio['median']:.1f} ({ratio['min']:.1f}–{ratio['max']:.1f})",
        )
    return table


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", default="smollm2", help="Hub id, local folder, GGUF file, or smollm2.")
@click.option("--units", type=click.IntRange(min=32), default=256, help="Tokens of captum's prompt, each a feature.")
@click.option("--inseq-units", type=click.IntRange(min=32), default=64, help="Tokens of inseq's prompt.")
@click.option("--sentences", "count", type=click.IntRange(min=2), default=20, help="For Shapley values.")
@click.option("--permutations", type=click.IntRange(min=1), default=25, help="Of the tokens of every sentence.")
@click.option("--sentence-permutations", type=click.IntRange(min=1), default=1000, help="Of the sentences of a text.")
@click.option("--only", type=click.Choice(WORKS), multiple=True, help="[default: all]")
@click.option("--sample", type=click.IntRange(min=1), default=31, help="Features of captum's ablation that are timed.")
@click.option("--rounds", type=click.IntRange(min=1), default=3)
@click.option("--quick", is_flag=True, help="128 features, 2 sentences, 2 permutations, one round.")
@click.option("--squad", type=click.Path(), help="SQuAD-format file to take text from.  [default: $ATMAN_SQUAD]")
@click.option("--output", type=click.Path(path_type=Path), help="Result file.  [default: results/adapters-<cpu>.json]")
def main(model: str, quick: bool, only: tuple[str, ...], squad: str | None, output: Path | None, **plan: Any) -> None:
    from atman_kernels.hf.models.loading import load_model

    if quick:
        plan |= {"units": 128, "inseq_units": 128, "count": 2, "permutations": 2, "sentence_permutations": 2}
        plan |= {"sample": 7, "rounds": 1}
    console, path, file = Console(), output or RESULTS / f"adapters-{cpu_slug()}.json", find_squad(squad)
    loaded, tokenizer = load_model(model, dtype="float32")
    records: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "environment": environment(),
        "model": model,
        "dtype": "float32",
        "plan": plan | {"quick": quick, "only": list(only or WORKS)},
    }
    result["records"] = records
    rounds = plan["rounds"]
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "ablation": lambda: ablation_record(
            loaded, tokenizer, long_case(tokenizer, plan["units"], file), plan["sample"], rounds
        ),
        "shapley-tokens": lambda: shapley_record(
            loaded, tokenizer, cut_sentences(tokenizer, file, plan["count"]), plan["permutations"], 1, rounds
        ),
        "shapley-sentences": lambda: shapley_record(
            loaded, tokenizer, [text_of_sentences(file, plan["count"])], plan["sentence_permutations"], 3, rounds
        ),
        "inseq": lambda: inseq_record(loaded, tokenizer, long_case(tokenizer, plan["inseq_units"], file), rounds),
    }
    for name in only or WORKS:
        with console.status(name):
            records.append(works[name]())
        write(path, result)
    result["environment"]["load_average_at_end"] = os.getloadavg()[0]
    write(path, result)
    console.print(table_of(records))
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
