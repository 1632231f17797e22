"""Real prompts: paragraphs joined to a given number of tokens, and questions of a SQuAD-format file."""

import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from atman_kernels.evaluation.squad import Item
from benchmarks.machine import REPOSITORY

SQUAD_VARIABLE = "ATMAN_SQUAD"
SQUAD_DEFAULT = REPOSITORY.parent / "shared" / "data" / "squad-v1.1-sample.json"

# What is read where no SQuAD file is at hand; repeated until it is long enough.
OWN_PARAGRAPH = (
    "The harbour of Lindvik freezes over every winter, usually in the second week of January. Before the railway "
    "came in 1894, the town lived from herring and from the salt that its merchants brought from Portugal. The "
    "first stationmaster, Ingrid Solheim, kept a diary in which she noted the temperature of every morning for "
    "thirty-one years. Today those notes are the longest record of its kind on the coast, and climate researchers "
    "from Bergen have copied them page by page. A small museum in the old customs house shows the original books, "
    "together with her brass thermometer and a model of the first locomotive."
)
TARGET_TOKENS = 4  # what a gold answer of SQuAD typically takes


@dataclass(frozen=True)
class Question:
    """One question over one paragraph, with its first gold answer."""

    item: str
    context: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return self.context + self.tail

    @property
    def tail(self) -> str:
        return f"\n\nQuestion: {self.question}\nAnswer:"

    @property
    def target(self) -> str:
        return " " + self.answer


OWN = Question("own", OWN_PARAGRAPH, "When did the railway come to Lindvik?", "in 1894")


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt and a target, tokenized: what every contender gets.

    Attributes:
        ids: (n + m,) prompt and target.
        spans: (n,) characters of the prompt that each of its tokens stands for.
        source: where the text came from.
    """

    prompt: str
    target: str
    ids: Tensor
    spans: tuple[tuple[int, int], ...]
    source: str

    @property
    def prompt_tokens(self) -> int:
        return len(self.spans)

    @property
    def inputs(self) -> Tensor:
        """(n + m - 1,): the last target token is predicted, never read."""
        return self.ids[:-1]

    @property
    def target_ids(self) -> Tensor:
        """(m,)"""
        return self.ids[self.prompt_tokens :]

    @property
    def target_rows(self) -> Tensor:
        """(m,): the rows of `inputs` that predict the target."""
        return torch.arange(self.prompt_tokens - 1, len(self.ids) - 1)

    @classmethod
    def tokenize(cls, tokenizer: Any, prompt: str, target: str, source: str) -> "Case":
        encoded = tokenizer(prompt, return_offsets_mapping=True)
        target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        spans = tuple((int(start), int(end)) for start, end in encoded["offset_mapping"])
        return cls(prompt, target, torch.tensor(encoded["input_ids"] + target_ids), spans, source)


def find_squad(path: str | os.PathLike[str] | None) -> Path | None:
    """The SQuAD file to read: the one given, else $ATMAN_SQUAD, else the default place if it exists, else None.

    Raises:
        click.UsageError: a file was named, but is not there.
    """
    named = path or os.environ.get(SQUAD_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise click.UsageError(f"SQuAD file {str(named)!r} does not exist")
        return Path(named)
    return SQUAD_DEFAULT if SQUAD_DEFAULT.is_file() else None


def questions(squad: Path, per_paragraph: int | None = None) -> Iterator[Question]:
    """Every question of the file in its order; with `per_paragraph` only the first ones of each paragraph."""
    for article in json.loads(squad.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"][:per_paragraph]:
                answer = entry["answers"][0]["text"]
                yield Question(entry["id"], paragraph["context"], entry["question"], answer)


def long_case(tokenizer: Any, tokens: int, squad: Path | None) -> Case:
    """A prompt of exactly `tokens` tokens: paragraphs in their order, cut to fit, then the file's first question
    whose answer takes at least four tokens.

    Raises:
        ValueError: no cut gives that length, as `tokens` is smaller than the question or than the text is long.
    """
    if squad is None:
        first = OWN
        paragraphs = [OWN_PARAGRAPH] * (1 + tokens // 64)
    else:
        first = next(q for q in questions(squad) if _length(tokenizer, q.target) >= TARGET_TOKENS)
        paragraphs = list(dict.fromkeys(question.context for question in questions(squad)))
    source = "own paragraph, repeated" if squad is None else squad.name
    text = "\n\n".join(paragraphs)[: 16 * tokens]
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    tail = _length(tokenizer, first.tail)
    # The cut can merge with the question into fewer or more tokens, so the neighbours are tried as well.
    for kept in range(tokens - tail + 4, max(tokens - tail - 4, 0), -1):
        if kept < len(spans):
            case = Case.tokenize(tokenizer, text[: spans[kept][0]] + first.tail, first.target, source)
            if case.prompt_tokens == tokens:
                return case
    raise ValueError(f"no cut of the text from {source} gives a prompt of exactly {tokens} tokens")


def passages_of_length(
    tokenizer: Any, items: Sequence[Item], tokens: int, per_passage: int, seed: int = 0
) -> Iterator[list[Item]]:
    """Questions about passages of a given length: the passage of the file among others, which fill it up.

    The passage stands at a random place among the others, which are of other articles; the last of them is cut. The
    prompt of the first question has about `tokens` tokens; passages whose own prompt has half as many more are out.

    Args:
        items: questions about one passage one after the other.
        per_passage: so many of them at most.

    Yields:
        the questions about one passage, all with the same context.
    """
    contexts = list(dict.fromkeys((item.article, item.context) for item in items))
    for context, group in itertools.groupby(items, key=lambda item: item.context):
        asked = list(itertools.islice(group, per_passage))
        own = _length(tokenizer, asked[0].prompt(chat=False))
        if own > 1.5 * tokens:
            continue
        draw = random.Random(f"{seed} {context}")
        others = [text for article, text in contexts if article != asked[0].article]
        before, after = _filling(tokenizer, draw.sample(others, len(others)), tokens - own, draw)
        text, start = "\n\n".join([*before, context, *after]), sum(len(other) + 2 for other in before)
        yield [replace(item, context=text, start=(item.start or 0) + start) for item in asked]


def _filling(tokenizer: Any, texts: list[str], tokens: int, draw: random.Random) -> tuple[list[str], list[str]]:
    """Texts of so many tokens together, the last one cut, in two random parts."""
    chosen: list[str] = []
    for text in texts:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if tokens < 8:  # a cut so short says nothing
            break
        chosen.append(text if len(spans) <= tokens else text[: spans[tokens][0]].rstrip())
        tokens -= len(spans) + 1
    place = draw.randint(0, len(chosen))
    return chosen[:place], chosen[place:]


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def sample_positions(case: Case, count: int) -> list[int]:
    """`count` prompt tokens, one from the middle of each of `count` equal stretches; all of them for 0.

    Tokens that share their characters with another one (parts of an emoji, say) are passed over, as no span of
    characters means one of them alone.
    """
    total = case.prompt_tokens
    if count <= 0 or count >= total:
        return list(range(total))
    alone = [index for index, span in enumerate(case.spans) if span[0] < span[1] and case.spans.count(span) == 1]
    middles = [(2 * stretch + 1) * total / (2 * count) - 0.5 for stretch in range(count)]
    return sorted({min(alone, key=lambda index: abs(index - middle)) for middle in middles})
