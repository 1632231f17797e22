"""Do explanations point to the answer in the passage? Methods over questions, measured and compared."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.evaluation.metrics import (
    confidence_interval,
    faithfulness,
    hit,
    interquartile_mean,
    precision,
    rank_correlation,
    recall,
)
from atman_kernels.evaluation.results import ResultFile
from atman_kernels.evaluation.squad import Item
from atman_kernels.explain.explainer import Explainer
from atman_kernels.explain.head_weights import recorded
from atman_kernels.inputs.tokenization import UnitChoice, read_prompt
from atman_kernels.planning.units import Unit
from atman_kernels.result.explanation import Explanation

FAITHFULNESS_STEPS = 10
MOST_TOGETHER = 8  # questions whose variants are run together: what is lost when a run is stopped


@dataclass(frozen=True)
class Setting:
    """One way to explain.

    Attributes:
        name: what tables call it.
        method: of `Explainer.explain`.
        options: of that method; and `recompute` or `exact`, as of `Explainer.explain`.
        explainer: arguments of `Explainer`: mode, factor, similarity_threshold, layers.
    """

    name: str
    method: str = "atman"
    options: dict[str, Any] = field(default_factory=dict)
    explainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationProtocol:
    """How every item is explained, whatever the method.

    Attributes:
        units: a granularity.
        chat: whether the question is a message in the tokenizer's chat template, see `Item.prompt`.
        passage_only: whether units are those of the passage alone, instead of the whole prompt's.
        faithfulness_items: for how many of the first items deletion and insertion curves are run as well.
    """

    units: str = "token"
    chat: bool = False
    faithfulness_items: int = 0
    passage_only: bool = False


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    settings: Sequence[Setting],
    protocol: EvaluationProtocol,
    results: ResultFile,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Explain the gold answer of every item with every setting, and record the relevance of every unit.

    Measurements that the result file has are skipped. Questions about one passage are explained together, since their
    variants share the passage. Where the model does not support a method, the reason is recorded for every item.

    Args:
        items: with usable answers, see `usable`; those about one passage one after the other.
        advance: called after each explanation, and for each that was there.
    """
    explainers = {}
    for setting in settings:
        explainer = explainers[setting.name] = Explainer(model, tokenizer, progress=False, **setting.explainer)
        # In full, since another version of the package may have other defaults.
        definition = {
            "method": setting.method,
            "options": recorded(setting.options),
            "explainer": explainer.suppression,
        }
        results.define(setting.name, definition)
    done = {(entry["item"], entry["setting"]) for entry in results.entries}
    with_curves = {item.id for item in items[: protocol.faithfulness_items]}
    for _, group in itertools.groupby(items, key=lambda item: item.context):
        together = list(group)
        for setting in settings:
            missing = [item for item in together if (item.id, setting.name) not in done]
            for _ in range(len(together) - len(missing)):
                advance()
            for first in range(0, len(missing), MOST_TOGETHER):
                asked = missing[first : first + MOST_TOGETHER]
                for entry in _measured(explainers[setting.name], asked, setting, protocol, with_curves):
                    results.add(entry)
                    advance()


def _measured(
    explainer: Explainer, items: list[Item], setting: Setting, protocol: EvaluationProtocol, with_curves: set[str]
) -> Iterator[dict[str, Any]]:
    """One entry per item."""
    prompts, targets = zip(*((item.prompt(protocol.chat), item.target(protocol.chat)) for item in items), strict=True)
    entries: list[dict[str, Any]] = [{"item": item.id, "setting": setting.name} for item in items]
    units = [units_of(explainer, item, protocol) for item in items]
    started, processor_started = time.perf_counter(), time.process_time()
    try:
        explanations = explainer.explain_batch(
            prompts, targets, units, chat=protocol.chat, method=setting.method, **setting.options
        )
    except UnsupportedModelError as error:
        yield from (entry | {"refused": str(error)} for entry in entries)
        return
    seconds = (time.perf_counter() - started) / len(items)
    processor_seconds = (time.process_time() - processor_started) / len(items)
    for entry, item, explanation in zip(entries, items, explanations, strict=True):
        first, last, truth = locate(explanation, item)
        entry |= {
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "relevance": [round(x, 6) for x in explanation.total.tolist()],
            "context": [first, last],
            "truth": truth,
            "target_logprob": float(explanation.base_logprobs.sum()),
        }
        if item.id in with_curves:
            entry["faithfulness"] = _area(explainer, item, protocol, explanation, (first, last))
        yield entry


def _area(
    explainer: Explainer, item: Item, protocol: EvaluationProtocol, explanation: Explanation, passage: tuple[int, int]
) -> float:
    """The area between the curves of the passage's units [first, last); all others of the prompt stay."""
    first, last = passage
    prompt, target = item.prompt(protocol.chat), item.target(protocol.chat)
    units = units_of(explainer, item, protocol)

    def logprobs(suppressed: Tensor) -> Tensor:
        masks = torch.zeros(len(suppressed), len(explanation.units), dtype=torch.bool, device="cpu")
        masks[:, first:last] = suppressed
        found = explainer.ablate(prompt, target, units, masks=masks, chat=protocol.chat)
        return found.logprobs.sum(1)

    steps = min(FAITHFULNESS_STEPS, last - first)
    return faithfulness(explanation.total[first:last], logprobs, steps).area


def units_of(explainer: Explainer, item: Item, protocol: EvaluationProtocol) -> UnitChoice:
    """What gets a score: a granularity, or the spans of the units of that granularity that lie in the passage.

    A token that stands for characters of two such spans belongs to both.

    Raises:
        InputError: the passage does not stand in the prompt.
    """
    if not protocol.passage_only:
        return protocol.units
    prompt = item.prompt(protocol.chat)
    read = read_prompt(explainer.model, explainer.tokenizer, prompt, protocol.units, chat=protocol.chat, language="en")
    begin = read.text.find(item.context)
    if begin < 0:
        raise InputError(f"item {item.id}: its context does not stand in the prompt")
    end = begin + len(item.context)
    places = {(unit.start, unit.end): _without_space(read.text, unit) for unit in read.units}
    return [span for span, (first, last) in places.items() if begin <= first < last <= end]


def _without_space(text: str, unit: Unit) -> tuple[int, int]:
    """Where a unit's characters begin and end, white space around them left out."""
    own = text[unit.start : unit.end]
    return unit.start + len(own) - len(own.lstrip()), unit.start + len(own.rstrip())


def locate(explanation: Explanation, item: Item) -> tuple[int, int, list[int]]:
    """The units of the passage, as a range [first, last), and the indices of those that hold the answer.

    A unit holds the answer if they share a character that is no white space.

    Raises:
        InputError: the passage does not stand in the prompt.
    """
    begin = explanation.prompt.find(item.context)
    if begin < 0 or item.start is None or item.answer is None:
        raise InputError(f"item {item.id}: its context does not stand in the prompt")
    end, start = begin + len(item.context), begin + item.start
    inside, truth = [], []
    for index, unit in enumerate(explanation.units):
        first, last = _without_space(explanation.prompt, unit)
        if unit.source != "prompt" or not begin <= first < last <= end:
            continue
        inside.append(index)
        if first < start + len(item.answer) and last > start:
            truth.append(index)
    if not truth:
        raise InputError(f"item {item.id}: no unit holds the answer {item.answer!r}")
    return inside[0], inside[-1] + 1, truth


@dataclass(frozen=True)
class Summary:
    """One setting over all items.

    Attributes:
        setting: its name.
        items: how many were measured.
        values: measure -> mean over the items: mAP, mAP_IQ, mAR, mAR_IQ, "hit@1", "hit@5", "area" (where it was run),
            and "seconds" and "processor_seconds" (of all threads, where it was recorded) per item.
        intervals: measure -> 95 % bootstrap interval, for those that are means over items.
        refused: why the model could not be explained so; None if it could.
    """

    setting: str
    items: int
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    refused: str | None = None


def summarize(entries: Sequence[dict[str, Any]], seed: int = 0) -> list[Summary]:
    """Measures per setting, in the order in which settings appear; relevance counts within the passage only."""
    return [_summary(name, [e for e in entries if e["setting"] == name], seed) for name in _names(entries)]


def agreement(entries: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Spearman's rank correlation of every two settings over the passage's units, on average over their common items.

    Items in which one of the two gives every unit the same score do not count; a pair without any is left out.
    """
    passages: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        if "relevance" in entry:
            first, last = entry["context"]
            relevance = torch.tensor(entry["relevance"], dtype=torch.float64, device="cpu")[first:last]
            if len(relevance.unique()) > 1:
                passages.setdefault(entry["setting"], {})[entry["item"]] = relevance
    found = {}
    for one, other in itertools.combinations(passages, 2):
        common = [item for item in passages[one] if item in passages[other]]
        if common:
            ranks = [rank_correlation(passages[one][item], passages[other][item]) for item in common]
            found[one, other] = sum(ranks) / len(ranks)
    return found


def _names(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from dict.fromkeys(entry["setting"] for entry in entries)


def _summary(name: str, entries: list[dict[str, Any]], seed: int) -> Summary:
    refused = next((entry["refused"] for entry in entries if "refused" in entry), None)
    entries = [entry for entry in entries if "relevance" in entry]
    if not entries:
        return Summary(name, 0, {}, {}, refused)
    per_item: dict[str, list[float]] = {"mAP": [], "mAR": [], "hit@1": [], "hit@5": []}
    for entry in entries:
        first, last = entry["context"]
        relevance = torch.tensor(entry["relevance"], dtype=torch.float64, device="cpu")[first:last]
        truth = torch.zeros(last - first, dtype=torch.bool, device="cpu")
        truth[torch.tensor(entry["truth"], device="cpu") - first] = True
        per_item["mAP"].append(precision(relevance, truth))
        per_item["mAR"].append(recall(relevance, truth))
        per_item["hit@1"].append(float(hit(relevance, truth, 1)))
        per_item["hit@5"].append(float(hit(relevance, truth, 5)))
    areas = [entry["faithfulness"] for entry in entries if "faithfulness" in entry]
    if areas:
        per_item["area"] = areas
    vectors = {measure: torch.tensor(found, dtype=torch.float64, device="cpu") for measure, found in per_item.items()}
    values = {measure: float(found.mean()) for measure, found in vectors.items()}
    values |= {f"{measure}_IQ": interquartile_mean(vectors[measure]) for measure in ("mAP", "mAR")}
    for clock in ("seconds", "processor_seconds"):
        if all(clock in entry for entry in entries):
            values[clock] = sum(entry[clock] for entry in entries) / len(entries)
    intervals = {measure: confidence_interval(found, seed=seed) for measure, found in vectors.items() if len(found) > 1}
    return Summary(name, len(entries), values, intervals, refused)
